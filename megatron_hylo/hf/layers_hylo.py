"""Layers of HyLo models: attention `*` or `W`, MLA `+`, Mamba2 `M`, Gated DeltaNet `G` or KDA `K`, each with an MLP.

The cache holds states of fixed size for `M`, `G`, `K` and `W`; attention_hylo.py says what it holds for the others. Padding
is seen by no token.
"""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_hylo import HyloAttention, HyloLatentAttention, HyloRMSNorm, Rope
from .cache_hylo import HyloCache
from .configuration_hylo import HyloConfig
from .fused_hylo import add_and_normalise, gated_linear, linear
from .inputs_hylo import SequenceInputs
from .recurrent_hylo import HyloGatedDeltaNet, HyloKimiDeltaAttention, HyloMamba2
from .window_hylo import HyloWindowAttention

MIXERS: dict[str, tuple[str, type[nn.Module]]] = {  # symbol -> (name in the layer, class)
    "*": ("self_attn", HyloAttention),
    "+": ("self_attn", HyloLatentAttention),
    "M": ("mamba", HyloMamba2),
    "G": ("linear_attn", HyloGatedDeltaNet),
    "K": ("linear_attn", HyloKimiDeltaAttention),
    "W": ("self_attn", HyloWindowAttention),
}


class HyloMLP(nn.Module):
    """SwiGLU MLP without biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the MLP to x, and add the residual: [batch, new tokens, hidden] -> the same shape."""
        return linear(self.down_proj, gated_linear(self.gate_proj, self.up_proj, x), residual)


def _mlp(config: HyloConfig, layer: int) -> nn.Module:
    if config.mlps[layer] == "E":
        from .experts_hylo import HyloExperts  # only where there are some: it needs transformers' Qwen3-MoE

        return HyloExperts(config)
    return HyloMLP(config.hidden_size, config.architecture().ffn_hidden_size)


class HyloLayer(GradientCheckpointingLayer):
    """A token mixer and an MLP, each behind a norm and with a residual."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.mixer_name, mixer = MIXERS[config.mixers[layer]]
        self.input_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.add_module(self.mixer_name, mixer(config, layer))
        self.post_attention_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.mlp = _mlp(config, layer)

    def forward(
        self,
        hidden_states: Tensor,
        inputs: SequenceInputs,
        position_embeddings: Rope | None = None,
        past_key_values: HyloCache | None = None,
    ) -> Tensor:
        """Apply mixer and MLP: [batch, new tokens, hidden] -> the same shape."""
        x = hidden_states
        mixed = getattr(self, self.mixer_name)(self.input_layernorm(x), inputs, position_embeddings, past_key_values)
        norm = self.post_attention_layernorm
        if inputs.length is not None and type(norm) is HyloRMSNorm:  # a decode step, made of few kernels
            x, normal = add_and_normalise(x, mixed, norm.weight, norm.eps)
            return self.mlp(normal, x)
        x = x + mixed
        return x + self.mlp(norm(x))
