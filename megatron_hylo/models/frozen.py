"""Freezing a model that is only evaluated, such as a teacher."""

from collections.abc import Sequence

from megatron_hylo.models.fp8 import keep_fp8_weights
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.offload import OffloadedLayers


def freeze(chunks: Sequence[HyloModel], offload: bool = False) -> list[HyloModel]:
    """Freeze model chunks; those built for FP8 keep their weights in FP8 alone, so they cannot be saved.

    Args:
        chunks: this rank's part, filled with its weights.
        offload: keep the weights in CPU memory and prefetch them layer by layer.

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
