"""Style and chart types of every picture: colour-blind safe colours, a light and a dark theme, PNG files and inline SVG.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), brightened on dark ground; series also differ by dashes.
Figures are made without pyplot, so no backend is chosen and no setting of the caller changes.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


@dataclass(frozen=True)
class Theme:
    """Colours of one theme."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#59636e", "#d8dee4",
    ("#0072b2", "#d55e00", "#007a5a", "#b05a8c", "#b07d00", "#2f8fc4"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#9198a1", "#30363d",
    ("#56b4e9", "#ff9350", "#2fc79b", "#e39cc5", "#e8b93c", "#a8d5f2"),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One named series of points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False


def rc(theme: Theme) -> Any:
    """Matplotlib settings of a theme, for `matplotlib.rc_context`."""
    return {
        "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=theme.series), "legend.frameon": False, "lines.linewidth": 2,
        "figure.facecolor": theme.background, "axes.facecolor": theme.background, "savefig.facecolor": theme.background,
        "text.color": theme.ink, "axes.titlecolor": theme.ink, "axes.labelcolor": theme.muted, "axes.edgecolor": theme.grid,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "grid.color": theme.grid, "grid.linewidth": 0.8,
        "svg.fonttype": "none", "svg.hashsalt": "hylo", "font.family": ["DejaVu Sans", "sans-serif"],
    }  # fmt: skip


def draw_png(file: Path, draw: Callable[[Axes, Theme], None], size: tuple[float, float] = (8, 4.5), dpi: int = 120) -> Path:
    """Draw one chart into a PNG file, in the light theme.

    Args:
        file: to write.
        draw: called with the axes and the theme.
        size: width and height in inches.
        dpi: pixels an inch.
    """
    with matplotlib.rc_context(rc(LIGHT)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot(), LIGHT)
        figure.savefig(file, dpi=dpi)
    return file


def draw_svg(draw: Callable[[Axes, Theme], None], description: str, size: tuple[float, float] = (8, 4.2)) -> str:
    """Draw one chart as inline SVG, once a theme; the style sheet of `report` shows the one that the reader's system prefers.

    Args:
        draw: called with the axes and the theme.
        description: what a screen reader says.
        size: width and height in inches.
    """
    drawn = []
    for theme in (LIGHT, DARK):
        buffer = io.StringIO()
        with matplotlib.rc_context(rc(theme) | {"svg.hashsalt": theme.name + description}):  # ids are unique in the page
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.add_subplot(), theme)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        label = f'role="img" aria-label="{escape(description)}"'
        drawn.append(f'<div class="chart {theme.name}" {label}>{svg[svg.index("<svg") :]}</div>')
    return "\n".join(drawn)


def draw_curves(
    axes: Axes,
    theme: Theme,
    curves: Sequence[Curve],
    *,
    y_label: str,
    x_label: str = "training tokens",
    title: str = "",
    reference: tuple[str, float] | None = None,
    zero: bool = False,
) -> None:
    """Draw curves over tokens, with an optional horizontal line to compare with.

    The y axis is logarithmic where positive values differ by more than 30 times, so that no curve is flattened.

    Args:
        axes: to draw on.
        theme: of the axes.
        curves: at least one, with points that are numbers.
        y_label: quantity and unit.
        x_label: of the other axis.
        title: a sentence above the chart.
        reference: name and value of a dashed line.
        zero: let a linear y axis begin at 0.
    """
    values = [y for curve in curves for y in curve.y if math.isfinite(y)] + ([reference[1]] if reference else [])
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    for index, curve in enumerate(curves):
        axes.plot(
            curve.x, curve.y, color=theme.series[index % len(theme.series)], label=curve.label,
            linestyle=DASHES[index % len(DASHES)], marker="o" if curve.markers or len(curve.x) == 1 else None,
        )  # fmt: skip
    if reference:
        draw_reference(axes, theme, *reference)
    if logarithmic:
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(0, 1.12 * max(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title)
    if len(curves) > 1:
        axes.legend(fontsize=9)


def draw_reference(axes: Axes, theme: Theme, name: str, value: float) -> None:
    """Draw a dashed horizontal line with its name and value written on it at the right."""
    axes.axhline(value, color=theme.ink, linewidth=1.4, linestyle=(0, (6, 3)))
    axes.annotate(
        f"{name} {value:,.4g}", (1, value), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", color=theme.ink, fontsize=10,
    )  # fmt: skip


def short_number(value: float) -> str:
    """A number as read on an axis: 500, 20K, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
