"""Pipeline stages without a schedule: one micro-batch after the other goes forward through all of them.

For passes that send no gradient back: evaluation, and alignment, whose gradients stay in their layer. Training with
gradients that cross stages runs under Megatron-Core's schedules.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def through_stages(
    run: Callable[[int, Tensor | None], Tensor],
    virtual_stages: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    where: torch.device,
) -> Tensor | None:
    """Run this rank's model chunks on one micro-batch, each on the output of the pipeline stage before it.

    Args:
        run: (chunk, what it receives; None on the first stage) -> what the next stage receives.
        virtual_stages: chunks of each rank.
        shape, dtype, where: shape, dtype and device of what one pipeline stage sends to the next.

    Returns:
        Output of the last pipeline stage, on its rank; None on others.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    last = (virtual_stages - 1, ranks - 1)
    out = None
    for chunk in range(virtual_stages):
        received = None
        if (chunk, rank) != (0, 0):
            received = torch.empty(shape, dtype=dtype, device=where)
            dist.recv(received, dist.get_global_rank(group, (rank - 1) % ranks), group=group)
        out = run(chunk, received)
        if (chunk, rank) != last:
            dist.send(out.detach().contiguous(), dist.get_global_rank(group, (rank + 1) % ranks), group=group)
            out = None
    return out


def rank_shape(sequence: int, batch: int, width: int, sequence_parallel: bool) -> tuple[int, int, int]:
    """Shape [sequence, batch, width] of this rank's hidden states.

    Args:
        sequence: tokens of its context-parallel part.
        batch: samples.
        width: channels.
        sequence_parallel: whether the tensor-parallel ranks split the sequence.
    """
    parts = parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    return sequence // parts, batch, width


def together(own: Tensor, theirs: Tensor) -> Tensor:
    """Two tensors of any shape and one dtype, to be handed on to the next stage as one: [1, 1, all numbers]."""
    return torch.cat([own.reshape(1, 1, -1), theirs.reshape(1, 1, -1)], dim=-1)


def apart(handed_on: Tensor, own: Sequence[int], width: int, rows: int) -> tuple[Tensor, Tensor]:
    """The way back from `together`: of shape `own`, and [tokens, rows, width]."""
    size = math.prod(own)
    first, second = handed_on.flatten().split([size, handed_on.numel() - size])
    return first.view(*own), second.view(-1, rows, width)


def share_last_stages(value: Tensor) -> None:
    """Broadcast the last pipeline stage's `value`, of any shape, to all pipeline stages, in place.

    All ranks call it with tensors of one shape and dtype.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(value, source, group=parallel_state.get_pipeline_model_parallel_group())
