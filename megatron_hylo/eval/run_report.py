"""One HTML page about training runs: curves, held-out quality, settings that differ, environment, provenance.

Only files of the run folders are read: config.json, metrics.jsonl, history.json, starts.jsonl and model/hylo.json. What
a run does not have, such as the model of one that is not finished, is left out of the page.
"""

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import short_names
from megatron_hylo.eval.page import cell, details, paragraph, section, table, write_page
from megatron_hylo.eval.plots import Curve, draw_buckets, draw_curves, draw_svg, short_number
from megatron_hylo.eval.runs import Run, differing, read_run, run_folders, run_state

CHARTS = (  # metric, quantity and unit, whether single points are marked
    ("heldout_perplexity", "held-out perplexity", True),
    ("heldout_kl", "held-out KL to the teacher, nats a token", True),
    ("loss", "training loss", False),
    ("kl", "KL to the teacher in training, nats a token", False),
    ("cross_entropy", "cross-entropy in training, nats a token", False),
    ("heldout_recall_accuracy", "accuracy of held-out recall answers' tokens", True),
    ("heldout_recall_cross_entropy", "cross-entropy of held-out recall answers, nats a token", True),
    ("answer_cross_entropy", "cross-entropy of recall answers in training, nats a token", False),
    ("gradient_norm", "gradient norm", False),
    ("tokens_per_second", "tokens/s", False),
)
BUCKET_CHARTS = (  # start of the metrics' names, quantity and unit, what the buckets are of
    ("heldout_by_position/cross_entropy_", "held-out cross-entropy by position, nats a token", "position in the sequence"),
    ("heldout_by_position/kl_", "held-out KL to the teacher by position, nats a token", "position in the sequence"),
    (
        "heldout_recall_by_distance/cross_entropy_", "cross-entropy of held-out recall answers by distance, nats a token",
        "tokens between fact and answer",
    ),
    (
        "heldout_recall_by_distance/accuracy_", "accuracy of held-out recall answers' tokens by distance",
        "tokens between fact and answer",
    ),
    ("by_position/cross_entropy_", "cross-entropy in training by position, nats a token", "position in the sequence"),
    ("by_position/kl_", "KL to the teacher in training by position, nats a token", "position in the sequence"),
)  # fmt: skip
AVERAGED = 20  # logged steps of training that a point is the mean of: one has about 2,048 tokens a rank


def write_run_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page about run folders, or about the runs inside a folder.

    Args:
        folders: run folders of `hylo train`, or folders whose sub-folders are such.
        output: file to write; None: report.html in the folder given, beside the first of several.

    Returns:
        The file.

    Raises:
        ConfigError: a folder holds no run, or output is a folder.
    """
    found = [run for folder in folders for run in run_folders(folder)]
    if output is None:
        output = (folders[0] if len(folders) == 1 else Path(os.path.abspath(folders[0])).parent) / "report.html"
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file, e.g. {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = [read_run(folder, name) for folder, name in zip(found, short_names(found))]
    parts = [
        paragraph(f"Written {time.strftime('%Y-%m-%d %H:%M:%S %z')} from {', '.join(os.path.abspath(run) for run in found)}."),
        section("Runs" if len(runs) > 1 else "Run", _summary(runs)),
        *(section(title, chart) for title, chart in _charts(runs)),
        *(section(title, chart) for title, chart in _bucket_charts(runs)),
        section("Settings that differ" if len(runs) > 1 else "Settings", _settings(runs)),
        *_changes(runs),
        *_environment(runs),
        *_provenance(runs),
    ]
    names = ", ".join(run.name for run in runs)
    return write_page(output, f"Training run{'s' if len(runs) > 1 else ''}: {names}", parts)


def _summary(runs: Sequence[Run]) -> str:
    head = (
        "run",
        "stage",
        "state",
        "step",
        "tokens",
        "tokens/s",
        "held-out perplexity",
        "KL to teacher",
        "agreement",
        "peak GiB",
    )
    rows = []
    for run in runs:
        step, total = run.step, run.total_steps
        rates = sorted(r["tokens_per_second"] for r in run.records if r.get("tokens_per_second"))
        agreement, peak = run.last("heldout_agreement"), run.last("peak_memory_gib")
        rows.append(
            (
                run.name, str(run.config.get("stage", "")), run_state(run)[0],
                f"{step:,} of {total:,}" if total else f"{step:,}", short_number(float(f"{step * run.tokens_per_step:.3g}")),
                _number(rates[len(rates) // 2] if rates else None), _number(run.last("heldout_perplexity")),
                _number(run.last("heldout_kl")), "" if agreement is None else f"{100 * agreement:.1f} %",
                "" if peak is None else f"{peak:.1f}",
            )
        )  # fmt: skip
    return table(head, rows) + paragraph("Tokens/s is the median of the logged lines; held-out numbers are the newest.")


def _charts(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    names = dict.fromkeys(key for run in runs for record in run.records for key in record)
    for metric, quantity, markers in (*CHARTS, *_suite_charts(names)):
        if metric == "kl" and _same_as_loss(runs):
            continue
        for stage, members in _comparable(runs, metric):
            curves = [curve for run in members if (curve := _curve(run, metric, markers, runs.index(run)))]
            if any(len(curve.x) > 1 for curve in curves):  # a single evaluation is in the table
                title = quantity[0].upper() + quantity[1:] + (f", stage {stage}" if stage else "")
                draw = partial(draw_curves, curves=curves, y_label=_unit(quantity))
                ends = "; ".join(f"{c.label}: {c.y[0]:.4g} to {c.y[-1]:.4g}" for c in curves)
                yield title, draw_svg(draw, f"{title} by training tokens. {ends}", size=(8, 3.4))


def _suite_charts(names: Iterable[str]) -> Iterable[tuple[str, str, bool]]:
    """Charts of suites that were run in training, eval/SUITE/TASK/METRIC[/LENGTH]: of their means where they have some."""
    parts = [(name, name.split("/")) for name in names if name.startswith("eval/")]
    with_mean = {part[1] for _, part in parts if part[2] == "mean"}
    for name, (_, suite, task, metric, *length) in parts:
        if suite not in with_mean or task == "mean":
            yield name, f"{suite} {task} ({metric}){f' at {int(length[0]):,} tokens' if length else ''}", True


def _comparable(runs: Sequence[Run], metric: str) -> list[tuple[str, Sequence[Run]]]:
    """Runs that share a chart: all of them, but the loss of each stage is another quantity. (stage or "", runs)."""
    stages = list(dict.fromkeys(str(run.config.get("stage", "")) for run in runs))
    if metric != "loss" or len(stages) == 1:
        return [("", runs)]
    return [(stage, [run for run in runs if run.config.get("stage") == stage]) for stage in stages]


def _unit(quantity: str) -> str:
    """The unit of "quantity, unit": a chart's heading says the quantity."""
    return quantity.partition(", ")[2]


def _curve(run: Run, metric: str, markers: bool, number: int) -> Curve | None:
    """A metric by training tokens; None where the run has no number of it."""
    points = run.points(metric)
    return Curve(run.name, [x for x, _ in points], [y for _, y in points], markers, number) if points else None


def _bucket_charts(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    """Charts over buckets: the newest evaluation, or logged steps, of each run, of a single run the first beside it."""
    for start, quantity, x_label in BUCKET_CHARTS:
        found: dict[str, dict[str, float]] = {}  # label of a curve: bucket: value
        for run in runs:
            records = [(r["step"], values) for r in run.records if (values := _by_bucket(r, start))]
            size = 1 if start.startswith("heldout") else min(AVERAGED, max(1, len(records) // 2))
            parts = [records[-size:]] if len(runs) > 1 else [records[:size], records[-size:]]
            found |= {f"{run.name}, {_steps(part)}": _means(values for _, values in part) for part in parts if part}
        # buckets begin at ever later places, so that a longer run has them all in order
        buckets = sorted({bucket for values in found.values() for bucket in values}, key=_bucket_start)
        if len(buckets) > 1:
            draw = partial(draw_buckets, buckets=buckets, curves=found, y_label=_unit(quantity), x_label=x_label)
            ends = "; ".join(
                f"{label}: " + ", ".join(f"{bucket} {value:.4g}" for bucket, value in values.items())
                for label, values in found.items()
            )
            yield quantity[0].upper() + quantity[1:], draw_svg(draw, f"{quantity}. {ends}", size=(8, 3.4))


def _steps(records: Sequence[tuple[int, Any]]) -> str:
    """The steps of records in words: step 5, steps 5-100."""
    first, last = records[0][0], records[-1][0]
    return f"step {last:,}" if first == last else f"steps {first:,}-{last:,}"


def _means(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean of each bucket over the records that have it."""
    found: dict[str, list[float]] = {}
    for values in records:
        for bucket, value in values.items():
            found.setdefault(bucket, []).append(value)
    return {bucket: sum(values) / len(values) for bucket, values in found.items()}


def _by_bucket(record: dict[str, Any], start: str) -> dict[str, float]:
    """Values of a record by bucket; without those of further texts, whose names go on behind the bucket."""
    names = [name for name in record if name.startswith(start) and "/" not in name.removeprefix(start)]
    return {name.removeprefix(start): record[name] for name in names if isinstance(record[name], (int, float))}


def _bucket_start(bucket: str) -> int:
    low = bucket.split("-")[0]
    return int(low.removesuffix("K")) * (1024 if low.endswith("K") else 1)


def _same_as_loss(runs: Sequence[Run]) -> bool:
    """Whether the loss is the KL alone, so that one chart is enough."""
    return all(r.get("kl", r.get("loss")) == r.get("loss") for run in runs for r in run.records)


def _settings(runs: Sequence[Run]) -> str:
    head = ("setting", *(run.name for run in runs))
    every = table(head, _rows(dict.fromkeys(n for run in runs for n in run.config), [run.config for run in runs]), text=True)
    if len(runs) == 1:
        return details("all settings", every)
    names = differing(runs)
    shown = table(head, _rows(names, [run.config for run in runs]), text=True) if names else paragraph("None.")
    return shown + details("all settings", every)


def _changes(runs: Sequence[Run]) -> Iterable[str]:
    rows = [(run.name, *(f"{key}: {cell(value)}" for key, value in change.items())) for run in runs for change in run.changes]
    if rows:
        width = max(map(len, rows))
        yield section(
            "Changes between starts", table(("run", *[""] * (width - 1)), (_padded(r, width) for r in rows), text=True)
        )


def _environment(runs: Sequence[Run]) -> Iterable[str]:
    names = dict.fromkeys(name for run in runs for name in run.environment)
    if names:
        head = ("", *(run.name for run in runs))
        yield section(
            "Environment of the newest start", table(head, _rows(names, [run.environment for run in runs]), text=True)
        )


def _provenance(runs: Sequence[Run]) -> Iterable[str]:
    names = dict.fromkeys(name for run in runs for name in run.provenance)
    if names:
        head = ("", *(run.name for run in runs))
        body = table(head, _rows(names, [run.provenance for run in runs]), text=True)
        yield section("Where the models come from", details("provenance of RUN/model", body))


def _rows(names: Iterable[str], values: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(name, *(cell(value.get(name, "")) for value in values)) for name in names]


def _padded(row: tuple[str, ...], width: int) -> tuple[str, ...]:
    return (*row, *[""] * (width - len(row)))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
