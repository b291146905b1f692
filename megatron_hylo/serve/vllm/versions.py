"""Differences between the vLLM versions that are served with."""

from dataclasses import fields
from typing import Any

from vllm.model_executor.models.interfaces import IsHybrid

CACHES_UNLIKE_STATES = hasattr(IsHybrid, "get_mamba_state_copy_funcs")  # prefixes, for states of several shapes; since 0.30


def known(spec: Any, **values: Any) -> dict[str, Any]:
    """Return those of `values` that are fields of a dataclass in this version.

    `indexes_kv_by_block_stride` (pages may be padded) was a field of attention specs up to 0.29, where later versions ask no
    more; `num_prefill_checkpoint_blocks` and `prefill_checkpoint_alignment` (states inside a prefill) came with 0.30.
    """
    return {field.name: values[field.name] for field in fields(spec) if field.name in values}
