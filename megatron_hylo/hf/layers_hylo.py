"""Layers of HyLo models: attention `*`, MLA `+`, Mamba2 `M`, Gated DeltaNet `G` or KDA `K`, each with an MLP.

The cache holds one latent and one unrotated rotary key a token for `+`, keys and values for `*`, and states of fixed
size for `M` and `G`. Padding writes nothing into a state and is seen by no token. Sources: HyLo (arXiv:2604.24715), and
the papers the kernels name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.norm import gated_rms_norm, rms_norm
from megatron_hylo.kernels.rope import apply_rope, unfold_rotary_key
from megatron_hylo.kernels.ssd import ssd

from .cache_hylo import HyloCache
from .configuration_hylo import HyloConfig
from .inputs_hylo import SequenceInputs

Recurrence = Callable[..., tuple[Tensor, Tensor | None]]
Rope = tuple[Tensor, Tensor]  # cos and sin of all positions, cached ones first, fp32 [batch or 1, s, rotated channels / 2]


class HyloRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """Normalise x: [..., channels] -> the same shape; `reference` [..., any] gives the mean square in place of x."""
        return rms_norm(x, self.weight, self.eps, reference)


class HyloAttention(nn.Module):
    """`*`: causal attention of Llama, Qwen2.5 and Qwen3: grouped queries, optional biases and q/k-norm, RoPE."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.head_dim = layer, c.kv_channels
        queries, keys = c.num_attention_heads * c.kv_channels, c.num_query_groups * c.kv_channels
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=c.add_qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=c.add_qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=c.add_qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = HyloRMSNorm(c.kv_channels, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        self.k_norm = HyloRMSNorm(c.kv_channels, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: Rope, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        cos, sin = (table[:, -t:] for table in rope)
        query, key, value = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        query = apply_rope(self.q_norm(query), cos, sin, interleaved=False)
        key = apply_rope(self.k_norm(key), cos, sin, interleaved=False)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        out = attention(query, key, value, scale=self.head_dim**-0.5, mask=inputs.attention_mask)
        return self.o_proj(out.reshape(b, t, -1))


class HyloLatentAttention(nn.Module):
    """`+`: HyLo's MLA; heads are [unrotated | rotary], the rotary key is shared, q/k-norm comes before the rotation.

    With `aligned_norm` (qk_head_dim = kv_channels) mean squares are those of the base model's heads: of a query the
    unrotated channels, of a key those plus the head's share of the rotary key. `hylo.mla_rotary_pairs`, where given, holds
    each layer's frequencies as numbers in the base model's table.
    """

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.rank, self.rotary = layer, c.kv_lora_rank, c.qk_pos_emb_head_dim
        self.plain, self.value, self.groups = c.qk_head_dim, c.v_head_dim, c.num_query_groups
        self.qk, self.aligned_norm = c.qk_head_dim + c.qk_pos_emb_head_dim, c.mla_whole_head_norm
        self.pairs = list(c.mla_rotary_pairs[layer]) if c.mla_rotary_pairs else None
        self.q_a_proj = nn.Linear(config.hidden_size, c.q_lora_rank, bias=False)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * self.qk, bias=c.mla_bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rotary, bias=c.mla_bias)
        self.kv_b_proj = nn.Linear(self.rank, self.groups * (self.plain + self.value), bias=c.mla_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * self.value, config.hidden_size, bias=False)
        self.q_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        self.k_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        if self.aligned_norm:
            self.k_norm.register_parameter("rotary_mix", nn.Parameter(torch.ones(self.groups, self.rotary // 2)))

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: Rope, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        query = self.q_b_proj(self.q_a_proj(x)).view(b, t, -1, self.qk)
        compressed = self.kv_a_proj_with_mqa(x)
        if cache is not None:
            (compressed,) = cache.append(self.layer, compressed)
        latent, rotary_key = compressed.split([self.rank, self.rotary], dim=-1)
        # Keys and values of all tokens are made anew; absorbing kv_b_proj is not used (k-norm forbids it).
        key_value = self.kv_b_proj(latent).view(b, -1, self.groups, self.plain + self.value)
        plain_key, value = key_value.split([self.plain, self.value], dim=-1)
        key = torch.cat([plain_key, rotary_key.unsqueeze(2).expand(-1, -1, self.groups, -1)], dim=-1)
        if self.aligned_norm:
            pairs = torch.tensor(self.pairs or range(self.rotary // 2), device=x.device)
            base_key = unfold_rotary_key(plain_key, rotary_key, self.k_norm.get_parameter("rotary_mix"), pairs)
            query, key = self.q_norm(query, query[..., : self.plain]), self.k_norm(key, base_key)
        else:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.pairs is not None:
            rope = (rope[0][..., self.pairs], rope[1][..., self.pairs])
        query, key = self._rotate(query, rope), self._rotate(key, rope)
        out = attention(query, key, value, scale=self.qk**-0.5, mask=inputs.attention_mask)
        return self.o_proj(out.reshape(b, t, -1))

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        plain, rotary = x.split([self.plain, self.rotary], dim=-1)
        cos, sin = (table[:, -x.shape[1] :] for table in rope)
        return torch.cat([plain, apply_rope(rotary, cos, sin, interleaved=True)], dim=-1)


def convolve(
    x: Tensor, convolutions: list[nn.Conv1d], state: Tensor | None, padding: Tensor | None, keep_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Apply a short causal convolution with SiLU whose channels are split over several modules; no tap reads padding.

    Args:
        x: [batch, new tokens, channels].
        convolutions: depthwise, their channels together are x's; all with a bias or none.
        state: [batch, channels, taps - 1], the tokens before x; None for zeros.
        padding: bool [batch, new tokens], False at padding.
        keep_state: also return the state after x.

    Raises:
        ValueError: a convolution was replaced by another module (LoRA on conv1d), whose weights would not be used.
    """
    for module in convolutions:
        if not isinstance(module, nn.Conv1d):
            raise ValueError(
                f"a short convolution (conv1d) was replaced by {type(module).__name__}, but its weights are handed to a fused "
                f"kernel, so an adapter there would have no effect; leave conv1d out of target_modules"
            )
    weight = torch.cat([module.weight.squeeze(1) for module in convolutions])
    biases = [module.bias for module in convolutions if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    if padding is None:
        return causal_conv1d(x, weight, bias, "silu", state, output_final_state=keep_state)
    # Padding goes before everything, the state's tokens included, as zeros: then a token's neighbours are tokens.
    before = weight.shape[1] - 1
    history = x.new_zeros(len(x), before, x.shape[2]) if state is None else state.transpose(1, 2).to(x.dtype)
    order = F.pad(padding, (before, 0), value=True).to(torch.uint8).argsort(dim=1, stable=True)
    places = order[..., None].expand(-1, -1, x.shape[2])
    moved = torch.cat([history, x.masked_fill(~padding[..., None], 0.0)], dim=1).gather(1, places)
    y, state = causal_conv1d(moved, weight, bias, "silu", None, output_final_state=keep_state)
    return torch.empty_like(y).scatter(1, places, y)[:, before:], state


class HyloMamba2(nn.Module):
    """`M`: Mamba2 whose x and B have the base model's KV heads, repeated to all heads after the convolution."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.heads, self.groups = layer, c.mamba_num_heads, c.num_query_groups
        self.head_dim, self.state_dim, self.eps = c.mamba_head_dim, c.mamba_state_dim, c.layernorm_epsilon
        inner = self.heads * self.head_dim
        self.sections = [self.groups * self.head_dim, self.groups * self.state_dim, self.heads * self.state_dim]  # x, B, C
        channels = sum(self.sections)
        self.in_proj = nn.Linear(config.hidden_size, inner + channels + self.heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, c.linear_conv_kernel_dim, groups=channels)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = HyloRMSNorm(inner, self.eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: None, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        conv_state, state = (None, None) if cache is None else cache.state(self.layer)
        keep = cache is not None
        z, xbc, dt = self.in_proj(x).split([self.heads * self.head_dim, sum(self.sections), self.heads], dim=-1)
        xbc, conv_state = convolve(xbc, [self.conv1d], conv_state, inputs.padding, keep)
        shared_x, shared_b, state_out = xbc.split(self.sections, dim=-1)
        value, state_in = (part.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2)
                           for part in (shared_x, shared_b))  # fmt: skip
        state_out = state_out.unflatten(-1, (self.heads, -1))
        dt = F.softplus(dt.float() + self.dt_bias)
        if inputs.padding is not None:
            dt = dt.masked_fill(~inputs.padding[..., None], 0.0)  # no decay, nothing written
        y, state = ssd(value, dt, -self.A_log.exp(), state_in, state_out, self.D, state, output_final_state=keep)
        if cache is not None:
            assert conv_state is not None and state is not None, "asked for by keep"
            cache.states[self.layer] = (conv_state, state)
        norm = self.norm.weight
        return self.out_proj(
            gated_rms_norm(y.reshape(b, t, -1), z, norm, self.eps, group_size=self.head_dim, norm_before_gate=False)
        )


class HyloGatedDeltaNet(nn.Module):
    """`G`: Gated DeltaNet, S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T, o_t = S_t^T q_t."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    b_proj: nn.Linear
    g_proj: nn.Linear
    q_conv1d: nn.Conv1d
    k_conv1d: nn.Conv1d
    v_conv1d: nn.Conv1d
    # query, key, value, log decay, writing strength, state -> outputs, state
    recurrence: Recurrence = staticmethod(gated_delta_rule)

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.heads, self.eps = layer, c.linear_num_heads, c.layernorm_epsilon
        keys, values = self.heads * c.linear_key_head_dim, self.heads * c.linear_value_head_dim
        for name, width in {"q": keys, "k": keys, "v": values, "g": values, "b": self.heads}.items():
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=False))
        self.build_decay(config)
        for name, width in {"q": keys, "k": keys, "v": values}.items():
            conv = nn.Conv1d(width, width, c.linear_conv_kernel_dim, groups=width, bias=False)
            setattr(self, f"{name}_conv1d", conv)
        self.sections = [keys, keys, values]
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.o_norm = HyloRMSNorm(c.linear_value_head_dim, self.eps)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def build_decay(self, config: HyloConfig) -> None:
        """Build the map to one decay a head, and its bias."""
        self.a_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log decays: [batch, new tokens, hidden] -> [batch, new tokens, heads], fp32."""
        return -self.A_log.exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: None, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        conv_state, state = (None, None) if cache is None else cache.state(self.layer)
        keep = cache is not None
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        convolutions = [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        qkv, conv_state = convolve(qkv, convolutions, conv_state, inputs.padding, keep)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.sections, dim=-1))
        decay, beta = self.log_decay(x), self.b_proj(x).sigmoid()
        if inputs.padding is not None:  # no decay, nothing written
            absent = ~inputs.padding
            decay = decay.masked_fill(absent.view(b, t, *[1] * (decay.dim() - 2)), 0.0)
            beta = beta.masked_fill(absent[..., None], 0.0)
        out, state = self.recurrence(query, key, value, decay, beta, state, output_final_state=keep)
        if cache is not None:
            assert conv_state is not None and state is not None, "asked for by keep"
            cache.states[self.layer] = (conv_state, state)
        gate = self.g_proj(x).view(out.shape)
        return self.o_proj(gated_rms_norm(out, gate, self.o_norm.weight, self.eps, norm_before_gate=True).reshape(b, t, -1))


class HyloKimiDeltaAttention(HyloGatedDeltaNet):
    """`K`: Gated DeltaNet with a decay for each key channel, S_t = Diag(exp(g_t)) S_{t-1} + ...; g from a map of low rank."""

    recurrence: Recurrence = staticmethod(kda)

    def build_decay(self, config: HyloConfig) -> None:
        """Build the low-rank map to the decays, and a bias for each key channel."""
        c = config.architecture()
        keys = self.heads * c.linear_key_head_dim
        self.f_a_proj = nn.Linear(config.hidden_size, c.kda_decay_rank, bias=False)
        self.f_b_proj = nn.Linear(c.kda_decay_rank, keys, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(keys))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log decays: [batch, new tokens, hidden] -> [batch, new tokens, heads, key channels], fp32."""
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)).float() + self.dt_bias)
        return -self.A_log.exp()[:, None] * step.unflatten(-1, (self.heads, -1))


MIXERS: dict[str, tuple[str, type[nn.Module]]] = {  # symbol -> (name in the layer, class)
    "*": ("self_attn", HyloAttention),
    "+": ("self_attn", HyloLatentAttention),
    "M": ("mamba", HyloMamba2),
    "G": ("linear_attn", HyloGatedDeltaNet),
    "K": ("linear_attn", HyloKimiDeltaAttention),
}


class HyloMLP(nn.Module):
    """SwiGLU MLP without biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x: [..., hidden] -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HyloLayer(GradientCheckpointingLayer):
    """A token mixer and an MLP, each behind a norm and with a residual."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.mixer_name, mixer = MIXERS[config.mixers[layer]]
        self.input_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.add_module(self.mixer_name, mixer(config, layer))
        self.post_attention_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.mlp = HyloMLP(config.hidden_size, c.ffn_hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        inputs: SequenceInputs,
        position_embeddings: Rope | None = None,
        past_key_values: HyloCache | None = None,
    ) -> Tensor:
        """Apply mixer and MLP: [batch, new tokens, hidden] -> the same shape."""
        x = hidden_states
        x = x + getattr(self, self.mixer_name)(self.input_layernorm(x), inputs, position_embeddings, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))
