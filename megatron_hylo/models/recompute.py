"""Layers that forget their activations in the forward pass and compute them again in the backward pass."""

import functools

import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _Recomputed(TransformerLayer):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """As Megatron-Core's; but its own checkpoint leaves a first layer without gradient where the embedding is frozen."""
        forward = functools.partial(super().forward, **kwargs)
        symbol = self.config.hylo.mixers[(self.layer_number - 1) // 2] if self.layer_number % 2 else "-"
        if self.training and torch.is_grad_enabled() and symbol in self.config.recompute:
            return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return forward(hidden_states)


class MixerLayer(_Recomputed):
    """Norm, token mixer, residual."""


class FeedForwardLayer(_Recomputed, MLPLayer):
    """Norm, MLP, residual."""
