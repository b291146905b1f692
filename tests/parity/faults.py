"""Faults of the kind that parallel training really has, planted into the code one at a time: each must fail its case.

A fault is a context manager that the ranks enter before they build a model; the one-rank oracle runs without it.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _head_norm_gradient_not_summed() -> contextlib.AbstractContextManager:
    from megatron_hylo.models import layers

    return _replaced(layers, "copy_to_tensor_model_parallel_region", lambda x, **_: x)


def _rotary_key_gradient_not_summed() -> contextlib.AbstractContextManager:
    from megatron_hylo.models import mla

    return _replaced(mla, "copy_to_tensor_model_parallel_region", lambda x, **_: x)


def _loss_normalised_per_rank() -> contextlib.AbstractContextManager:
    from megatron_hylo.train import objectives

    proxy = SimpleNamespace(**vars(objectives.parallel_state) | {"get_context_parallel_world_size": lambda: 1})
    return _replaced(objectives, "parallel_state", proxy)


def _alignment_normalised_per_rank() -> contextlib.AbstractContextManager:
    from megatron_hylo.distill import alignment

    def own(windows, sequence_parallel):
        return torch.stack([window.float().square().sum() for window in windows])

    return _replaced(alignment, "_power", own)


def _halo_off_by_one() -> contextlib.AbstractContextManager:
    from megatron_hylo.parallel.context import ContextGroup

    right = ContextGroup.tokens_before

    def short(self: Any, sections: list[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
        return sections, right(self, [x[:, :-1] for x in sections], count)[1]

    return _replaced(ContextGroup, "tokens_before", short)


def _positions_from_zero() -> contextlib.AbstractContextManager:
    from megatron_hylo.parallel.context import ContextGroup

    return _replaced(ContextGroup, "positions", lambda self, length: slice(0, length))


def _share_of_another_rank() -> contextlib.AbstractContextManager:
    from megatron_hylo.parallel.context import ContextGroup

    def others(self: Any, x: Tensor, widths: Any = None, dim: int = 0) -> Tensor:
        if not self.uses_all_to_all:
            return x
        sections = x.split(list(widths) if widths is not None else [x.shape[dim]], dim)
        return torch.cat([section.chunk(self.size, dim)[self.rank - 1] for section in sections], dim)

    return _replaced(ContextGroup, "head_shard", others)


def _states_not_composed() -> contextlib.AbstractContextManager:
    """Only the part just before counts: as if nothing before it were left."""
    return _affine_maps(lambda context, rank, backward: backward or rank == context.rank - 1)


def _state_gradients_dropped() -> contextlib.AbstractContextManager:
    """As if what a part leaves to later ranks had no influence on the loss."""
    return _affine_maps(lambda context, rank, backward: not backward)


def _affine_maps(composes: Callable[[Any, int, bool], bool]) -> contextlib.AbstractContextManager:
    """Parts' maps of the state, of the ranks for which `composes` is true; the others' are zero."""
    from megatron_hylo.parallel.context import ContextGroup

    right = ContextGroup.gather_affine_maps

    def some(self: Any, a: Tensor, b: Tensor, backward: bool = False) -> list[tuple[Tensor, Tensor]]:
        found = enumerate(right(self, a, b, backward))
        return [
            (a, b) if composes(self, rank, backward) else (torch.zeros_like(a), torch.zeros_like(b)) for rank, (a, b) in found
        ]

    return _replaced(ContextGroup, "gather_affine_maps", some)


def _queries_traded_with_the_neighbour() -> contextlib.AbstractContextManager:
    from megatron_hylo.parallel import context

    def trade(self: Any, x: Tensor) -> Tensor:
        sizes = [len(x) if rank == self.rank ^ 1 else 0 for rank in range(self.size)]
        return context.all_to_all(self.group, x.contiguous(), sizes, sizes)

    return _replaced(context.ContextGroup, "_trade", trade)


def _delta_rule_not_reset() -> contextlib.AbstractContextManager:
    from megatron_hylo.models import gdn

    return _replaced(gdn, "RESET", 0.0)


def _mamba_not_reset() -> contextlib.AbstractContextManager:
    from megatron_hylo.kernels import ssd

    return _replaced(ssd, "RESET", 0.0)


def _document_positions_run_on() -> contextlib.AbstractContextManager:
    from megatron_hylo.parallel.documents import PackedDocuments

    return _replaced(PackedDocuments, "positions", property(lambda self: torch.arange(self.part.stop) % 24))


def _key_value_head_duplicated() -> contextlib.AbstractContextManager:
    from megatron.core import parallel_state

    from megatron_hylo.models.attention import GroupedQueryAttention

    right = GroupedQueryAttention.query_key_value

    def first_ranks(self: Any, hidden: Tensor, packed: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = right(self, hidden, packed)
        group = parallel_state.get_tensor_model_parallel_group()
        with torch.no_grad():
            torch.distributed.broadcast(key, torch.distributed.get_global_rank(group, 0), group=group)
        return query, key, value

    return _replaced(GroupedQueryAttention, "query_key_value", first_ranks)


def _sharded_parameters_unmarked() -> contextlib.AbstractContextManager:
    """Megatron-Core takes them for copies and counts one rank's gradients alone in the norm that clips."""
    from megatron_hylo.models import linear_mixer

    right = linear_mixer.tensor_parallel_parameter

    def unmarked(*arguments: Any, **settings: Any) -> torch.nn.Parameter:
        parameter = right(*arguments, **settings)
        parameter.tensor_model_parallel = False
        return parameter

    return _replaced(linear_mixer, "tensor_parallel_parameter", unmarked)


def _virtual_stages_swapped() -> contextlib.AbstractContextManager:
    """Each rank runs the layers of its second chunk where those of the first belong."""
    from megatron_hylo.train import setup

    right = setup.build_models

    def build(config: Any) -> Any:
        students, teacher = right(config)
        first, second = (chunk.decoder for chunk in students[0])

        def swap(*_: Any) -> None:
            first.layers, second.layers = second.layers, first.layers

        for stack in (first, second):
            stack.register_forward_pre_hook(swap)
            stack.register_forward_hook(swap)
        return students, teacher

    return _replaced(setup, "build_models", build)


def _decays_of_the_next_head() -> contextlib.AbstractContextManager:
    """Each head of a tensor-parallel rank decays as the rank's next one should."""
    from megatron_hylo.models import gdn

    right = gdn.gates_of

    def rotated(alpha: Tensor, beta: Tensor, decay_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return right(alpha, beta, decay_log.roll(1), bias)

    return _replaced(gdn, "gates_of", rotated)


def _labels_counted_by_each_rank() -> contextlib.AbstractContextManager:
    from megatron_hylo.train import objectives

    def own(labels: list[Tensor], group: Any, masks: list[Tensor | None] | None = None) -> Tensor:
        kept = [torch.ones_like(x).bool() if mask is None else mask for x, mask in zip(labels, masks or [None] * len(labels))]
        total = torch.tensor([sum(int(x.sum()) for x in kept), sum(int(((x >= 0) & m).sum()) for x, m in zip(labels, kept))])
        return total.double() / len(labels)

    return _replaced(objectives, "mean_counts", own)


def _evaluation_of_one_context_rank() -> contextlib.AbstractContextManager:
    """The sums over tokens are added up over the data-parallel ranks alone."""
    from megatron_hylo.eval import perplexity

    right = perplexity.parallel_state.get_data_parallel_group
    proxy = SimpleNamespace(**vars(perplexity.parallel_state) | {"get_data_parallel_group": lambda **_: right()})
    return _replaced(perplexity, "parallel_state", proxy)


def _padding_in_the_soft_max() -> contextlib.AbstractContextManager:
    """Logits of 0 for tokens that there are not."""
    from megatron_hylo.distill import head_loss

    right = head_loss.linear_head_loss
    return _replaced(head_loss, "linear_head_loss", lambda *given, vocabulary, **options: right(*given, **options))


# name: (fault, model, stage, parallelism of the case that it must fail)
FAULTS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager], str, str, str]] = {
    "a norm's gradient not summed over tensor-parallel ranks": (_head_norm_gradient_not_summed, "normed", "pretrain", "tp2"),
    "the rotary key's gradient not summed": (_rotary_key_gradient_not_summed, "mixed", "pretrain", "tp2"),
    "a key head duplicated over tensor-parallel ranks": (_key_value_head_duplicated, "tied", "pretrain", "tp2"),
    "the loss normalised by each context-parallel rank": (_loss_normalised_per_rank, "mixed", "pretrain", "cp2_gather"),
    "alignment normalised by each context-parallel rank": (_alignment_normalised_per_rank, "mixed", "mse", "cp2_gather"),
    "a convolution's halo off by one": (_halo_off_by_one, "mixed", "pretrain", "cp2_gather"),
    "rotary positions that begin at each rank": (_positions_from_zero, "tied", "pretrain", "cp2_gather"),
    "parameters of another rank's heads": (_share_of_another_rank, "normed", "pretrain", "cp2_a2a"),
    "states of earlier ranks not composed": (_states_not_composed, "normed", "pretrain", "cp4"),
    "queries traded with the neighbour": (_queries_traded_with_the_neighbour, "normed", "pretrain", "cp4"),
    "gradients of later ranks' states dropped": (_state_gradients_dropped, "normed", "pretrain", "cp2_gather"),
    "Gated DeltaNet's state not reset at a document": (_delta_rule_not_reset, "normed", "packed", "cp2_gather"),
    "Mamba2's state not reset at a document": (_mamba_not_reset, "normed", "packed", "cp2_gather"),
    "sharded parameters left out of the norm that clips": (_sharded_parameters_unmarked, "normed", "pretrain", "tp2"),
    "virtual pipeline stages swapped": (_virtual_stages_swapped, "normed", "pretrain", "pp2_vp2"),
    "decays of another head of a tensor-parallel rank": (_decays_of_the_next_head, "wide", "pretrain", "tp2"),
    "labels counted by each data-parallel rank": (_labels_counted_by_each_rank, "mixed", "packed_distil", "dp2"),
    "labels counted by each context-parallel rank": (_labels_counted_by_each_rank, "normed", "packed", "cp2_gather"),
    "evaluation of one context-parallel rank's tokens": (_evaluation_of_one_context_rank, "mixed", "pretrain", "cp2_gather"),
    "padding of the vocabulary in the soft-max": (_padding_in_the_soft_max, "odd", "pretrain", "tp4"),
    "rotary positions that run on over documents": (_document_positions_run_on, "normed", "packed", "tp2_sp"),
}
