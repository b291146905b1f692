"""Figures of a sweep's cells, read from the files of their runs and evaluations: one row a stage."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import kv_bytes_per_token, kv_percent, parameter_count
from megatron_hylo.eval.results import RESULTS
from megatron_hylo.eval.runs import Run, read_run, seconds_of
from megatron_hylo.io import read_json
from megatron_hylo.plan.job import folder_shape, shape
from megatron_hylo.plan.sweep import STOPPED, Cell, Stage, student_shape

ERROR = " s.e."  # behind a measured metric's name: its standard error


def row_of(cell: Cell) -> dict[str, Any]:
    """State and newest figures of a cell, see `newest`."""
    return newest(rows_of(cell))


def newest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Row of a cell as a whole: its cache, tokens, seconds of all stages, and every metric of its newest stage.

    Args:
        rows: the cell's, as `rows_of` returns them.
    """
    return rows[-1] | {"seconds": sum(row["seconds"] for row in rows)}


def rows_of(cell: Cell) -> list[dict[str, Any]]:
    """Figures of a cell after each stage that has begun; one row, without figures, where none has.

    Tokens are those of all stages up to the row's own.
    """
    state, message = cell.state()
    attempts = cell.attempts()
    shared: dict[str, Any] = {
        "cell": cell.number,
        "name": cell.name,
        "state": state,
        "message": message,
        "attempts": len(attempts),
        "failures": sum(attempt["code"] not in (0, STOPPED) for attempt in attempts),
        "varied": json.dumps(cell.varied),
    }
    if model := _model(cell):
        shared |= {"mixers": model.mixers, "parameters": parameter_count(model), "kv_percent": kv_percent(model),
                   "kv_bytes_per_token": kv_bytes_per_token(model)}  # fmt: skip
    rows, tokens = [], 0
    for stage in cell.stages:
        row = shared | {"stage": stage.name, "seconds": 0.0}
        if stage.train is not None:
            if not (stage.run / "config.json").is_file():
                break
            run = read_run(stage.run, cell.name)
            tokens += run.step * run.tokens_per_step
            row |= {"tokens": tokens, "steps": run.step, "seconds": _seconds(run)} | _last(run)
            row["attempts"] = max(len(attempts), len(run.starts))
        elif len(stage.unmeasured()) == len(stage.measurements):
            break
        rows.append(row | _measured(stage))
    nothing = shared | {"stage": "", "seconds": sum(attempt["seconds"] for attempt in attempts)}
    return rows or [nothing]


def _measured(stage: Stage) -> dict[str, Any]:
    """Scores of a stage's evaluations by EVALUATION/SUITE/TASK/METRIC, with /LENGTH where they have one."""
    found: dict[str, Any] = {}
    for one in stage.measurements:
        file = stage.results(one) / RESULTS
        for score in read_json(file, needs=("scores",))["scores"] if file.is_file() else ():
            if score.get("depth") is None and math.isfinite(score["value"]):
                length = score.get("length")
                name = f"{one.name}/{score['suite']}/{score['task']}/{score['metric']}" + (f"/{length}" if length else "")
                found |= {name: score["value"], name + ERROR: score.get("stderr")}
    return found


def _model(cell: Cell) -> ModelConfig | None:
    """Shape of a cell's student: of what was trained, else of what it would begin with."""
    train = cell.last.train
    start = str(cell.last.model) if train is None else train.model or train.scratch
    for folder in (cell.last.run / "model", Path(start or "")):
        if (folder / "hylo.json").is_file():
            return folder_shape(folder / "hylo.json")
    if cell.upcycle:
        return student_shape(cell.upcycle)
    chained = len(cell.stages) > 1
    first = cell.stages[0].train
    start = first.model or first.scratch if chained and first else start
    return shape(start) if start else None


def _seconds(run: Run) -> float:
    """Seconds of training over all starts of a run, each to its last record."""
    starts = [seconds_of(start["time"]) for start in run.starts]
    times = [record["time"] for record in run.records if "time" in record]
    spans = zip(starts, [*starts[1:], math.inf])
    return sum(max(0.0, max((t for t in times if begun <= t < end), default=begun) - begun) for begun, end in spans)


def _last(run: Run) -> dict[str, float]:
    """Newest value of every metric; none where that is not finite, since an older one would hide it."""
    found: dict[str, float] = {}
    for record in run.records:
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = float(value)
    return {name: value for name, value in found.items() if name not in ("step", "time", "tokens") and math.isfinite(value)}
