"""Forward and backward of one mixer with its sequence split over the ranks, against the same on one GPU.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --lengths [512] --precision fp32   # gloo ranks on a CPU

Every rank first runs the whole sequence alone (the peer), then its part of it with the others, by both ways to exchange.
Times are medians over repeats, of the slowest rank. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from megatron.core import parallel_state
from report import device_name, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ModelConfig, ParallelConfig
from megatron_hylo.config.layouts import get_layout
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.parallel.context import ContextGroup
from megatron_hylo.platform.distributed import is_main, session

SHAPES = {"1B": "llama3.2-1b-4mla12", "3B": "llama3.2-3b-6mla22"}
MIXERS = {"+": "gdn", "G": "gdn", "M": "m2"}  # and which of a shape's layouts has it
NAMES = {"+": "MLA", "G": "Gated DeltaNet", "M": "Mamba2"}


def main(
    shapes: list[str] = list(SHAPES),  # noqa: B006
    mixers: list[str] = list(MIXERS),  # noqa: B006
    lengths: list[int] = [65_536, 131_072],  # noqa: B006
    repeats: int = 5,
    precision: Literal["bf16", "fp32"] = "bf16",
    results: Path = Path("benchmarks/results/context_parallel"),
    commit: str = "",
) -> None:
    """Measure every mixer of every shape at every length.

    Args:
        shapes: sizes of hybrids, of 1B and 3B.
        mixers: symbols of layers, of + G M.
        lengths: tokens of one sequence.
        repeats: timed passes, after two that are not.
        precision: of weights and activations.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    ranks, dtype = int(os.environ["WORLD_SIZE"]), torch.bfloat16 if precision == "bf16" else torch.float32
    rows = []
    with session(ParallelConfig(context_parallel_size=ranks)) as device:
        alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]
        together = parallel_state.get_context_parallel_group()
        for shape in shapes:
            for symbol in mixers:
                config = get_layout(f"{SHAPES[shape]}{MIXERS[symbol]}").config
                mixer = _mixer(config, symbol, dtype)
                divided = getattr(mixer, "groups", mixer.heads) % ranks == 0  # a2a gives every rank as many heads
                for length in lengths:
                    one, _ = _time(mixer, ContextGroup(alone), length, config.hidden_size, dtype, device, repeats)
                    for method in ("all_gather", "a2a") if divided else ("all_gather",):
                        group = ContextGroup(together, uses_all_to_all=method == "a2a")
                        split, received = _time(mixer, group, length, config.hidden_size, dtype, device, repeats)
                        rows.append(dict(shape=shape, mixer=NAMES[symbol], tokens=length, method=method, one_gpu_ms=one,
                                         ranks_ms=split, speedup=one / split, received_mb=received / 1e6))  # fmt: skip
                        if is_main():
                            print(rows[-1], flush=True)  # hours of a queue are not lost where time runs out
        if is_main():
            _show(rows, ranks, precision, results, commit)


def _mixer(config: ModelConfig, symbol: str, dtype: torch.dtype) -> torch.nn.Module:
    single = config.replace(hybrid_layer_pattern=f"{symbol}-", vocab_size=256, mla_rotary_pairs=())
    return build_model(single, params_dtype=dtype).mixer_layers()[0][0].self_attention


def _time(
    mixer: Any, context: ContextGroup, length: int, hidden: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[float, float]:
    """(milliseconds of the slowest rank, bytes this rank received in a forward pass)."""
    mixer.context = context
    x = torch.randn(length // context.size, 1, hidden, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn_like(x)

    def run() -> None:
        out, _ = mixer(x)
        out.backward(upstream)
        mixer.zero_grad()
        x.grad = None

    times = [_milliseconds(run, device) for _ in range(2 + repeats)][2:]
    slowest = torch.tensor([statistics.median(times)], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item(), context.received_bytes / (2 + repeats)


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    dist.barrier()
    start = now()
    run()
    return 1e3 * (now() - start)


def _show(rows: list[dict], ranks: int, precision: str, results: Path, commit: str) -> None:
    columns = ("shape", "mixer", "tokens", "cp_comm_type", "one GPU, ms", f"{ranks} ranks, ms", "speed-up", "received, MB")
    cells = [
        (r["shape"], r["mixer"], f"{r['tokens']:,}", r["method"], f"{r['one_gpu_ms']:.1f}", f"{r['ranks_ms']:.1f}",
         f"{r['speedup']:.2f}", f"{r['received_mb']:.2f}")
        for r in rows
    ]  # fmt: skip
    how = f"{ranks} x {device_name()}, {precision}, commit {commit}, {in_use()}"
    report(results, "One mixer, forward and backward, its sequence split over ranks", [], columns, cells, how)
    print(json.dumps({"benchmark": "context_parallel", "device": device_name(), "ranks": ranks, "rows": rows}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
