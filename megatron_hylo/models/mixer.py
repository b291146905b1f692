"""What every mixer is built from: the backend's linear maps, fused projections, and the same refusals."""

from dataclasses import dataclass, replace
from typing import Any, Callable

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_hylo.models.transformer_config import HyloTransformerConfig

ALIGNMENT = 8  # channels: 16 bytes of bf16, below which matrix products take twice as long on a GPU
FP8_ALIGNMENT = 16  # what FP8 products ask for; a map that has others computes in bf16


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


def fused_column_linear(
    submodules: MixerSubmodules, config: HyloTransformerConfig, in_features: int, out_features: int, tp_group: Any
) -> nn.Module:
    """A linear map to several sections, split over the tensor-parallel ranks; `kernels.sections` reads its output."""
    if out_features // tp_group.size() % (FP8_ALIGNMENT if config.fp8 else ALIGNMENT):
        submodules = replace(submodules, column_parallel_linear=PaddedColumnLinear)
    return column_linear(submodules, config, in_features, out_features, tp_group)


class PaddedColumnLinear(ColumnParallelLinear):
    """A linear map that makes some channels too many, zeros, so that a rank has a multiple of `ALIGNMENT` of them.

    Its weight is as without them: the rows are added for each product, a copy that costs nothing beside it.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.padding = -self.output_size_per_partition % ALIGNMENT
        self.output_size_per_partition += self.padding  # rows of the weight that forward is given

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [sequence, batch, in_features] -> [sequence, batch, out_features / TP + padding], and no bias."""
        return super().forward(x, weight=F.pad(self.weight, (0, 0, 0, self.padding)))


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
