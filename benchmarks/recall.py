"""Recall and perplexity by position of several models, through the suite of `hylo eval`, on one dataset's held-out text.

    python benchmarks/recall.py "[teacher=runs/teacher, YaRN by 8=runs/teacher:yarn8, hybrid=runs/hybrid]" runs/data
    python benchmarks/recall.py "[teacher=runs/teacher]" runs/data --lengths "[512]" --trials 10      # CPU, a minute

Examples are the same for all models. Lengths past a model's window are measured too. Prints the table and, last, one JSON
line; writes RESULTS.md and RESULTS.png, and with --folders a results folder a model for `hylo compare`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import device_name, draw_panels, free_memory, line, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.evaluation import Suite
from megatron_hylo.eval.lm import HyloLM
from megatron_hylo.eval.lm_facts import describe_model, describe_run
from megatron_hylo.eval.perplexity_positions import WINDOWS, run_by_position
from megatron_hylo.eval.recall import LENGTHS, TRIALS, run_recall
from megatron_hylo.eval.recall_text import RECALL_EVAL_TASKS
from megatron_hylo.eval.results import EvalResult, Score
from megatron_hylo.hf import HyloConfig
from megatron_hylo.io.environment import commit as commit_of_code
from megatron_hylo.io.progress import show_progress
from megatron_hylo.platform.distributed import session


def main(
    models: list[str],
    data: Path,
    lengths: list[int] = list(LENGTHS),  # noqa: B006  jsonargparse shows it
    trials: int = TRIALS,
    windows: int = WINDOWS,
    generated: bool = False,
    seed: int = 1234,
    results: Path = Path("benchmarks/results/recall_suite"),
    folders: Path | None = None,
    commit: str | None = None,
) -> None:
    """Measure models one after another.

    Args:
        models: each LABEL=PATH, or LABEL=PATH:yarnFACTOR for its rotary positions stretched by YaRN at inference.
        data: dataset folder made by `hylo preprocess`, or text files.
        lengths: tokens of texts, and ends of the buckets of positions.
        trials: questions for each task and length.
        windows: texts for perplexity by position; 0: not measured.
        generated: let the models write their answers.
        seed: of the examples.
        results: path without suffix of the .md and .png to write.
        folders: folder for results folders of the models.
        commit: of the code; asked of git by default.
    """
    found = []
    with session():
        for spec in models:
            label, _, path = spec.partition("=")
            result = measure(path, data, lengths, trials, windows, generated, seed)
            result.model["name"] = label
            if folders is not None:
                folders.mkdir(parents=True, exist_ok=True)
                result.write(folders / "".join(c if c.isalnum() else "_" for c in label), overwrite=True)
            found.append(result)
            free_memory()
    show(found, lengths, trials, results, commit or commit_of_code() or "unknown")


def measure(path: str, data: Path, lengths: list[int], trials: int, windows: int, generated: bool, seed: int) -> EvalResult:
    """Scores of one model; the seconds of the recall suite are in its run."""
    path, _, factor = path.partition(":yarn")
    started = time.time()
    lm = HyloLM(path)
    if factor:
        lm = HyloLM(stretched(lm.model, float(factor)), lm.tokenizer)
    start = time.perf_counter()
    scores, samples = run_recall(lm, lengths, trials=trials, data=data, generated=generated, seed=seed, track=show_progress)
    seconds = time.perf_counter() - start
    if windows:
        more = run_by_position(lm, lengths, windows, data=data, seed=seed, track=show_progress)
        scores, samples = scores + more[0], samples + more[1]
    settings = dict(lengths=lengths, trials=trials, windows=windows, generated=generated, seed=seed, yarn=factor or None)
    run = describe_run(lm, settings, started) | {"recall_seconds": seconds}
    return EvalResult(describe_model(path, lm), run, scores, samples)


def stretched(model: Any, factor: float) -> Any:
    """The model with rotary positions stretched by YaRN from its own window to `factor` times that; weights are shared."""
    config = type(model.config).from_dict(model.config.to_dict())
    window = config.max_position_embeddings
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}
    if isinstance(config, HyloConfig):
        for name in ("rope_scaling", "mla_rope_scaling"):
            config.hylo[name] = config.hylo[name] | yarn
        config.hylo["max_position_embeddings"] = int(window * factor)
    else:
        base = config.rope_parameters["rope_theta"]
        config.rope_parameters = yarn | {"rope_theta": base}
    config.max_position_embeddings = int(window * factor)
    made = type(model)(config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    return made.to(model.device).eval()


def show(found: list[EvalResult], lengths: list[int], trials: int, results: Path, commit: str) -> None:
    """Table, results file, JSON line."""
    columns = ("model", "KV %", "measure", *(f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths), "seconds")
    rows = []
    for name, suite, task, metric in (
        *((task, "recall", task, "exact") for task in RECALL_EVAL_TASKS),
        ("all five needles", "recall", "several_needles", "all"),
        ("perplexity up to there", "ppl", "by_position", "perplexity"),
    ):
        for result in found:
            by_length = {s.length: s for s in result.select(suite, task) if s.metric == metric and s.depth is None}
            if by_length:
                percent, seconds = result.model["kv_percent"], f"{result.run['recall_seconds']:.0f}"
                cells = [cell(by_length.get(length)) for length in lengths]
                rows.append((
                    result.model["name"], "" if percent is None else f"{percent:.1f}", name, *cells,
                    seconds if task == "passkey" else "",
                ))  # fmt: skip
    first = found[0]
    notes = {s.note for result in found for s in result.scores if s.depth is None and s.note and s.note[:4] != "past"}
    intro = [
        f"Part of {trials} five-digit numbers hidden in held-out text that come back whole, plus or minus the standard error "
        "(which counts texts), by the length of text, question and answer; over depths 0, .25, .5, .75 and 1. Perplexity is of "
        "the tokens between the length before and this one, in the same texts at all lengths. Seconds: of recall, all "
        "tasks and lengths.",
        *sorted(f"{note[0].upper()}{note[1:]}." for note in notes),
    ]
    how = f"commit {commit}, {device_name()}, {first.run['dtype']}, seed {first.run['seed']}"
    report(results, "Recall by length", intro, columns, rows, how)
    draw(found, results.with_suffix(".png"))
    measured = [
        {"model": r.model, "recall_seconds": r.run["recall_seconds"], "scores": [asdict(s) for s in r.scores]} for r in found
    ]
    print(json.dumps({"benchmark": "recall", "device": device_name(), "commit": commit, "models": measured}))


def draw(found: list[EvalResult], file: Path) -> None:
    """Passkey by length with standard errors, and perplexity by position where it was measured, a line a model."""

    def panel(suite: Suite, task: str, metric: str, title: str) -> Callable[[Axes], None]:
        def plot(axes: Axes) -> None:
            for number, result in enumerate(found):
                scores = [s for s in result.select(suite, task) if s.metric == metric and s.depth is None and s.length]
                scores.sort(key=lambda score: score.length or 0)
                if scores:
                    errors = [score.stderr or 0.0 for score in scores] if suite == "recall" else None
                    axes.errorbar(
                        [score.length or 0 for score in scores], [score.value for score in scores], errors, capsize=2,
                        label=result.model["name"], **line(number),
                    )  # fmt: skip
            lengths = sorted({score.length for r in found for score in r.scores if score.length})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths], minor=False)
            axes.set(title=title, xlabel="tokens")
            axes.legend()

        return plot

    panels = [panel("recall", "passkey", "exact", "passkey: part that comes back whole")]
    if any(score for result in found for score in result.select("ppl", "by_position")):
        panels.append(panel("ppl", "by_position", "perplexity", "perplexity of the tokens up to there"))
    draw_panels(file, *panels, size=(5.5 * len(panels), 4))


def cell(score: Score | None) -> str:
    """A score with its standard error."""
    if score is None:
        return ""
    return f"{score.value:,.2f}" + (f" ± {score.stderr:.2f}" if score.stderr is not None else "")


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
