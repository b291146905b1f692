"""Scaling of stage 3 on paper: `hylo plan`'s search at 8 to 8,192 GPUs, and the bytes of context parallelism.

    python benchmarks/plan_scaling.py                             # no GPU; about ten minutes of one core; goes on where it was
    python benchmarks/plan_scaling.py --models [1B] --lengths [131072] --gpus [8,64,512]

Weak scaling: as many tokens a GPU and step at every size. Strong scaling: 4 Mi tokens a step, on more and more GPUs. Each point
is the fastest setting that fits, without FP8, so the way to divide changes along a curve. Nothing here was measured beyond
eight GPUs. Prints tables and, last, one JSON line; writes RESULTS.md, RESULTS.png and RESULTS_bytes.png.
"""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import draw_panels, line, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig
from megatron_hylo.config.layouts import BASES, LAYOUTS, hybrid_config, uniform_mixers
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import write_json
from megatron_hylo.plan.communication import context_bytes
from megatron_hylo.plan.hardware import get_hardware
from megatron_hylo.plan.job import Job
from megatron_hylo.plan.memory import GIB
from megatron_hylo.plan.search import search

LLAMA_70B = replace(
    BASES["llama3.1-8b"], hybrid_layer_pattern="*-" * 80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64
)


def hybrid(base: ModelConfig) -> ModelConfig:
    """One MLA layer in four, Gated DeltaNet elsewhere, the paper's dimensions."""
    layers = base.num_hidden_layers
    return hybrid_config(base, uniform_mixers(layers, layers // 4))


MODELS = {  # student, teacher
    "1B": (LAYOUTS["llama3.2-1b-4mla12gdn"].config, BASES["llama3.1-8b"]),
    "3B": (LAYOUTS["llama3.2-3b-6mla22gdn"].config, BASES["llama3.1-8b"]),
    "8B": (hybrid(BASES["llama3.1-8b"]), BASES["llama3.1-8b"]),
    "70B": (hybrid(LLAMA_70B), LLAMA_70B),
}
STRONG_TOKENS, WEAK_TOKENS = 4 * 2**20, 32_768  # of a step; of a step and GPU
COLUMNS = ("model", "tokens", "GPUs", "scaling", "settings", "s / step", "tokens/s a GPU", "MFU %", "peak GiB")


def main(
    models: list[str] = list(MODELS),  # noqa: B006
    lengths: list[int] = [8_192, 131_072, 1_048_576],  # noqa: B006
    gpus: list[int] = [8, 128, 1_024, 8_192],  # noqa: B006
    gpu: str = "h100-80gb",
    work: Path = Path("runs/plan_scaling"),
    results: Path = Path(__file__).parent / "results" / "plan_scaling",
) -> None:
    """Search at every point.

    Args:
        models: of 1B, 3B, 8B, 70B.
        lengths: tokens a sequence.
        gpus: numbers of GPUs.
        gpu: their kind.
        work: folder of points; what is there is not searched again.
        results: path without suffix of the files to write.
    """
    rows = []
    work.mkdir(parents=True, exist_ok=True)
    for kind in ("weak", "strong"):
        for model in models:
            for length in lengths:
                for number in gpus:
                    file = work / f"{gpu}-{kind}-{model}-{length}-{number}.json"
                    if not file.is_file():
                        tokens = STRONG_TOKENS if kind == "strong" else WEAK_TOKENS * number
                        write_json(file, dict(kind=kind) | (point(model, length, number, max(tokens // length, 1), gpu) or {}))
                    row = json.loads(file.read_text())
                    print(row, flush=True)
                    rows += [row] if "seconds" in row else []
    cells = [
        (r["model"], f"{r['length']:,}", f"{r['gpus']:,}", r["kind"], r["settings"], f"{r['seconds']:.2f}",
         f"{r['rate']:,.0f}", f"{r['mfu']:.1f}", f"{r['peak']:.1f}")
        for r in rows
    ]  # fmt: skip
    intro = [
        f"Fastest settings that `hylo plan` finds for stage 3 (a hybrid with one MLA layer in four, or as the paper's; teacher "
        f"Llama-3.1-8B, of 70B its base) on {gpu}, bf16. ESTIMATED: nothing beyond eight GPUs was measured, and bytes take "
        f"time by bandwidth alone: no latency, no congestion, no slow nodes. So weak scaling stays level past the first nodes, "
        f"and strong scaling is a bound from above. Weak: {WEAK_TOKENS:,} tokens a GPU and step, or one sequence; strong: "
        f"{STRONG_TOKENS:,} tokens a step. Missing rows: nothing fits, or more GPUs than the batch can be divided over.",
        "![MFU by GPUs](plan_scaling.png)",
        "Bytes that a rank receives from context-parallel ranks in the forward pass of one layer of the 8B hybrid:",
        "![bytes by context-parallel ranks](plan_scaling_bytes.png)",
    ]
    report(results, "Scaling on paper", intro, COLUMNS, cells, "no GPU")
    plot(rows, results.with_suffix(".png"))
    plot_bytes(results.with_name(f"{results.name}_bytes.png"))
    print(json.dumps({"benchmark": "plan_scaling", "gpu": gpu, "rows": rows}))


def point(model: str, length: int, gpus: int, batch: int, gpu: str) -> dict[str, Any] | None:
    """Fastest settings of a model on so many GPUs; None where none fits."""
    (student, teacher), hardware = MODELS[model], get_hardware(gpu)
    try:
        config = TrainConfig("distil", "-", "-", model="-", teacher="-", sequence_length=length, global_batch_size=batch,
                             loss_chunk_tokens=4096)  # fmt: skip
    except ConfigError:
        return None
    found = search(Job(model, config, student, teacher, model, "teacher"), gpus, hardware, keep=1, fp8=False)
    if not found.best:
        return None
    best, p = found.best[0], found.best[0].config.parallel
    sizes = {"TP": p.tensor_model_parallel_size, "PP": p.pipeline_model_parallel_size,
             "VPP": p.virtual_pipeline_model_parallel_size, "CP": p.context_parallel_size,
             "DP": gpus // p.model_parallel_size}  # fmt: skip
    words = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
    words += f", recompute {best.config.recompute}" if best.config.recompute else ""
    words += ", all-gather" if p.cp_comm_type == "all_gather" else ""
    words += ", teacher offloaded" if best.config.teacher_offload else ""
    words += ", optimizer offloaded" if best.config.optimizer.offload else ""
    return dict(
        model=model, length=length, gpus=gpus, batch=batch, settings=words, seconds=best.time.seconds,
        rate=best.tokens_per_second / gpus, mfu=100 * best.time.flops / best.time.seconds / gpus / hardware.peak(),
        peak=best.memory.total / GIB, terms=best.time.terms,
    )  # fmt: skip


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw MFU by number of GPUs, weak beside strong."""

    def panel(axes: Axes, kind: str) -> None:
        mine = [row for row in rows if row["kind"] == kind]
        for number, (model, length) in enumerate(dict.fromkeys((r["model"], r["length"]) for r in mine)):
            points = [(r["gpus"], r["mfu"]) for r in mine if (r["model"], r["length"]) == (model, length)]
            axes.plot(*zip(*points), label=f"{model}, {length // 1024}K", **line(number))
        axes.set(xscale="log", xlabel="GPUs", ylabel="MFU, % (model FLOPs; predicted)", ylim=(0, None))
        axes.set_title(f"{kind} scaling")
        axes.legend(fontsize=7, ncols=2)

    draw_panels(file, lambda axes: panel(axes, "weak"), lambda axes: panel(axes, "strong"), size=(11, 5))


def ring_bytes(config: ModelConfig, tokens: float, ranks: int) -> float:
    """Bytes of ring attention: every rank's keys and values pass by every other (arXiv:2310.01889); bf16."""
    return 2 * (ranks - 1) * tokens * 2 * config.num_query_groups * config.kv_channels


def plot_bytes(file: Path, length: int = 1_048_576) -> None:
    """Draw what a rank receives by context-parallel size: attention by ring and all-to-all, MLA and linear layers both ways."""
    student, teacher = MODELS["8B"]
    sizes = [2, 4, 8, 16, 32, 64]

    def received(config: ModelConfig, symbol: str, ranks: int, method: Any) -> float:
        return context_bytes(
            config, symbol, length / ranks, 1, ParallelConfig(context_parallel_size=ranks, cp_comm_type=method)
        )

    def panel(axes: Axes) -> None:
        curves = {
            "attention, ring": lambda n: ring_bytes(teacher, length / n, n),
            "attention, all-to-all": lambda n: received(teacher, "*", n, "a2a"),
            "MLA, all-gather of latents": lambda n: received(student, "+", n, "all_gather"),
            "MLA, all-to-all": lambda n: received(student, "+", n, "a2a"),
            "Gated DeltaNet, states": lambda n: received(student, "G", n, "all_gather"),
            "Gated DeltaNet, all-to-all": lambda n: received(student, "G", n, "a2a"),
        }
        for number, (name, curve) in enumerate(curves.items()):
            points = []
            for n in sizes:
                with contextlib.suppress(ConfigError):  # heads that all-to-all does not divide
                    points.append((n, curve(n) / 1e6))
            axes.plot(*zip(*points), label=name, **line(number))
        axes.set(
            xscale="log", yscale="log", xlabel=f"context-parallel ranks of {length:,} tokens", ylabel="MB a layer, forward"
        )
        axes.legend(fontsize=8)

    draw_panels(file, panel, size=(7, 4.6))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
