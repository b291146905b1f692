"""Layers with activation recomputation in the backward pass."""

import functools
from collections.abc import Callable

from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_hylo.kernels.flash_attention_3 import gradient_to_follow
from megatron_hylo.models.transformer_config import HyloTransformerConfig


def is_recomputed(config: HyloTransformerConfig, symbol: str, hidden_states: Tensor) -> bool:
    """Whether a layer of that symbol recomputes its activations; only where the hidden states need a gradient."""
    return hidden_states.requires_grad and symbol in config.recompute


class _Recomputed(TransformerLayer):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """Run the layer, recomputing its activations in the backward pass where the configuration says so.

        Megatron-Core's checkpoint hands gradients to a layer's weights only where the input has one, too: the first layer of
        a model whose embedding is frozen keeps its activations.
        """
        forward = functools.partial(super().forward, **kwargs)
        layer, is_mlp = divmod(self.layer_number - 1, 2)
        symbol = (self.config.hylo.mlps if is_mlp else self.config.hylo.mixers)[layer]
        if self.training and is_recomputed(self.config, symbol, hidden_states):
            return tensor_parallel.checkpoint(functools.partial(self._in_its_precision, forward), False, hidden_states)
        return forward(hidden_states)

    def _in_its_precision(self, forward: Callable[[Tensor], tuple[Tensor, None]], hidden_states: Tensor) -> tuple[Tensor, None]:
        """Enter the FP8 context again, which the stack has left when the backward pass recomputes.

        Both passes take the same kernels, though the first one has no gradient.
        """
        with get_fp8_context(self.config), gradient_to_follow():
            return forward(hidden_states)


class MixerLayer(_Recomputed):
    """Norm, token mixer, residual."""


class FeedForwardLayer(_Recomputed, MLPLayer):
    """Norm, MLP, residual."""
