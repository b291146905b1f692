"""A HyLo cache as a node of torch's pytrees, so that torch.export takes it as an input and gives it as an output."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .cache_hylo import HyloCache

Context = tuple[pytree.TreeSpec, list[Any]]  # structure of the attributes; constants in their places, [] at a leaf's
DYNAMIC = torch.Tensor | torch.SymInt


def _flatten(cache: HyloCache) -> tuple[list[Any], Context]:
    """Return tensors, in the attributes' order, and what else the cache is made of."""
    values, structure = pytree.tree_flatten(vars(cache))
    return [v for v in values if isinstance(v, DYNAMIC)], (structure, [[] if isinstance(v, DYNAMIC) else v for v in values])


def _flatten_with_keys(cache: HyloCache) -> tuple[list[tuple[pytree.KeyEntry, Any]], Context]:
    leaves, context = _flatten(cache)
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context


def _unflatten(leaves: Iterable[Any], context: Context) -> HyloCache:
    structure, constants = context
    rest, cache = iter(leaves), HyloCache.__new__(HyloCache)
    vars(cache).update(pytree.tree_unflatten([next(rest) if v == [] else v for v in constants], structure))
    return cache


def register_cache_pytree() -> None:
    """Register HyloCache with torch, once; transformers' exporters do so for caches in a model's own file alone."""
    if HyloCache in pytree.SUPPORTED_NODES:
        return
    pytree.register_pytree_node(
        HyloCache,
        _flatten,
        _unflatten,
        serialized_type_name=f"{HyloCache.__module__}.{HyloCache.__qualname__}",
        to_dumpable_context=lambda context: [pytree.treespec_dumps(context[0]), context[1]],
        from_dumpable_context=lambda dumped: (pytree.treespec_loads(dumped[0]), dumped[1]),
        flatten_with_keys_fn=_flatten_with_keys,
    )
