"""Whole weights of a model that tensor- and pipeline-parallel ranks share, gathered in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_hylo.models.checkpoint import sharded_chunks
from megatron_hylo.models.hylo_model import HyloModel


@dataclass(frozen=True)
class GatheredModel:
    """All parameters of a model, on the CPU, for what asks a model that is not divided for them.

    Args:
        config: `TransformerConfig` of the model.
        parameters: whole tensors by their names in a model that is not divided.
    """

    config: Any
    parameters: dict[str, Tensor]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters, as `torch.nn.Module` has them."""
        return iter(self.parameters.items())


@torch.no_grad()
def gather_model(chunks: Sequence[HyloModel]) -> GatheredModel:
    """Gather all weights of a model on every rank; the tensor- and pipeline-parallel ranks of one copy call it together.

    Each piece is sent once by one of the ranks that have it. A rank needs memory for the whole model on the CPU, and for one
    piece on its device.

    Args:
        chunks: this rank's part, a chunk a virtual pipeline stage.

    Returns:
        The same on every rank, in the model's dtype.
    """
    group = parallel_state.get_model_parallel_group()
    own, fused = _pieces(chunks)
    about = [(p.key, tuple(p.global_shape), tuple(p.global_offset), tuple(p.local_shape), p.dtype) for p in own]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (about, fused), group=group)
    device = next(chunks[0].parameters()).device
    whole: dict[str, Tensor] = {}
    sections: dict[str, list[str]] = {}
    sent = set()
    for rank, (theirs, their_fused) in enumerate(everyone):
        sections |= their_fused
        for number, (key, shape, offset, local, dtype) in enumerate(theirs):
            if (key, offset) in sent:
                continue
            sent.add((key, offset))
            mine = rank == group.rank()
            piece = own[number].data.contiguous() if mine else torch.empty(local, dtype=dtype, device=device)
            dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
            target = whole.setdefault(key, torch.empty(shape, dtype=dtype))
            target[tuple(slice(start, start + size) for start, size in zip(offset, local, strict=True))] = piece.cpu()
    for name, keys in sections.items():
        if keys != [name]:
            whole[name] = torch.cat([whole.pop(key) for key in keys])
    return GatheredModel(chunks[0].config, whole)


def _pieces(chunks: Sequence[HyloModel]) -> tuple[list[ShardedTensor], dict[str, list[str]]]:
    """This rank's pieces, and the keys of the sections, in order, of each parameter that is stored in sections."""
    pieces: list[ShardedTensor] = []
    fused: dict[str, list[str]] = {}
    for entry in nested_values(sharded_chunks(chunks)):
        if isinstance(entry, ShardedTensorFactory):
            built = list(nested_values(entry.build()))
            fused[entry.key] = list(dict.fromkeys(piece.key for piece in built))
            pieces += built
        elif isinstance(entry, ShardedTensor):
            pieces.append(entry)
    return pieces, fused
