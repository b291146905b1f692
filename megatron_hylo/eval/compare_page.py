"""Comparison of models as an HTML page and as rows of tables: the paper's table, differences over the same examples."""

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import short_names
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.eval.compare import SUITES, Difference, Row
from megatron_hylo.eval.page import cell, details, paragraph, section, table, write_page
from megatron_hylo.eval.plots import draw_differences, draw_svg
from megatron_hylo.eval.results import EvalResult
from megatron_hylo.eval.results_page import (
    BY_POSITION,
    INTERVAL_NOTE,
    by_length_chart,
    headline,
    is_share,
    recall_charts,
    row_name,
    shown_interval,
    shown_value,
)

VERDICTS = {True: "better", False: "worse", None: "no difference seen"}
PAIRED_NOTE = (
    "Over the examples that both models were asked: the same name, task, length, depth, right answer and text. Parts of "
    "examples in percentage points, perplexities in per cent of the baseline's. Better or worse: the 95 % interval leaves out "
    "0, as that of one in twenty rows without any difference does by chance."
)


def model_names(folders: Sequence[Path], results: Sequence[EvalResult]) -> list[str]:
    """Names of the models, or of the results folders where two models have the same or one has none."""
    names = [str(result.model.get("name") or "") for result in results]
    return names if all(names) and len(set(names)) == len(names) else short_names(folders)


def write_comparison(
    output: Path, names: Sequence[str], results: Sequence[EvalResult], rows: Sequence[Row], folders: Sequence[Path]
) -> Path:
    """Write a page that compares models.

    Args:
        output: .html file to write.
        names: of the models, the baseline's first.
        results: their evaluations.
        rows: of `compare`.
        folders: the results folders.

    Returns:
        The file.

    Raises:
        ConfigError: output is a folder.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file, e.g. {output / 'compare.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    main = headline(rows)
    parts = [
        paragraph(f"Baseline: {names[0]}. Results of {', '.join(map(str, folders))}.", muted=True),
        section(
            "Quality and cache", table(["", *names], [*size_rows(results), *value_rows(main)]) + paragraph(INTERVAL_NOTE, True)
        ),
        *_warnings(names, results),
        *_length_charts(names, main),
        section("Differences from the baseline", _differences(names, main)),
        *_by_position(names, rows),
        *_recall(names, results),
        *_tasks(names, rows, main),
        section("Models", details("hashes, settings, versions", _facts(names, results))),
    ]
    return write_page(output, f"Comparison: {', '.join(names)}", parts)


def size_rows(results: Sequence[EvalResult]) -> list[list[str]]:
    """Rows of the cache and the parameters, where known."""
    found = []
    for title, key, scale, form, unit in (
        ("KV cache, % of the teacher's", "kv_percent", 1.0, ".1f", ""),
        ("parameters", "parameters", 1e6, ",.0f", " M"),
    ):
        values = [result.model.get(key) for result in results]
        if any(value is not None for value in values):
            found.append([title, *("-" if v is None else f"{v / scale:{form}}{unit}" for v in values)])
    return found


def value_rows(rows: Sequence[Row]) -> list[list[str]]:
    """A row for each quantity: its name, and each model's value with its interval."""
    found = []
    for row in rows:
        cells = [f"{shown_value(row, value)} {shown_interval(row, value)}".strip() for value in row.values]
        found.append([row_name(row) + (", %" if is_share(row) else ""), *cells])
    return found


def difference_rows(names: Sequence[str], rows: Sequence[Row]) -> list[list[str]]:
    """A row for each quantity and each model after the first, with the columns of DIFFERENCE_HEAD."""
    found = []
    for row in rows:
        for name, difference in list(zip(names, row.differences))[1:]:
            if difference is None:
                if any(value is not None for value in row.values[1:]) and row.values[0] is not None:
                    same = "other tasks, or no example" if row.quantity.is_mean else "no example"
                    found.append([row_name(row), name, "-", f"{same} is known to be the same", "", "0", ""])
                continue
            value, low, high = _in_points(row, difference)
            interval = "" if low is None or high is None else f"[{low:+.1f},\u00a0{high:+.1f}]"
            left_out = difference.only_baseline + difference.only_model
            few = "too few examples" if math.isfinite(value) else "no number"
            verdict = VERDICTS[difference.better] if interval else few
            unit = " %" if row.quantity.is_ratio else ""
            found.append(
                [row_name(row), name, f"{value:+.1f}{unit}", verdict, interval, f"{difference.examples:,}", f"{left_out:,}"]
            )
    return found


DIFFERENCE_HEAD = ("", "model", "difference", "verdict", "95 % interval", "pairs", "not paired")


WORDS = ("model", "verdict")  # columns of these


def differently_measured(names: Sequence[str], results: Sequence[EvalResult]) -> list[str]:
    """Sentences on what was not the same when the models were measured: suites' settings, seed, dtype, version of lm-eval."""
    every = [
        flatten(
            {name: run.get(name) for name in ("seed", "dtype")}
            | {"lm-eval": (run.get("libraries") or {}).get("lm-eval"), "settings": run.get("settings") or {}}
        )
        for run in (result.run for result in results)
    ]
    keys = dict.fromkeys(key for found in every for key in found)
    said = []
    for key in keys:
        values = [json.dumps(found.get(key)) for found in every]
        if len(set(values)) > 1:
            told = ", ".join(f"{value} ({name})" for name, value in zip(names, values))
            said.append(f"measured differently: {key.removeprefix('settings.')} {told}")
    return said


def _in_points(row: Row, difference: Difference) -> tuple[float, float | None, float | None]:
    """Difference and interval in percentage points, per cent of the baseline, or the unit of the values."""

    def scaled(value: float | None) -> float | None:
        """Percentage points of a share, per cent from the logarithm of a ratio; other values stay."""
        if value is None:
            return None
        return 100 * math.expm1(value) if row.quantity.is_ratio else value * (100 if is_share(row) else 1)

    value = scaled(difference.value)
    assert value is not None, "a difference has a value"
    return value, scaled(difference.low), scaled(difference.high)


def _warnings(names: Sequence[str], results: Sequence[EvalResult]) -> Iterable[str]:
    if said := differently_measured(names, results):
        yield section("Measured differently", "".join(paragraph(sentence.partition(": ")[2]) for sentence in said))


def _length_charts(names: Sequence[str], rows: Sequence[Row]) -> Iterable[str]:
    for suite in ("ruler", "recall"):
        chosen = [row for row in rows if row.quantity.suite == suite and row.quantity.length and row.quantity.is_mean]
        if len(chosen) > 1:
            yield section(f"{SUITES[suite]} by length", by_length_chart(chosen, names, "per cent right, mean of tasks"))


def _differences(names: Sequence[str], rows: Sequence[Row]) -> str:
    body = table(DIFFERENCE_HEAD, difference_rows(names, rows), words=WORDS) + paragraph(PAIRED_NOTE, muted=True)
    chosen = [row for row in rows if (is_share(row) or row.quantity.is_ratio) and any(row.differences)]
    if len(chosen) < 2:
        return body
    drawn: dict[str, dict[str, Any]] = {}
    for row in chosen:
        for name, difference in zip(names, row.differences):
            if difference is not None:
                drawn.setdefault(name, {})[row_name(row, short=True)] = _in_points(row, difference)
    labels = [row_name(row, short=True) for row in chosen]
    draw = partial(draw_differences, rows=labels, differences=drawn, x_label=f"difference from {names[0]}, points or %")
    return draw_svg(draw, "Differences from the baseline, as in the table below", size=(8, 1.1 + 0.36 * len(labels))) + body


def _by_position(names: Sequence[str], rows: Sequence[Row]) -> Iterable[str]:
    chosen = [row for row in rows if row.quantity.task == BY_POSITION]
    if chosen:
        chart = by_length_chart(chosen, names, "perplexity", "up to this token of the text") if len(chosen) > 1 else ""
        yield section("Perplexity by position", chart + table(["", *names], value_rows(chosen)))


def _recall(names: Sequence[str], results: Sequence[EvalResult]) -> Iterable[str]:
    charts = [(f"{name}: {title}", chart) for name, result in zip(names, results) for title, chart in recall_charts(result)]
    charts.sort(key=lambda pair: pair[0].partition(": ")[2])  # the models' beside each other
    if charts:
        yield section("Recall by length and depth", "".join(details(title, chart) for title, chart in charts))


def _tasks(names: Sequence[str], rows: Sequence[Row], shown: Sequence[Row]) -> Iterable[str]:
    rest = [row for row in rows if not any(row is other for other in shown)]
    if rest:
        values = table(["", *names], value_rows(rest))
        differences = table(DIFFERENCE_HEAD, difference_rows(names, rest), words=WORDS)
        yield section("Single tasks", details("values", values) + details("differences from the baseline", differences))


def _facts(names: Sequence[str], results: Sequence[EvalResult]) -> str:
    every = [flatten({"model": result.model, "run": result.run}) for result in results]
    keys = dict.fromkeys(key for found in every for key in found)
    return table(["", *names], [[key, *(cell(found.get(key, "")) for found in every)] for key in keys], text=True)
