"""Chart types of every picture, as PNG files and inline SVG; colours are those of eval/theme.py.

Series differ by dashes as well as by colour. Figures are made without pyplot, so no backend is chosen and no setting of the
caller changes.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_hylo.eval.theme import LIGHT, Theme

WIDE = 8  # inches of a page on a wide screen
NARROW = 4.4  # width in inches of a chart on a phone
CHARACTER = 0.085  # mean width in inches of a character of an axis
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


@dataclass(frozen=True)
class Curve:
    """One named series of points.

    Args:
        label: name.
        x, y: points.
        markers: draw a dot at each.
        number: decides colour and dashes, the same in every chart of a page; by default its place in the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False
    number: int | None = None


def style(theme: Theme, number: int) -> dict[str, Any]:
    """Colour and dashes of a series, as arguments of `Axes.plot`."""
    return {"color": theme.series[number % len(theme.series)], "linestyle": DASHES[number % len(DASHES)]}


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
    """Draw one chart as inline SVG, once for wide screens and once for phones; the page's style sheet shows one of them.

    Colours are variables of that style sheet, so that the chart follows the reader's light or dark theme.

    Args:
        draw: called with the axes and the theme.
        description: what a screen reader says.
        size: width and height in inches on a wide screen, whose page is `WIDE` inches wide.
    """
    drawn = []
    for name, inches in (("wide", size), ("narrow", (NARROW, max(NARROW * 0.75, size[1] * 0.9)))):
        buffer = io.StringIO()
        with matplotlib.rc_context(rc(LIGHT) | {"svg.hashsalt": name + description}):  # ids are unique in the page
            figure = Figure(figsize=inches, layout="constrained")
            draw(figure.add_subplot(), LIGHT)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        for variable, colour in LIGHT.variables().items():
            svg = svg.replace(f" {colour}", f" var({variable})")
        label = f'role="img" aria-label="{escape(description)}"'
        width = f' style="max-width: {size[0] / WIDE:.0%}"' if name == "wide" and size[0] < WIDE else ""
        drawn.append(f'<div class="chart {name}"{width} {label}>{svg[svg.index("<svg") :]}</div>')
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
            curve.x, curve.y, label=curve.label, marker="o" if curve.markers or len(curve.x) == 1 else None,
            **style(theme, index if curve.number is None else curve.number),
        )  # fmt: skip
    if reference:
        draw_reference(axes, theme, *reference)
    if logarithmic:
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(0, 1.12 * max(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _whole_or_short(value)))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title)
    if len(curves) > 1:
        axes.legend(fontsize=9)


def draw_buckets(
    axes: Axes,
    theme: Theme,
    buckets: Sequence[str],
    curves: Mapping[str, Mapping[str, float]],
    *,
    y_label: str,
    x_label: str,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw values by bucket, each bucket as wide as any other.

    Args:
        axes: to draw on.
        theme: of the axes.
        buckets: all buckets in order.
        curves: {label: {bucket: value}}; a bucket may be missing.
        y_label: quantity and unit.
        x_label: what the buckets are of.
        intervals: {label: {bucket: (low, high)}}, drawn as bars, side by side where there are several labels.
        limits: of the y axis.
    """
    for index, (label, values) in enumerate(curves.items()):
        if not values:  # it has a colour, and no curve here
            continue
        there = [place for place, bucket in enumerate(buckets) if bucket in values]
        heights = [values[buckets[place]] for place in there]
        shift = 0.06 * (index - (len(curves) - 1) / 2) if intervals else 0.0
        axes.plot([place + shift for place in there], heights, label=label, marker="o", **style(theme, index))
        for place in there:
            if ends := (intervals or {}).get(label, {}).get(buckets[place]):
                axes.plot([place + shift] * 2, ends, color=theme.series[index % len(theme.series)], linewidth=1.2)
    axes.set_xticks(range(len(buckets)), buckets)
    figure = axes.get_figure(root=True)
    if figure is not None and sum(len(bucket) + 2 for bucket in buckets) * CHARACTER > 0.8 * figure.get_figwidth():
        for tick in axes.get_xticklabels():  # side by side they would overlap
            tick.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.3, len(buckets) - 0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _whole_or_short(value)))
    axes.set(xlabel=x_label, ylabel=y_label)
    if limits:
        axes.set_ylim(*limits)
    if len(curves) > 1:
        axes.figure.legend(
            fontsize=9, loc="outside upper left", ncols=len(curves) if len(curves) < 4 else 2
        )  # over no interval


def heat_map_size(columns: int, rows: int, row: float) -> tuple[float, float]:
    """Width and height, in inches, of a heat map whose rows are so high; few columns make it narrow."""
    return min(WIDE, 2.6 + 0.9 * columns), 1.1 + row * rows


def draw_heat_map(
    axes: Axes,
    theme: Theme,
    columns: Sequence[str],
    rows: Sequence[str],
    shares: Mapping[tuple[str, str], float],
    *,
    x_label: str,
    y_label: str,
) -> None:
    """Draw parts of 1 as coloured cells with their percentages, from dark (0) to bright (1); cells without a value stay empty.

    Args:
        axes: to draw on.
        theme: of the axes.
        columns, rows: names, from left to right and from top to bottom.
        shares: {(column, row): part}.
        x_label, y_label: what columns and rows are.
    """
    cells = np.full((len(rows), len(columns)), np.nan)
    for (column, row), share in shares.items():
        cells[rows.index(row), columns.index(column)] = share
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(cells), cmap="cividis", vmin=0, vmax=1, edgecolors=theme.background, linewidth=1
    )
    for (y, x), share in np.ndenumerate(cells):
        if not math.isnan(share):
            grey = float(np.dot(np.power(mesh.to_rgba(share)[:3], 2.2), (0.2126, 0.7152, 0.0722)))  # relative luminance
            colour = "#0d1118" if grey > 0.18 else "#fffffe"  # of neither theme, so that they stay with their cell
            axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel=x_label, ylabel=y_label)


def draw_differences(
    axes: Axes,
    theme: Theme,
    rows: Sequence[str],
    differences: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]],
    *,
    x_label: str,
) -> None:
    """Draw differences from a baseline as dots with intervals beside a line at 0, one row a quantity.

    Args:
        axes: to draw on.
        theme: of the axes.
        rows: names of the quantities, from top to bottom.
        differences: {label: {row: (value, low, high)}}; ends are None where there is no interval.
        x_label: quantity and unit.
    """
    axes.axvline(0, color=theme.ink, linewidth=1.4)
    for index, (label, found) in enumerate(differences.items()):
        color, shift = theme.series[(index + 1) % len(theme.series)], 0.18 * (index - (len(differences) - 1) / 2)
        heights = [place + shift for place, row in enumerate(rows) if row in found]
        for height, (_, low, high) in zip(heights, (found[row] for row in rows if row in found)):
            if low is not None and high is not None:
                axes.plot((low, high), (height, height), color=color, linewidth=1.6)
        axes.plot([found[row][0] for row in rows if row in found], heights, "o", color=color, label=label)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=x_label)
    if len(differences) > 1:
        axes.figure.legend(fontsize=9, loc="outside upper left")


def draw_reference(axes: Axes, theme: Theme, name: str, value: float) -> None:
    """Draw a dashed horizontal line with its name and value written on it at the right."""
    axes.axhline(value, color=theme.ink, linewidth=1.4, linestyle=(0, (6, 3)))
    axes.annotate(
        f"{name} {value:,.4g}", (1, value), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        ha="right", va="bottom", color=theme.ink, fontsize=10,
    )  # fmt: skip


def _whole_or_short(value: float) -> str:
    """A number on a y axis: 0.125, 12, 315,000."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def short_number(value: float) -> str:
    """A number as read on an axis: 500, 20K, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
