"""The quickstart's picture and its HTML page: held-out perplexity on the way to the teacher's, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from megatron_hylo.eval.page import code, escape, paragraph, section, table, write_page
from megatron_hylo.eval.plots import Curve, Theme, draw_curves, draw_png, draw_svg
from megatron_hylo.eval.runs import read_records


def plot_quickstart(summary: dict[str, Any], output: Path) -> Path:
    """Draw OUTPUT/quickstart.png out of the summary and the stages' metrics.jsonl.

    Args:
        summary: content of summary.json.
        output: the quickstart's run folder.
    """
    title = (
        f"Perplexity {summary['init_ppl']:,.1f} to {summary['distilled_ppl']:,.1f}; "
        f"KV cache {summary['kv_percent']:.0f} % of the teacher's"
    )
    return draw_png(output / "quickstart.png", lambda axes, theme: draw_quickstart(axes, theme, summary, output, title))


def draw_quickstart(axes: Axes, theme: Theme, summary: dict[str, Any], output: Path, title: str = "") -> None:
    """Draw held-out perplexity by training tokens, and the teacher's as a line.

    Args:
        axes, theme: to draw on.
        summary: content of summary.json.
        output: the quickstart's run folder.
        title: above the chart.
    """
    points, aligned = heldout_points(summary, output)
    tokens, values = [tokens for tokens, _ in points], [value for _, value in points]
    draw_curves(
        axes, theme, [Curve("hybrid", tokens, values, markers=True)], y_label="held-out perplexity (lower is better)",
        title=title, reference=("teacher", summary["teacher_ppl"]), zero=True,
    )  # fmt: skip
    for index, where in ((0, "left"), (-1, "right")):
        axes.annotate(
            f"{values[index]:,.1f}", points[index], xytext=(0, 8), textcoords="offset points", ha=where, color=theme.series[0],
            fontweight="bold",
        )  # fmt: skip
    axes.axvspan(-0.02 * tokens[-1], aligned, color=theme.grid, alpha=0.5, linewidth=0)
    for text, start, side in (("stage 1", 0, "left"), ("stage 2", aligned, "left")):
        axes.annotate(
            text, (start, 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points", ha=side,
            color=theme.muted,
        )  # fmt: skip
    axes.set_xlim(-0.02 * tokens[-1], tokens[-1] * 1.02)  # the first dot is whole


def heldout_points(summary: dict[str, Any], output: Path) -> tuple[list[tuple[int, float]], int]:
    """Held-out perplexity by training tokens of both stages, from before training on; and the tokens of stage 1.

    Args:
        summary: content of summary.json.
        output: the quickstart's run folder.
    """
    points: list[tuple[int, float]] = [(0, summary["init_ppl"])]
    before, ends = 0, []
    for stage in ("align", "distil"):
        records = read_records(output / stage)
        tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
        a_step = max(tokens.values()) / max(tokens)
        points += [(before + round(a_step * r["step"]), r["heldout_perplexity"]) for r in records if "heldout_perplexity" in r]
        before += max(tokens.values())
        ends.append(before)
    return points, ends[0]


def quality_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the table at the end: model, held-out perplexity, KL to the teacher, KV bytes a token."""
    kv, teacher_kv = f"{summary['kv_bytes_per_token']:,}", f"{summary['teacher_kv_bytes_per_token']:,}"
    start = "hybrid, calibrated" if summary["init"] == "calibrated" else "hybrid, initialised as in the paper"
    rows = [("teacher", f"{summary['teacher_ppl']:,.2f}", "0", teacher_kv)]
    for name, key in ((start, "init"), ("after stage 1", "aligned"), ("after stage 2", "distilled")):
        rows.append((name, f"{summary[key + '_ppl']:,.2f}", f"{summary[key + '_kl']:.3f}", kv))
    if summary["init"] == "calibrated":
        contrast = "for contrast: HyLo's own initialisation, untrained"
        kv = f"{summary['paper_kv_bytes_per_token']:,}"
        rows.append((contrast, f"{summary['paper_init_ppl']:,.2f}", f"{summary['paper_init_kl']:.3f}", kv))
    return rows


def next_commands(output: Path, program: str = "hylo") -> list[tuple[str, str]]:
    """List commands to try next, the last one for a model of one's own: (reason, command).

    Args:
        output: the quickstart's run folder.
        program: how `hylo` is called in this shell.
    """
    folder = shlex.quote(str(output))
    return [
        ("Continue another prompt", f'{program} generate {folder}/export "The Linux kernel is" --repetition_penalty 1.2'),
        ("Measure again", f"{program} evaluate {folder}/distil/model {folder}/data --teacher {folder}/teacher"),
        (
            "Measure recall, which perplexity hides and so little training does not bring back",
            f'{program} eval {folder}/distil/model --suite recall --data {folder}/data --lengths "[512]" --limit 8',
        ),
        ("See both stages' curves and settings", f"{program} report {folder}/align {folder}/distil"),
        ("Train longer from here", f"{program} quickstart --output {folder} --train_tokens 100000"),
        ("Mamba2 in place of Gated DeltaNet", f"{program} quickstart --linear mamba2"),
        ("Begin with a model and text of your own (docs/tutorial.md)", f"{program} convert MODEL_FOLDER models/teacher"),
    ]


def write_report(summary: dict[str, Any], prompt: str, output: Path, program: str = "hylo") -> Path:
    """Write OUTPUT/report.html: one self-contained page with the plot, the table, the generated text and next commands.

    Args:
        summary: content of summary.json.
        prompt: what the generated text continues.
        output: the quickstart's run folder.
        program: how `hylo` is called in this shell.
    """
    kv, teacher_kv = summary["kv_bytes_per_token"], summary["teacher_kv_bytes_per_token"]
    intro = paragraph(
        f"The teacher, {summary['teacher']}, became the hybrid {summary['layout']}: {summary['train_tokens']:,} training "
        f"tokens on {summary['device']}, {summary['seconds'] / 60:.1f} minutes in all. A token takes {kv:,} bytes of KV cache "
        f"in bf16 instead of {teacher_kv:,} ({summary['kv_percent']:.1f}\u00a0%)."
    )
    chart = draw_svg(
        lambda axes, theme: draw_quickstart(axes, theme, summary, output),
        f"Held-out perplexity falls from {summary['init_ppl']:,.1f} to {summary['distilled_ppl']:,.1f}; the teacher has "
        f"{summary['teacher_ppl']:,.1f}.",
    )
    quality = table(("", "held-out perplexity", "KL to teacher, nats a token", "KV bytes a token"), quality_rows(summary))
    measured = paragraph(
        f"Measured on {summary['heldout_tokens']:,} tokens of whole documents that were held out"
        + (", out of manuals from PyPI: figures of other text differ." if summary["text"] == "manuals" else ".")
    )
    text = f"<blockquote><span class=muted>{escape(prompt)}</span>{escape(summary['generated'])}</blockquote>"
    commands = "".join(paragraph(why) + code(line) for why, line in next_commands(output, program))
    return write_page(
        output / "report.html",
        "Quickstart: a Transformer became a hybrid",
        [
            intro,
            section("Held-out quality", chart + quality + measured),
            section("Text that the hybrid wrote", text),
            section("What to type next", commands),
        ],
    )
