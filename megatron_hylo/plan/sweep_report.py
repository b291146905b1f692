"""Results of a sweep: a Parquet file with a row a stage, fits of loss and recall by tokens and cache, plots, a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import uniform_mixers
from megatron_hylo.config.mixers import MLA_SYMBOL
from megatron_hylo.plan.sweep import Cell, Sweep, settings_of
from megatron_hylo.plan.sweep_page import LOSSES, page, varied_names
from megatron_hylo.plan.sweep_plots import AXES, draw_cells, draw_fits
from megatron_hylo.plan.sweep_rows import newest, rows_of

RECALLS = ("eval/recall/mean/exact", "heldout_recall_accuracy")  # of training, where no evaluation measured recall
MAY_DIFFER = ("label", ".train_tokens", ".seed", "student.mla")  # ends of names of settings, among cells of a fit
Floats = NDArray[np.float64]


def write_report(sweep: Sweep, samples: int = 1000) -> dict[str, Any]:
    """Write results.parquet and report.md beside the cells, and report.png of fits, cells.png where cells are in no fit.

    Args:
        sweep: with some finished cells.
        samples: of the bootstrap.

    Returns:
        {cells, finished, states, fits, files}, as `hylo sweep report --json` prints it.

    Raises:
        ConfigError: no finished cell, or pyarrow is not installed.
    """
    of_cells = [(cell, rows_of(cell)) for cell in sweep.cells]
    stages = [(cell, row) for cell, found in of_cells for row in found]
    rows = [newest(found) for _, found in of_cells]
    finished = [row for row in rows if row["state"] == "finished"]
    if not finished:
        raise ConfigError(f"no cell of {sweep.file} is finished; run `hylo sweep {sweep.file}` first")
    table = sweep.output / "results.parquet"
    _write_parquet(stages, table)
    trained = [row for row in finished if "tokens" in row]
    known = {name for row in trained for name in row}
    loss = next((name for name in LOSSES if name in known), "")
    recall = next((name for name in (*measured_recall(trained), *RECALLS) if name in known), "")
    alike = comparable([sweep.cells[row["cell"]] for row in trained])
    fitted = [row for row in trained if row["cell"] in alike]
    fits = [
        fit
        for metric, words, power in ((loss, "loss", True), (recall, "recall", False))
        if (fit := fit_metric(fitted, metric, words, power, samples))
    ]
    files = [table]
    if fits:
        files.append(draw_fits(fitted, fits, sweep.output / "report.png"))
    pictured = bool(loss or recall) and len(trained) > 1 and (not fits or len(trained) > len(fitted))
    if pictured:  # there are cells that no line goes through
        measured = [row for row in finished if any(row.get(metric) is not None for metric in (loss, recall))]
        varied, several = varied_names(sweep), len({row["stage"] for row in measured if "tokens" in row}) > 1
        names = [cell_name(sweep.cells[row["cell"]], varied) + (f" ({row['stage']})" if several else "") for row in measured]
        named = list(zip(names, measured, strict=True))
        files.append(draw_cells(named, loss, recall, sweep.output / "cells.png"))
    report = sweep.output / "report.md"
    report.write_text(page(sweep, stages, fits, sorted(alike), pictured))
    return {
        "cells": len(rows), "finished": len(finished), "states": {row["name"]: row["state"] for row in rows},
        "fits": [{k: v for k, v in fit.items() if k != "predict"} for fit in fits], "files": [str(f) for f in (*files, report)],
    }  # fmt: skip


def comparable(cells: Sequence[Cell]) -> set[int]:
    """Numbers of the cells that one line may go through: most that differ in tokens, seed and number of MLA layers alone.

    Evenly spread layers are told from chosen ones, and of several choices of as many layers the most frequent one is taken.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        same = {name: value for name, value in cell.varied.items() if not name.endswith(MAY_DIFFER)}
        groups.setdefault(json.dumps([same, _is_even(cell)], sort_keys=True, default=str), []).append(cell)
    kept = [[cell for cell in group if _pattern(cell) == _usual(group, _count(cell))] for group in groups.values()]
    return {cell.number for cell in max(kept, key=len, default=[])}


def _pattern(cell: Cell) -> str:
    return (cell.upcycle.pattern or "") if cell.upcycle else ""


def _count(cell: Cell) -> int:
    return _pattern(cell).count(MLA_SYMBOL)


def _is_even(cell: Cell) -> bool:
    """Whether a cell's MLA layers are spread as `student.mla: NUMBER` spreads them, among layers of one other kind."""
    pattern, others = _pattern(cell), sorted(set(_pattern(cell)) - {MLA_SYMBOL})
    return len(others) == 1 and pattern == uniform_mixers(len(pattern), _count(cell), others[0])


def _usual(group: Sequence[Cell], count: int) -> str:
    """The pattern of a group that most of its cells with so many MLA layers have; of several the first."""
    patterns = [_pattern(cell) for cell in group if _count(cell) == count]
    return max(patterns, key=patterns.count)


def cell_name(cell: Cell, varied: Sequence[str]) -> str:
    """A cell's label, else what it varies."""
    return str(cell.varied.get("label") or ", ".join(f"{name} {cell.varied[name]}" for name in varied if name in cell.varied))


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
        f"{'exponent' if power else 'slope'} by {AXES[name]} {c['value']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
        for name, c in coefficients.items()
        if name != "constant"
    )
    sentence = f"{metric}: {said} (95 % of {samples:,} bootstrap samples of {len(y)} cells), R2 {1 - residual:.3f}"
    return dict(metric=metric, words=words, power=power, cells=len(y), names=names, coefficients=coefficients, r2=1 - residual,
                sentence=sentence, predict=predict)  # fmt: skip
