"""What every mixer is built from: the backend's linear maps, and the same refusals."""

from dataclasses import dataclass
from typing import Any, Callable

from torch import nn

from megatron_hylo.models.transformer_config import HyloTransformerConfig


@dataclass
class MixerSubmodules:
    """The parallel linear classes a mixer is built from (Megatron-Core's own or Transformer Engine's)."""

    column_parallel_linear: Callable[..., nn.Module]
    row_parallel_linear: Callable[..., nn.Module]


def column_linear(
    submodules: MixerSubmodules,
    config: HyloTransformerConfig,
    in_features: int,
    out_features: int,
    tp_group: Any,
    bias: bool = False,
) -> nn.Module:
    """A linear map whose outputs are split over the tensor-parallel ranks."""
    return submodules.column_parallel_linear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
    )


def row_linear(
    submodules: MixerSubmodules, config: HyloTransformerConfig, in_features: int, out_features: int, tp_group: Any
) -> nn.Module:
    """A linear map whose inputs are split over the tensor-parallel ranks."""
    return submodules.row_parallel_linear(
        in_features,
        out_features,
        config=config,
        init_method=config.output_layer_init_method,
        input_is_parallel=True,
        bias=False,
        skip_bias_add=True,
        is_expert=False,
        tp_group=tp_group,
    )


def refuse_inference(kwargs: dict[str, Any]) -> None:
    """Megatron's inference contexts are not what these forwards do (`serve` decodes).

    Raises:
        NotImplementedError: one was passed.
    """
    if kwargs.get("inference_context") is not None:
        raise NotImplementedError("inference_context is not supported: decode with megatron_hylo.serve")
