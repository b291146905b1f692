"""Pictures of a sweep: fitted lines by tokens and cache, and a row of dots for each cell of a list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.plan.sweep_rows import ERROR

AXES = {"tokens": "tokens", "kv_bytes_per_token": "cache bytes a token"}  # what is fitted by, in words
MOST_LETTERS = 60  # of a cell's name in a picture


def draw_fits(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], file: Path) -> Path:
    """Draw each metric by tokens, one line a cache size, and by cache size, one line an amount of tokens.

    Args:
        rows: of the cells that are fitted.
        fits: as `sweep_report.fit_metric` returns them.
        file: PNG to write; it is returned.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    from megatron_hylo.eval.plots import rc, style
    from megatron_hylo.eval.theme import LIGHT

    with matplotlib.rc_context(rc(LIGHT)):
        figure = Figure(figsize=(10, 4.2 * len(fits)), layout="constrained")
        panels = figure.subplots(len(fits), 2, squeeze=False)
        for fit, axes in zip(fits, panels):
            for panel, (along, other) in zip(axes, (("tokens", "kv_bytes_per_token"), ("kv_bytes_per_token", "tokens"))):
                for number, value in enumerate(sorted({row[other] for row in rows})):
                    mine = sorted(
                        (row[along], row[fit["metric"]]) for row in rows if row[other] == value and fit["metric"] in row
                    )
                    if not mine:
                        continue
                    look = style(LIGHT, number)
                    panel.plot(*zip(*mine), "o", color=look["color"], label=f"{value:,.0f} {AXES[other]}")
                    if along in fit["names"]:
                        ends = np.geomspace(min(row[along] for row in rows), max(row[along] for row in rows), 40)
                        point = {along: ends, other: np.full(40, float(value))}
                        middle, low, high = fit["predict"](np.column_stack([point[name] for name in fit["names"]]))
                        panel.plot(ends, middle, **look, linewidth=1.5)
                        panel.fill_between(ends, low, high, color=look["color"], alpha=0.15, linewidth=0)
                panel.set(xscale="log", xlabel=AXES[along], ylabel=fit["metric"], yscale="log" if fit["power"] else "linear")
                panel.legend(fontsize=7)
                measured = sorted({row[along] for row in rows})
                measured = measured[:: -(-len(measured) // 5)]  # five labels fit
                panel.set_xticks(measured, [f"{value:,.0f}" for value in measured])
                panel.xaxis.set_minor_locator(NullLocator())
                if fit["power"]:  # a loss spans less than a decade
                    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
                    panel.yaxis.set_major_formatter("{x:g}")
                    panel.yaxis.set_minor_formatter(NullFormatter())
        figure.savefig(file, dpi=120)
    return file


def draw_cells(named: Sequence[tuple[str, dict[str, Any]]], loss: str, recall: str, file: Path) -> Path:
    """Draw a list of cells from top to bottom, each with a dot for its loss and one for its recall.

    Dashed lines go through the first cell that has the metric, which the others can be compared with.

    Args:
        named: each cell's name and its row; a metric may be missing in some.
        loss: name of the loss in the rows, drawn in logarithms; "" for none.
        recall: name of the recall, drawn with its standard error; "" for none.
        file: PNG to write; it is returned.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    from megatron_hylo.eval.plots import rc, style
    from megatron_hylo.eval.theme import LIGHT

    metrics = [metric for metric in (loss, recall) if metric]
    places = range(len(named))
    with matplotlib.rc_context(rc(LIGHT)):
        figure = Figure(figsize=(4 + 3.5 * len(metrics), 1 + 0.26 * len(named)), layout="constrained")
        (panels,) = figure.subplots(1, len(metrics), sharey=True, squeeze=False)
        for number, (panel, metric) in enumerate(zip(panels, metrics)):
            found = [(place, row[metric], row.get(metric + ERROR) or 0.0)
                     for place, (_, row) in zip(places, named) if row.get(metric) is not None]  # fmt: skip
            at, values, errors = zip(*found)
            color = style(LIGHT, number)["color"]
            panel.axvline(values[0], color=color, linestyle="--", linewidth=0.8)
            panel.errorbar(values, at, xerr=errors, fmt="o", color=color, markersize=5, linewidth=1.2)
            panel.set(xlabel=metric, xscale="log" if metric == loss else "linear")
            if metric == loss:
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_locator(NullLocator())
        names = [name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…" for name, _ in named]
        panels[0].set_yticks(places, names, fontsize=8)
        panels[0].set_ylim(len(named) - 0.5, -0.5)
        figure.savefig(file, dpi=120)
    return file
