"""Base class of the token mixers and the linear maps they are built from."""

from dataclasses import dataclass, replace
from typing import Any, Callable, ClassVar

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.models.transformer_config import HyloTransformerConfig
from megatron_hylo.parallel.context import context_group
from megatron_hylo.parallel.documents import Packed

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
    """A linear map whose outputs are split over the tensor-parallel ranks.

    Args:
        submodules: has the class, of Transformer Engine or Megatron-Core.
        config: of the model.
        in_features: of the whole map.
        out_features: of the whole map, a multiple of the ranks.
        tp_group: tensor-parallel group.
        bias: with a bias, which the map adds.

    Returns:
        Module: [sequence (/ TP with sequence parallelism), batch, in] -> ([sequence, batch, out / TP], None).
    """
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
    """A linear map to several sections, split over the tensor-parallel ranks; `kernels.sections` reads its output.

    A rank's outputs are padded to a multiple of ALIGNMENT; in FP8 a map without a multiple of FP8_ALIGNMENT is computed in
    bf16. Arguments as of `column_linear`.
    """
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
        """Project x [sequence, batch, in_features] to [sequence, batch, out_features / TP + padding], and no bias."""
        return super().forward(x, weight=F.pad(self.weight, (0, 0, 0, self.padding)))


def row_linear(
    submodules: MixerSubmodules, config: HyloTransformerConfig, in_features: int, out_features: int, tp_group: Any
) -> nn.Module:
    """A linear map whose inputs are split over the tensor-parallel ranks; arguments as of `column_linear`, without a bias.

    Returns:
        Module: [sequence, batch, in / TP] -> ([sequence (/ TP with sequence parallelism), batch, out], None).
    """
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


class Mixer(MegatronModule):
    """Base class of the token mixers: process groups, context parallelism, Megatron-Core's call signature.

    A subclass names its symbol, builds its weights in `build` and computes in `mix`.

    Args:
        config: of the model.
        submodules: classes of the parallel linear maps.
        layer_number: from 1; counts mixers and MLPs of the whole model, whatever the pipeline stage.
        pg_collection: process groups; `tp` and `cp` are used.

    Raises:
        ConfigError: `cp_comm_type` a2a with heads that the context-parallel ranks do not divide.
    """

    symbol: ClassVar[str]

    def __init__(
        self,
        config: HyloTransformerConfig,
        submodules: MixerSubmodules,
        layer_number: int = 1,
        *,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer = (layer_number - 1) // 2  # of the model's Transformer layers, from 0
        self.tp_group = pg_collection.tp
        tensor_parallel, description = self.tp_group.size(), MIXERS[self.symbol]
        local = {name: count // tensor_parallel for name, count in description.tensor_parallel_counts(config.hylo).items()}
        self.context = context_group(config.cp_comm_type, pg_collection.cp, description.recurrent, **local)
        self.build(config.hylo, submodules)

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        raise NotImplementedError

    def mix(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, None]:
        """Mix tokens: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same shape, and no bias."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        packed_seq_params: Packed = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Megatron-Core's signature of a self-attention module.

        Args:
            hidden_states: [sequence (/ TP with sequence parallelism), batch, hidden].
            attention_mask: unused; every mixer is causal.
            packed_seq_params: documents that lie end to end in the sequence.
            kwargs: other arguments of Megatron-Core's layers.

        Returns:
            The same shape, and no bias.

        Raises:
            NotImplementedError: an inference context was passed; `megatron_hylo.serve` decodes.
        """
        if kwargs.get("inference_context") is not None:
            raise NotImplementedError("inference_context is not supported: decode with megatron_hylo.serve")
        return self.mix(hidden_states, packed_seq_params)
