"""HTML page about one results folder: the model, its scores with errors, recall by length and depth, single examples."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hylo.config.train_settings import flatten
from megatron_hylo.eval.compare import SUITES, Estimate, Row, compare
from megatron_hylo.eval.page import blockquote, details, escape, paragraph, section, table, write_page
from megatron_hylo.eval.plots import draw_buckets, draw_heat_map, draw_svg, heat_map_size
from megatron_hylo.eval.results import EvalResult, Sample, Score, Suite, read_results

REPORT = "report.html"
BY_POSITION = "by_position"  # task of perplexities whose length is the end of their part of the text
SHOWN = 3  # examples of each task that were right, and as many that were wrong
CHARACTERS = 600  # of a text of an example
INTERVAL_NOTE = (
    "Intervals hold 95 %: Wilson's for parts of one task's examples that are right, else Student's t of the standard error. "
    "Questions about one text and windows of one document count once; the tasks of a mean are taken to be independent. "
    "Recall and RULER at a length are means of their tasks."
)


def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html about the results folder FOLDER.

    Returns:
        The file.

    Raises:
        ConfigError: the folder is no results folder.
    """
    result = read_results(folder)
    rows = compare([result])
    parts = [
        _about(result),
        section("Results", summary_table(rows)),
        *_recall(result),
        *_ruler(result, rows),
        *_by_position(rows),
        *_tasks(rows),
        *_examples(result.samples),
        section("How it was measured", details("command, versions, devices, settings", _facts(flatten(result.run)))),
    ]
    return write_page(Path(folder) / REPORT, f"Evaluation of {result.model.get('name') or 'a model'}", parts)


def headline(rows: Sequence[Row]) -> list[Row]:
    """Rows of the paper's table: means of suites that have one, else their tasks; perplexity, but not by position."""
    means = {row.quantity.suite for row in rows if row.quantity.is_mean}
    return [
        row for row in rows if (row.quantity.is_mean or row.quantity.suite not in means) and row.quantity.task != BY_POSITION
    ]


def row_name(row: Row, short: bool = False) -> str:
    """A row's quantity in words, e.g. "RULER 4K" or "Common sense, mean".

    Args:
        row: of a comparison.
        short: leave out the metric.
    """
    quantity = row.quantity
    task = "" if quantity.task in ("mean", quantity.suite) else f" {quantity.task}"
    if quantity.is_mean and not quantity.length:
        task = ", mean"
    length = f" {length_name(quantity.length)}" if quantity.length else ""
    if quantity.task == BY_POSITION:
        task, length = " by position", f", to {length_name(quantity.length)}"
    metric = "" if short or quantity.is_mean or quantity.is_ratio else f" ({quantity.metric})"
    return f"{SUITES[quantity.suite]}{task}{length}{metric}"


def length_name(length: int) -> str:
    """A number of tokens as people write it: 4K of 4096, 1,000 of 1000."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length >= size and length % (size // 2) == 0:
            return f"{length / size:g}{unit}"
    return f"{length:,}"


def is_share(row: Row) -> bool:
    """Whether a row's values are parts of 1, shown in per cent."""
    return row.higher_is_better and all(value is None or 0 <= value.value <= 1 for value in row.values)


def shown_value(row: Row, value: Estimate | None) -> str:
    """A value as the tables show it, in per cent for parts of 1."""
    if value is None:
        return "-"
    return f"{100 * value.value:.1f}" if is_share(row) else f"{value.value:,.2f}"


def _unit(row: Row) -> str:
    return "\u00a0%" if is_share(row) else ""


def shown_interval(row: Row, value: Estimate | None) -> str:
    """Ends of an interval in brackets; empty where there is none."""
    if value is None or value.low is None or value.high is None:
        return ""
    scale, form = (100, ".1f") if is_share(row) else (1, ",.2f")
    return f"[{scale * value.low:{form}},\u00a0{scale * value.high:{form}}]"  # is not broken over two lines


def summary_table(rows: Sequence[Row]) -> str:
    """Table of one model's headline rows, with units, intervals and notes."""
    cells = []
    for row in headline(rows):
        (value,) = row.values
        unit = _unit(row)
        error = "" if value is None or value.stderr is None else f"{(100 if unit else 1) * value.stderr:,.2f}"
        count = f"{value.examples:,}" if value else ""
        cells.append(
            (row_name(row), f"{shown_value(row, value)}{unit}", error, shown_interval(row, value), count, "; ".join(row.notes))
        )
    head = ("", "value", "standard error", "95 % interval", "examples", "note")
    return table(head, cells, words=("note",)) + paragraph(INTERVAL_NOTE, muted=True)


def _about(result: EvalResult) -> str:
    model, run = result.model, result.run
    kv, size = model.get("kv_percent"), model.get("parameters")
    facts = {
        "model": model.get("path"),
        "kind": model.get("kind"),
        "parameters": f"{size / 1e6:,.0f} M" if isinstance(size, (int, float)) else None,
        "KV cache": f"{kv:.1f} % of the teacher's" if isinstance(kv, (int, float)) else None,
        "sha256": model.get("hash"),
        "measured": run.get("time"),
        "took": f"{run['seconds'] / 60:.1f} minutes" if isinstance(run.get("seconds"), (int, float)) else None,
        "seed": run.get("seed"),
        "dtype": run.get("dtype"),
        "version": " ".join(str(run[name]) for name in ("version", "commit") if run.get(name)) or None,
    }
    return _facts({name: value for name, value in facts.items() if value is not None})


def _facts(values: dict[str, Any]) -> str:
    return table(("", ""), [(name, str(value)) for name, value in values.items()], text=True, plain=True)


def _by_depth(scores: Iterable[Score]) -> list[Score]:
    return [score for score in scores if score.depth is not None and score.length is not None]


def recall_charts(result: EvalResult) -> Iterable[tuple[str, str]]:
    """A heat map over lengths and depths for each task of the recall suite: (title, chart)."""
    found = _by_depth(result.select("recall"))
    for task, metric in dict.fromkeys((score.task, score.metric) for score in found):
        scores = [score for score in found if (score.task, score.metric) == (task, metric)]
        lengths, depths = sorted({s.length or 0 for s in scores}), sorted({s.depth or 0.0 for s in scores})
        cells = {(length_name(s.length or 0), f"{s.depth or 0.0:.0%}"): s.value for s in scores}
        if len(cells) < 2:
            continue
        draw = partial(
            draw_heat_map, columns=[length_name(n) for n in lengths], rows=[f"{d:.0%}" for d in depths], shares=cells,
            x_label="tokens of the text", y_label="depth of the fact",
        )  # fmt: skip
        said = ", ".join(f"{length} at {depth}: {100 * value:.0f} %" for (length, depth), value in cells.items())
        title = f"Recall, {task.replace('_', ' ')}: per cent {'right' if metric == 'exact' else metric}"
        yield title, draw_svg(draw, f"{title}. {said}", size=heat_map_size(len(lengths), len(depths), 0.42))


def _recall(result: EvalResult) -> Iterable[str]:
    for title, chart in recall_charts(result):
        yield section(title, chart)


def _ruler(result: EvalResult, rows: Sequence[Row]) -> Iterable[str]:
    scores = [score for score in result.select("ruler") if score.length]
    tasks = list(dict.fromkeys(score.task for score in scores if score.task != "mean"))
    names = [*tasks, *(["mean"] if any(score.task == "mean" for score in scores) else [])]
    if not names:
        return
    lengths = sorted({score.length or 0 for score in scores})
    cells = {(length_name(score.length or 0), score.task): score.value for score in scores}
    draw = partial(
        draw_heat_map, columns=[length_name(n) for n in lengths], rows=names, shares=cells, x_label="tokens", y_label=""
    )
    said = "; ".join(f"{task} at {length} {100 * value:.0f} %" for (length, task), value in cells.items())
    yield section("RULER, per cent", draw_svg(draw, f"RULER: {said}", size=heat_map_size(len(lengths), len(names), 0.34)))


def _by_position(rows: Sequence[Row]) -> Iterable[str]:
    chosen = [row for row in rows if row.quantity.task == BY_POSITION]
    if len(chosen) > 1:
        yield section("Perplexity by position", by_length_chart(chosen, [""], "perplexity", "up to this token of the text"))


def by_length_chart(rows: Sequence[Row], names: Sequence[str], y_label: str, x_label: str = "tokens") -> str:
    """Chart of the same quantity at several lengths, a curve with intervals for each model.

    Args:
        rows: one a length.
        names: of the models.
        y_label, x_label: of the axes.
    """
    rows = sorted(rows, key=lambda row: row.quantity.length)
    scale = 100 if all(map(is_share, rows)) else 1
    buckets = [length_name(row.quantity.length) for row in rows]
    curves: dict[str, dict[str, float]] = {name: {} for name in names}  # a model without values keeps its colour
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for index, name in enumerate(names):
        for bucket, row in zip(buckets, rows):
            if value := row.values[index]:
                curves[name][bucket] = scale * value.value
                if value.low is not None and value.high is not None:
                    intervals.setdefault(name, {})[bucket] = (scale * value.low, scale * value.high)
    draw = partial(
        draw_buckets, buckets=buckets, curves=curves, y_label=y_label, x_label=x_label, intervals=intervals,
        limits=(-3, 103) if scale == 100 else None,
    )  # fmt: skip
    said = "; ".join(
        f"{name} " + ", ".join(f"{b}: {v:.4g}" for b, v in values.items()) for name, values in curves.items() if values
    )
    return draw_svg(draw, f"{y_label}, {said}", size=(8, 3.4))


def _tasks(rows: Sequence[Row]) -> Iterable[str]:
    shown = {id(row) for row in headline(rows)}
    for suite, name in SUITES.items():
        rest = [row for row in rows if row.quantity.suite == suite and id(row) not in shown]
        if rest:
            cells = []
            for row in rest:
                (value,) = row.values
                count = f"{value.examples:,}" if value else ""
                interval, note = shown_interval(row, value), "; ".join(row.notes)
                cells.append((row_name(row), shown_value(row, value) + _unit(row), interval, count, note))
            body = table(("", "value", "95 % interval", "examples", "note"), cells, words=("note",))
            yield section(f"Tasks of {name}", details(f"{len(rest)} values", body))


def _examples(samples: Sequence[Sample]) -> Iterable[str]:
    by_task: dict[tuple[Suite, str, str], list[Sample]] = {}
    for sample in samples:
        if sample.prompt_end or sample.expected or sample.output:
            by_task.setdefault((sample.suite, sample.task, sample.metric), []).append(sample)
    parts = []
    for (suite, task, metric), found in by_task.items():
        right = [sample for sample in found if sample.score >= 1]
        wrong = [sample for sample in found if sample.score < 1]
        title = f"{SUITES[suite]} {task} ({metric}): {len(right):,} of {len(found):,} right"
        parts.append(details(title, "".join(_example(sample) for sample in [*wrong[:SHOWN], *right[:SHOWN]])))
    if parts:
        note = f"Up to {SHOWN} that were wrong and {SHOWN} that were right of each task; all are in samples.jsonl."
        yield section("Examples", "\n".join(parts) + paragraph(note, muted=True))


def _example(sample: Sample) -> str:
    place = [
        f"{sample.length:,} tokens" if sample.length else "",
        f"depth {sample.depth:.0%}" if sample.depth is not None else "",
    ]
    about = ", ".join(part for part in (sample.example, *place, f"score {sample.score:g}") if part)
    answer = sample.output or ("the expected one" if sample.score >= 1 else "not recorded: its likelihood was measured")
    lines = [("expected", sample.expected), ("answer", answer)]
    body = "".join(f"<p><span class=muted>{label}</span> {escape(text[:CHARACTERS])}</p>" for label, text in lines if text)
    mark = "right" if sample.score >= 1 else "wrong"
    prompt = blockquote(f"... {sample.prompt_end[-CHARACTERS:]}") if sample.prompt_end else ""
    return f'<div class="example {mark}"><p><b>{mark}</b> <span class=muted>{escape(about)}</span></p>{prompt}{body}</div>'
