"""Colours of plots and pages, in a light and a dark theme.

Series have the colour-blind safe colours of Okabe and Ito (https://jfly.uni-koeln.de/color/), brightened on dark ground.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours of one theme."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """Colours by their names in the style sheet of a page."""
        named = {f"--{name}": getattr(self, name) for name in ("background", "ink", "muted", "grid")}
        return named | {f"--series-{index}": colour for index, colour in enumerate(self.series)}


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#59636e", "#d8dee4",
    ("#0072b2", "#d55e00", "#007a5a", "#b05a8c", "#b07d00", "#2f8fc4"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#9198a1", "#30363d",
    ("#56b4e9", "#ff9350", "#2fc79b", "#e39cc5", "#e8b93c", "#a8d5f2"),
)  # fmt: skip
