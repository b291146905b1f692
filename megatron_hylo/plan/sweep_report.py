"""Results of a sweep: a Parquet file with a row a stage, fits of loss and recall by tokens and cache, plots, a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hylo.config import ConfigError
from megatron_hylo.plan.sweep import Cell, Sweep, settings_of
from megatron_hylo.plan.sweep_page import page
from megatron_hylo.plan.sweep_rows import row_of, rows_of

LOSSES = ("heldout_kl", "heldout_cross_entropy")
RECALLS = ("eval/recall/mean/exact", "heldout_recall_accuracy")  # of training, where no evaluation measured recall
Floats = NDArray[np.float64]


def write_report(sweep: Sweep, samples: int = 1000) -> dict[str, Any]:
    """Write results.parquet, report.md and report.png beside the cells.

    Args:
        sweep: with some finished cells.
        samples: of the bootstrap.

    Returns:
        {cells, finished, states, fits, files}, as `hylo sweep report --json` prints it.

    Raises:
        ConfigError: no finished cell, or pyarrow is not installed.
    """
    rows = [row_of(cell) for cell in sweep.cells]
    stages = [(cell, row) for cell in sweep.cells for row in rows_of(cell)]
    finished = [row for row in rows if row["state"] == "finished"]
    if not finished:
        raise ConfigError(f"no cell of {sweep.file} is finished; run `hylo sweep {sweep.file}` first")
    table = sweep.output / "results.parquet"
    _write_parquet(stages, table)
    trained = [row for row in finished if "tokens" in row]
    fits, known = list[dict[str, Any]](), {name for row in trained for name in row}
    recalls = (*measured_recall(trained), *RECALLS)
    for measures, words, power in ((LOSSES, "loss", True), (recalls, "recall", False)):
        if fit := fit_metric(trained, next((m for m in measures if m in known), ""), words, power, samples):
            fits.append(fit)
    files = [table]
    if fits:
        files.append(_draw(trained, fits, sweep.output / "report.png"))
    report = sweep.output / "report.md"
    report.write_text(page(sweep, stages, fits))
    return {
        "cells": len(rows), "finished": len(finished), "states": {row["name"]: row["state"] for row in rows},
        "fits": [{k: v for k, v in fit.items() if k != "predict"} for fit in fits], "files": [str(f) for f in (*files, report)],
    }  # fmt: skip


def measured_recall(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the recall suites' means that all rows have, the longest length first."""
    names = [name for name in (rows[0] if rows else ()) if "/recall/mean/exact/" in name and name.rsplit("/", 1)[1].isdecimal()]
    return sorted((n for n in names if all(n in row for row in rows)), key=lambda n: -int(n.rsplit("/", 1)[1]))


def _write_parquet(stages: Sequence[tuple[Cell, dict[str, Any]]], file: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "results are written with pyarrow, which is not installed: pip install megatron-hylo[data]"
        ) from error
    whole = []
    for cell, row in stages:
        stage = next((one for one in cell.stages if one.name == row["stage"]), cell.last)
        settings = {k: v if isinstance(v, (int, float, str, bool, type(None))) else json.dumps(v, default=str)
                    for k, v in settings_of(cell, stage).items()}  # fmt: skip
        whole.append(row | settings)
    columns = dict.fromkeys(name for row in whole for name in row)
    table = {}
    for name in columns:
        values = [row.get(name) for row in whole]
        kinds = {type(value) for value in values if value is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        table[name] = [
            str(v) if mixed and v is not None else float(v) if kinds == {int, float} and v is not None else v for v in values
        ]
    beside = file.with_name(f".{file.name}.partial")
    pyarrow.parquet.write_table(pyarrow.table(table), beside)
    beside.replace(file)


def fit_metric(rows: Sequence[dict[str, Any]], metric: str, words: str, power: bool, samples: int) -> dict[str, Any] | None:
    """Least-squares fit of a metric by the logarithms of tokens and cache bytes, with a bootstrap over cells.

    ln(metric) = a + b ln(tokens) + c ln(bytes) for a loss (a power law), metric = a + b ln(tokens) + c ln(bytes) for a share.
    What does not vary has no coefficient.

    Args:
        rows: finished cells.
        metric: its name in the rows; "" gives no fit.
        words: what it is.
        power: fit its logarithm.
        samples: of the bootstrap.

    Returns:
        {metric, words, power, cells, coefficients: {name: {value, low, high}}, r2, sentence, predict}, the interval being the
        bootstrap's 95 %; None where fewer cells have it than a fit takes, or tokens and bytes vary together in all of them.
    """
    chosen = [row for row in rows if row.get(metric) is not None and (not power or row[metric] > 0)]
    names = [name for name in ("tokens", "kv_bytes_per_token") if len({row.get(name) for row in chosen}) > 1]
    names = [name for name in names if all(row.get(name) for row in chosen)]
    if not metric or not names or len(chosen) < len(names) + 2:
        return None
    x = np.column_stack([np.ones(len(chosen)), *([np.log([row[name] for row in chosen]) for name in names])])
    if np.linalg.matrix_rank(x) < x.shape[1]:  # tokens and cache vary together
        return None
    y = np.array([row[metric] for row in chosen])
    target = np.log(y) if power else y
    best = np.linalg.lstsq(x, target, rcond=None)[0]
    generator, drawn = np.random.default_rng(0), list[Floats]()
    while len(drawn) < samples:
        index = generator.integers(0, len(y), len(y))
        if np.linalg.matrix_rank(x[index]) == x.shape[1]:  # a draw without one of the levels says nothing of its slope
            drawn.append(np.linalg.lstsq(x[index], target[index], rcond=None)[0])
    spread = np.array(drawn)
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    residual = float(((target - x @ best) ** 2).sum() / max(((target - target.mean()) ** 2).sum(), 1e-30))
    coefficients = {
        name: {"value": float(best[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(("constant", *names))
    }

    def predict(points: Floats) -> tuple[Floats, Floats, Floats]:
        """Value and 95 % band at points [n, names]."""
        inputs = np.column_stack([np.ones(len(points)), np.log(points)])
        bands = np.percentile(inputs @ spread.T, [2.5, 97.5], axis=1)
        found = (inputs @ best, bands[0], bands[1])
        return (np.exp(found[0]), np.exp(found[1]), np.exp(found[2])) if power else found

    said = ", ".join(
        f"{'exponent' if power else 'slope'} by {_words(name)} {c['value']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
        for name, c in coefficients.items()
        if name != "constant"
    )
    sentence = f"{metric}: {said} (95 % of {samples:,} bootstrap samples of {len(y)} cells), R2 {1 - residual:.3f}"
    return dict(metric=metric, words=words, power=power, cells=len(y), names=names, coefficients=coefficients, r2=1 - residual,
                sentence=sentence, predict=predict)  # fmt: skip


def _words(name: str) -> str:
    return {"tokens": "tokens", "kv_bytes_per_token": "cache bytes a token"}[name]


def _draw(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], file: Path) -> Path:
    """Each metric by tokens, one line a cache size, and by cache size, one line an amount of tokens."""
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
                    panel.plot(*zip(*mine), "o", color=look["color"], label=f"{value:,.0f} {_words(other)}")
                    if along in fit["names"]:
                        ends = np.geomspace(min(row[along] for row in rows), max(row[along] for row in rows), 40)
                        point = {along: ends, other: np.full(40, float(value))}
                        middle, low, high = fit["predict"](np.column_stack([point[name] for name in fit["names"]]))
                        panel.plot(ends, middle, **look, linewidth=1.5)
                        panel.fill_between(ends, low, high, color=look["color"], alpha=0.15, linewidth=0)
                panel.set(xscale="log", xlabel=_words(along), ylabel=fit["metric"], yscale="log" if fit["power"] else "linear")
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
