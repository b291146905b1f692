"""A model that only computes: a teacher."""

from collections.abc import Sequence

from megatron_hylo.models.fp8 import keep_fp8_weights
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.offload import OffloadedLayers


def freeze(chunks: Sequence[HyloModel], offload: bool = False) -> list[HyloModel]:
    """No gradients from here on; what was built for FP8 keeps its weights in FP8 alone, so that it cannot be saved.

    Args:
        chunks: this rank's part, filled with its weights.
        offload: those rest in the CPU's memory between layers.

    Returns:
        The chunks.
    """
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
        if chunk.config.fp8:
            keep_fp8_weights(chunk)
        if offload:
            OffloadedLayers(chunk)
    return list(chunks)
