"""The quickstart's picture: perplexities on the way, and what the cache costs."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_quickstart(summary: dict[str, Any], output: Path) -> Path:
    """Draw OUTPUT/quickstart.png out of the summary and the stages' metrics.jsonl.

    Args:
        summary: content of summary.json.
        output: the quickstart's run folder.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    shown = [("teacher", "teacher", "tab:gray"), ("paper's start", "paper_init", "tab:red")]
    shown += [("calibrated", "init", "tab:purple")] if summary["init"] == "calibrated" else []
    shown += [("stage 1", "aligned", "tab:orange"), ("stage 2", "distilled", "tab:green")]
    names, keys, colors = zip(*shown)
    values = [summary[f"{key}_ppl"] for key in keys]
    bars = left.bar(names, values, color=colors)
    left.bar_label(bars, [f"{v:,.1f}" for v in values])
    left.set(yscale="log", ylabel="held-out perplexity", title="Perplexity (whole documents held out)")
    for stage, color, quantity in (("align", "tab:orange", "loss"), ("distil", "tab:green", "kl")):
        records = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
        points = [(r["tokens"], r[quantity]) for r in records if quantity in r]
        first = points[0][1]
        label = f"{stage} ({quantity}, from {first:,.1f})"
        middle.plot([t for t, _ in points], [v / first for _, v in points], color=color, label=label)
    middle.set(xlabel="tokens", ylabel="loss / first loss", title="Training", yscale="log")
    middle.legend()
    kv = [summary["teacher_kv_bytes_per_token"], summary["kv_bytes_per_token"]]
    bars = right.bar(["teacher", "hybrid"], kv, color=["tab:gray", "tab:green"])
    right.bar_label(bars, [f"{v:,} B" for v in kv])
    right.set(ylabel="bytes a token, bf16", title=f"KV cache: {summary['kv_percent']:.1f}% of the teacher's")
    what = f"{summary['layout']}, {summary['train_tokens']:,} tokens on {summary['device']}"
    figure.suptitle(f"{what}; teacher {summary['teacher']}")
    file = output / "quickstart.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
