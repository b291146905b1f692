"""Compare the pipeline bubble that `hylo plan` simulates with one that ranks under Megatron-Core's schedules measure.

    torchrun --standalone --nproc-per-node 4 benchmarks/pipeline_bubble.py

Real ranks, schedules and messages; a pass over a pipeline stage sleeps for a given time, so ranks do not compete for cores. A
case is a number of micro-batches and of model chunks a rank, with even or uneven stages. Prints a table and one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ParallelConfig
from megatron_hylo.plan.schedule import Event, bubble, order, simulate, step_seconds
from megatron_hylo.platform.distributed import is_main, session

WIDTH = 8  # numbers of a message
CASES = [  # micro-batches, model chunks, uneven stages
    (4, 1, False), (4, 1, True), (8, 1, False), (8, 1, True), (16, 1, True), (4, 2, False), (8, 2, False), (8, 2, True),
]  # fmt: skip


class _Sleep(torch.autograd.Function):
    """Identity whose passes take a stage's time and note when they ran."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "Stage") -> Tensor:
        ctx.stage = stage
        stage.take("F")
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.stage.take("B")
        return gradient, None


class Stage(nn.Module):
    """A pipeline stage with the attributes that Megatron-Core's schedules ask for.

    Args:
        config: shared by all stages.
        chunk: model chunk of the rank.
        seconds: of a forward pass; a backward pass takes twice as long.
        passes: list that all passes of the rank are appended to: (kind, chunk, begin, end).
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: ModelParallelConfig, chunk: int, seconds: float, passes: list[tuple]) -> None:
        super().__init__()
        self.config, self.chunk, self.seconds, self.passes = config, chunk, seconds, passes
        self.weight, self.input = nn.Parameter(torch.ones(())), None

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        """Take the output of the stage before."""
        self.input = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self) -> Tensor:
        """Output of the stage, [sequence, batch, hidden]."""
        x = torch.ones(1, 1, WIDTH) if self.input is None else self.input
        return _Sleep.apply(x * self.weight, self)

    def take(self, kind: str) -> None:
        """Sleep through a pass."""
        begin = time.monotonic()
        time.sleep(self.seconds * (1 if kind == "F" else 2))
        self.passes.append((kind, self.chunk, begin, time.monotonic()))


def forward_step(batches: Iterator, stage: Stage) -> tuple[Tensor, Any]:
    """Forward pass of a micro-batch, as the schedules call it."""
    return stage(), lambda output: (output.sum(), {})


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pass_ms", type=float, default=20.0, help="milliseconds of the shortest forward pass")
    parser.add_argument("--steps", type=int, default=5, help="of each case; the median is told")
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with session(ParallelConfig(pipeline_model_parallel_size=ranks)):
        rows = [measure(given, ranks, *case) for case in CASES]
    if rows[0] is not None:
        show(rows)


def measure(given: argparse.Namespace, ranks: int, micro_batches: int, chunks: int, uneven: bool) -> dict[str, Any] | None:
    """Steps of one case; the row on the main rank, None on others."""
    seconds = [given.pass_ms / 1e3 * (1 + 0.25 * ((3 * i) % 4) * uneven) for i in range(ranks * chunks)]
    config = ModelParallelConfig(
        pipeline_model_parallel_size=ranks, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_dtype=torch.float32, batch_p2p_comm=False, deallocate_pipeline_outputs=False,
    )  # fmt: skip
    config.hidden_size, passes = WIDTH, list[tuple]()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(config.virtual_pipeline_model_parallel_size)
    me = parallel_state.get_pipeline_model_parallel_rank()
    stages = [Stage(config, chunk, seconds[chunk * ranks + me], passes) for chunk in range(chunks)]
    traces = []
    for _ in range(given.steps + 1):
        passes.clear()
        torch.distributed.barrier()
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(())] * chunks if chunks > 1 else iter(()),
            model=stages if chunks > 1 else stages[0], num_microbatches=micro_batches, seq_length=1, micro_batch_size=1,
        )  # fmt: skip
        gathered: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(gathered, passes)
        traces.append(gathered)
    if not is_main():
        return None
    simulated = simulate(ranks, micro_batches, seconds, [2 * s for s in seconds], chunks)
    measured = [_events(trace, ranks, micro_batches, chunks) for trace in traces[1:]]
    return {
        "ranks": ranks, "micro_batches": micro_batches, "chunks": chunks, "uneven": uneven,
        "bubble": statistics.median(bubble(events) for events in measured), "simulated_bubble": bubble(simulated),
        "seconds": statistics.median(step_seconds(events) for events in measured), "simulated_seconds": step_seconds(simulated),
    }  # fmt: skip


def _events(trace: list[list[tuple]], ranks: int, micro_batches: int, chunks: int) -> list[Event]:
    """Passes of all ranks as the simulator has them, from the first one's begin; another order than its own is an error."""
    first = min(begin for passes in trace for *_, begin, _ in passes)
    events = []
    for rank, passes in enumerate(trace):
        wanted = order(rank, ranks, micro_batches, chunks)
        if [(kind, chunk) for kind, chunk, *_ in passes] != [(kind, chunk) for kind, chunk, _ in wanted]:
            raise RuntimeError(f"rank {rank} ran its passes in another order than the simulator's")
        events += [
            Event(rank, kind, chunk, number, begin - first, end - first)
            for (kind, chunk, begin, end), (*_, number) in zip(passes, wanted)
        ]
    return events


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table and the JSON line."""
    table = Table("ranks", "micro-batches", "chunks", "stages", "bubble", "simulated", "step, s", "simulated")
    for row in rows:
        table.add_row(
            str(row["ranks"]), str(row["micro_batches"]), str(row["chunks"]), "uneven" if row["uneven"] else "even",
            f"{row['bubble']:.1%}", f"{row['simulated_bubble']:.1%}",
            f"{row['seconds']:.3f}", f"{row['simulated_seconds']:.3f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "pipeline_bubble", "rows": rows}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
