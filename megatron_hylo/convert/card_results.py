"""Results of a model card: tables of scores by length, how they were measured, entries for the Hugging Face Hub."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from megatron_hylo.config.evaluation import NEEDS_TEXT

ABSOLUTE_FOLDERS = re.compile(r"""(?<![^\s'"\[,=])/(?:[^\s/'",\]]+/)+""")  # all of a path but its last name
ROWS = 40  # of a table of results; results.json has all


def hub_result(result: Mapping[str, Any], score: Mapping[str, Any]) -> EvalResult:
    """Entry of the Hub for one score."""
    parts = [score["task"], str(score.get("length") or ""), _text(result, score)]
    config = " ".join(part for part in parts if part)  # what the Hub tells entries of one dataset type apart by
    return EvalResult(
        task_type="text-generation", dataset_type=score["suite"], dataset_name=f"{score['suite']} {config}",
        dataset_config=config, metric_type=score["metric"], metric_name=score["metric"], metric_value=score["value"],
    )  # fmt: skip


def _text(result: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    """Name of the dataset folder that a score of a suite on held-out text was measured on; empty of others."""
    data = result["run"].get("settings", {}).get("data") if score["suite"] in NEEDS_TEXT else None
    return Path(data).name if data else ""


def results_tables(scores: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """Return the paragraphs of (results.json, score) pairs: a row for a metric, a column for a length."""
    if not scores:
        return ["None were given. `hylo eval` measures them; `hylo export --results FOLDER` puts them here."]
    rows: dict[tuple[Any, ...], dict[int | None, Mapping[str, Any]]] = {}  # scores by length, None where a suite has none
    for result, score in scores:
        name, length = (score["suite"], score["task"], _text(result, score), score["metric"]), score.get("length")
        for number in count():  # two figures of one length have a row each, but one figure is not shown twice
            row = rows.setdefault((*name, number), {})
            if _value(row.setdefault(length, score)) == _value(score):  # as text, since no number is equal to NaN
                break
    lengths = sorted({length for row in rows.values() for length in row if length is not None})
    columns = ("suite", "task", "text", "metric")
    parts = []
    for heads, places in (([f"{length:,} tokens" for length in lengths], lengths), (["value"], [None])):
        found = {name: row for name, row in rows.items() if any(place in row for place in places)}
        cells = [
            (*name[:-1], *(_value(row.get(place)) for place in places), _examples(row.values()), _notes(row.values()))
            for name, row in found.items()
        ]
        if cells:
            parts += table((*columns, *heads, "examples", "notes"), cells[:ROWS])
        if len(cells) > ROWS:
            parts.append(f"{len(cells) - ROWS} more are in the results folder.")
    if any(_text(result, score) for result, score in scores):
        parts.append("A text is the held-out documents of a dataset, which its training text does not hold.")
    runs = dict.fromkeys(f"- {by}" for result, _ in scores if (by := _measured_by(result["run"])))
    return [*parts, "Measured by:", "\n".join(runs)] if runs else parts


def _value(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    value = score["value"]
    text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"  # a perplexity, say
    return text + ("" if score.get("stderr") is None else f" ± {score['stderr']:.2g}")


def _examples(scores: Iterable[Mapping[str, Any]]) -> str:
    counts = sorted({score["examples"] for score in scores})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _notes(scores: Iterable[Mapping[str, Any]]) -> str:
    """Notes of a row's scores; with their lengths where not all have the same one."""
    scores = list(scores)
    notes = dict.fromkeys(score.get("note", "") for score in scores)
    if len(notes) == 1:
        return next(iter(notes))
    return "; ".join(f"{score.get('length') or 0:,}: {score['note']}" for score in scores if score.get("note"))


def _measured_by(run: Mapping[str, Any]) -> str:
    """Command of an evaluation, paths by their last names; commit or else version, dtype, devices; of these what is known."""
    code = f"commit {run['commit']}" if run.get("commit") else f"version {run['version']}" if run.get("version") else ""
    devices = ", ".join(dict.fromkeys(run.get("devices") or ()))
    command = ABSOLUTE_FOLDERS.sub("", run.get("command") or "")
    return ", ".join(part for part in (f"`{command}`" if command else "", code, run.get("dtype", ""), devices) if part)


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table, in a list of one."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return ["\n".join(lines)]
