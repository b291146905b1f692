"""Whole weights of a model that tensor-, pipeline- and expert-parallel ranks share, gathered in memory."""

import re
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
from megatron_hylo.models.weights_files import stored_shape

_ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.experts\.(.*)")


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
        """Names and whole tensors on the CPU, as `torch.nn.Module` yields them."""
        return iter(self.parameters.items())


@torch.no_grad()
def gather_model(chunks: Sequence[HyloModel]) -> GatheredModel:
    """Gather all weights of a model on every rank; the tensor-, pipeline- and expert-parallel ranks call it together.

    Each piece is sent once by one of the ranks that have it. A rank needs memory for the whole model on the CPU, and for one
    piece on its device.

    Args:
        chunks: this rank's part, a chunk a virtual pipeline stage.

    Returns:
        The same on every rank, in the model's dtype.
    """
    own, fused = _pieces(chunks)
    dense, experts = ([p for p in own if bool(_ALL_EXPERTS.fullmatch(p.key)) == wanted] for wanted in (False, True))
    device = next(chunks[0].parameters()).device
    whole, sections = _gathered(dense, fused, parallel_state.get_model_parallel_group(), device)
    if chunks[0].config.hylo.has_experts:
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        whole |= _gathered(experts, {}, group, device)[0]
    for name, keys in sections.items():
        if keys != [name] and not _ALL_EXPERTS.fullmatch(name):
            whole[name] = torch.cat([whole.pop(key) for key in keys])
    return GatheredModel(chunks[0].config, dict(_one_by_one(whole)))


def _gathered(
    own: list[ShardedTensor], fused: dict[str, list[str]], group: dist.ProcessGroup, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Whole tensors of the pieces that a group's ranks have, by key, and what is stored in sections on any of them."""
    about = [(p.key, tuple(p.global_shape), tuple(p.global_offset), stored_shape(p), p.dtype) for p in own]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (about, fused), group=group)
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
            piece = own[number].data.contiguous().view(local) if mine else torch.empty(local, dtype=dtype, device=device)
            dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
            target = whole.setdefault(key, torch.empty(shape, dtype=dtype))
            target[tuple(slice(start, start + size) for start, size in zip(offset, local, strict=True))] = piece.cpu()
    return whole, sections


def _one_by_one(whole: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Divide what is stored of all experts together into each one's parameters."""
    for name, tensor in whole.items():
        if found := _ALL_EXPERTS.fullmatch(name):
            for number, one in enumerate(tensor):
                yield f"{found[1]}.local_experts.{number}.{found[2]}", one
        else:
            yield name, tensor


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
