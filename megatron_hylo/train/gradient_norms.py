"""Gradient norm of each kind of layer, summed over ranks as Megatron-Core does for clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.train.optimizer import TrainingState, is_expert_parallel, optimizer_parts

MLP, EMBEDDINGS = "mlp", "embeddings"


@torch.no_grad()
def gradient_norms(state: TrainingState) -> dict[str, Tensor]:
    """Norms of this step's reduced gradients, before clipping; their squares add up to that of the whole gradient norm.

    All ranks call it between the backward passes and the update; nothing waits for the GPU.

    Returns:
        By kind of layer, the same on all ranks, float32 [] on the device: the model's mixers ("attention", "mla",
        "gated_deltanet", ...), each with its norm; "mlp", with its norm; "embeddings": embedding, output head and final norm. 0
        where nothing of a kind is trained.
    """
    mixers = state.config.hylo.mixers
    kinds = [_kind(symbol) for symbol in MIXERS if symbol in mixers] + [MLP, EMBEDDINGS]
    parts = optimizer_parts(state.optimizer)
    device = next(state.chunks[0].parameters()).device
    squares = torch.zeros(len(parts), len(kinds), dtype=torch.float32, device=device)
    found: list[dict[str, list[Tensor]]] = [{kind: [] for kind in kinds} for _ in parts]
    for chunk in state.chunks:
        for kind, parameters in parameters_by_kind(chunk).items():
            for p in parameters:
                number = len(parts) - 1 if is_expert_parallel(p) else 0
                if (piece := _owned(parts[number], p)) is not None:
                    found[number][kind].append(piece)
    for part, sums, by_kind in zip(parts, squares, found):
        for number, pieces in enumerate(by_kind.values()):
            if pieces:
                sums[number] = torch.stack(torch._foreach_norm(pieces)).square().sum()
        torch.distributed.all_reduce(sums, group=part.get_grad_stats_parallel_group())
    return dict(zip(kinds, squares.sum(0).sqrt()))


def parameters_by_kind(chunk: HyloModel) -> dict[str, list[nn.Parameter]]:
    """Parameters of a chunk by kind of layer, see `gradient_norms`."""
    found: dict[str, list[nn.Parameter]] = {}
    inside: set[int] = set()

    def add(kind: str, parameters: Iterable[nn.Parameter]) -> None:
        """Count parameters to a kind; they are none of "embeddings" any longer."""
        mine = list(parameters)
        inside.update(map(id, mine))
        found.setdefault(kind, []).extend(mine)

    for mixer, feed_forward in chunk.mixer_layers():
        add(_kind(mixer.self_attention.symbol), mixer.parameters())
        add(MLP, feed_forward.parameters())
    add(EMBEDDINGS, [p for p in chunk.parameters() if id(p) not in inside])
    return found


def _kind(symbol: str) -> str:
    return MIXERS[symbol].name.lower().replace(" ", "_")


def _owned(optimizer: MegatronOptimizer, p: Any) -> Tensor | None:
    """The part of a parameter's gradient that this rank counts: its shard under the distributed optimizer; None if nothing."""
    if not (p.requires_grad and param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)):
        return None
    if getattr(optimizer, "is_stub_optimizer", False):
        return None
    if not isinstance(optimizer, DistributedOptimizer):
        return p.main_grad
    if p not in optimizer.model_param_gbuf_map:
        return None
    own = optimizer._get_model_param_range_map(p)["param"]
    return p.main_grad.view(-1)[own.start : own.end]
