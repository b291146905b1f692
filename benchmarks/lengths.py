"""Tokens a second and memory over the length of a sequence: a hybrid, the dense model it came from, and the peer, to the end.

    python benchmarks/lengths.py                        # 1B hybrid and dense, 8B-shaped teacher, 4K to 128K, on one GPU
    python benchmarks/lengths.py --layout smollm2-135m-8mla22gdn --dense smollm2-135m --teacher smollm2-135m --lengths [32,64]

Whole training steps of stage 3 on random tokens, one sequence a step, activations recomputed, random weights at real shapes.
The peer is hf_peer.py's: the same hybrid in transformers and fla. A length that does not fit is shown so, and is the last of
its row. Prints a table and, last, one JSON line; writes RESULTS.md and RESULTS.png.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hf_peer import build_peer
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import architecture, device_name, draw_panels, free_memory, line, report, seconds

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ParallelConfig
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import device, session
from megatron_hylo.train.loop import training_step
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.objectives import get_objective
from megatron_hylo.train.setup import build_run

Step = Callable[[int], None]  # takes a step with one sequence of so many tokens
COLUMNS = ("model", "tokens", "s / step", "tokens/s", "peak GiB")


def main(
    layout: str = "llama3.2-1b-4mla12gdn",
    dense: str = "llama3.2-1b",
    teacher: str = "llama3.1-8b",
    lengths: list[int] = [4096, 8192, 16_384, 32_768, 65_536, 131_072],  # noqa: B006
    fp8: bool = False,
    repeats: int = 2,
    results: Path = Path("benchmarks/results/lengths"),
    commit: str = "",
) -> None:
    """Measure every model at every length.

    Args:
        layout: the hybrid.
        dense: base model.
        teacher: base model.
        lengths: tokens, ascending.
        fp8: also the hybrid with its teacher in FP8.
        repeats: timed steps, after one that is not.
        results: path without suffix of the .md and .png to write.
        commit: of the code, for the results file.
    """
    models: dict[str, Callable[[], Step]] = {"hybrid": lambda: build_ours(layout, teacher)}
    if fp8:
        models["hybrid, FP8 teacher"] = lambda: build_ours(layout, teacher, "fp8")
    models |= {"dense": lambda: build_ours(dense, teacher), "hybrid, peer": lambda: _peer(layout, teacher)}
    rows = []
    with session():
        for name, build in models.items():
            for row in measure(name, build, lengths, repeats):
                rows.append(row)
                print(row, flush=True)
            free_memory()
    _show(rows, (layout, dense, teacher), results, commit)
    os._exit(0)  # out of memory may leave kernels waiting


def build_ours(layout: str, teacher: str, teacher_precision: str = "same") -> Step:
    """Our training loop's step."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32

    def settings(length: int) -> TrainConfig:
        return TrainConfig(
            stage="distil", data="-", output="-", model="-", teacher="-", sequence_length=length, global_batch_size=1,
            recompute=True, loss_chunk_tokens=4096, precision="bf16" if cuda else "fp32", teacher_precision=teacher_precision,
        )  # fmt: skip

    config = settings(16)
    student = build_model(architecture(layout), ParallelConfig(), params_dtype=dtype, recompute=True)
    frozen = freeze([build_model(BASES[teacher], params_dtype=dtype, fp8=config.teacher_fp8)])
    where, vocabulary = device(), BASES[teacher].vocab_size
    run = build_run(config, where, models=([[student.train()]], frozen))

    def step(length: int) -> None:
        ids = torch.randint(vocabulary, (1, length + 1), device=where)
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        training_step(run.states, get_objective(settings(length), frozen), iter([batch]), 1, 0, SkippedSteps(0))

    return step


def _peer(layout: str, teacher: str) -> Step:
    step = build_peer(layout, teacher, recompute=True)
    return lambda length: step(1, length)


def measure(name: str, build: Callable[[], Step], lengths: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each length, up to the first that does not fit."""
    step = build()
    for length in lengths:
        free_memory()
        try:
            times = [seconds(partial(step, length)) for _ in range(1 + repeats)][1:]
        except torch.OutOfMemoryError:
            yield dict(model=name, tokens=length, out_of_memory=True)
            return
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        yield dict(model=name, tokens=length, seconds=statistics.median(times), peak_gib=peak)


def _show(rows: list[dict[str, Any]], names: tuple[str, str, str], results: Path, commit: str) -> None:
    cells = []
    for r in rows:
        numbers = ("out of memory", "", "")
        if "seconds" in r:
            numbers = (f"{r['seconds']:.2f}", f"{r['tokens'] / r['seconds']:,.0f}", f"{r['peak_gib']:.1f}")
        cells.append((r["model"], f"{r['tokens']:,}", *numbers))
    intro = [
        f"Hybrid {names[0]}, dense {names[1]}, teacher {names[2]}; random weights, one sequence a step, recomputed.",
        f"![tokens/s and memory by length]({results.name}.png)",
    ]
    report(results, "Stage 3 by length", intro, COLUMNS, cells, f"{device_name()}, commit {commit}, {in_use()}")
    _plot([r for r in rows if "seconds" in r], results.with_suffix(".png"))
    print(json.dumps({"benchmark": "lengths", "device": device_name(), "models": names, "rows": rows}))


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    def curves(axes: Axes, label: str, value: Callable[[dict[str, Any]], float]) -> None:
        for number, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
            mine = [r for r in rows if r["model"] == name]
            axes.plot([r["tokens"] for r in mine], [value(r) for r in mine], label=name, **line(number))
        axes.set(xlabel="tokens of a sequence", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
        lengths = sorted({r["tokens"] for r in rows})
        axes.set_xticks(lengths, [f"{tokens / 1024:g}K" for tokens in lengths])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=9)

    speed = partial(curves, label="tokens/s", value=lambda r: r["tokens"] / r["seconds"])
    memory = partial(curves, label="peak GiB", value=lambda r: r["peak_gib"])
    draw_panels(file, speed, memory, size=(9, 3.6))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
