"""HyLo models for transformers: attention `*`, Multi-head Latent Attention `+`, Mamba2 `M`, Gated DeltaNet `G`.

The cache holds one latent and one unrotated rotary key a token for `+`, keys and values for `*`, and states of fixed
size for `M` and `G`. Prefill may be cut anywhere. An exported folder holds this file and the kernels files beside
its weights; it needs transformers and torch only. Sources: HyLo (arXiv:2604.24715), and the papers the kernels name.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.norm import gated_rms_norm, rms_norm
from megatron_hylo.kernels.rope import apply_rope, rope_cos_sin, rope_frequencies, unfold_rotary_key
from megatron_hylo.kernels.ssd import ssd

from .cache_hylo import HyloCache
from .configuration_hylo import HyloConfig

Rope = tuple[Tensor, Tensor]  # cos and sin of positions 0 .. s-1, fp32 [s, rotated channels / 2]


class HyloRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """x: [..., channels] -> the same; `reference` [..., any] gives the mean square in place of x."""
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

    def forward(self, x: Tensor, rope: Rope, cache: HyloCache | None) -> Tensor:
        """x: [batch, new tokens, hidden] -> the same."""
        b, t, _ = x.shape
        cos, sin = (table[-t:] for table in rope)
        query, key, value = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        query = apply_rope(self.q_norm(query), cos, sin, interleaved=False)
        key = apply_rope(self.k_norm(key), cos, sin, interleaved=False)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        return self.o_proj(attention(query, key, value, scale=self.head_dim**-0.5).reshape(b, t, -1))


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
        self.qk, self.aligned_norm = c.qk_head_dim + c.qk_pos_emb_head_dim, c.mla_aligned_norm
        self.pairs = list(c.mla_rotary_pairs[layer]) if c.mla_rotary_pairs else None
        self.q_a_proj = nn.Linear(config.hidden_size, c.q_lora_rank, bias=False)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * self.qk, bias=c.mla_bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rotary, bias=c.mla_bias)
        self.kv_b_proj = nn.Linear(self.rank, self.groups * (self.plain + self.value), bias=c.mla_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * self.value, config.hidden_size, bias=False)
        self.q_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        self.k_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        if self.aligned_norm:
            self.k_norm.rotary_mix = nn.Parameter(torch.ones(self.groups, self.rotary // 2))

    def forward(self, x: Tensor, rope: Rope, cache: HyloCache | None) -> Tensor:
        """x: [batch, new tokens, hidden] -> the same."""
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
            base_key = unfold_rotary_key(plain_key, rotary_key, self.k_norm.rotary_mix, pairs)
            query, key = self.q_norm(query, query[..., : self.plain]), self.k_norm(key, base_key)
        else:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.pairs is not None:
            rope = tuple(table[:, self.pairs] for table in rope)
        query, key = self._rotate(query, rope), self._rotate(key, rope)
        return self.o_proj(attention(query, key, value, scale=self.qk**-0.5).reshape(b, t, -1))

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        plain, rotary = x.split([self.plain, self.rotary], dim=-1)
        cos, sin = (table[-x.shape[1] :] for table in rope)
        return torch.cat([plain, apply_rope(rotary, cos, sin, interleaved=True)], dim=-1)


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

    def forward(self, x: Tensor, rope: None, cache: HyloCache | None) -> Tensor:
        """x: [batch, new tokens, hidden] -> the same."""
        b, t, _ = x.shape
        conv_state, state = (None, None) if cache is None else cache.state(self.layer)
        keep = cache is not None
        z, xbc, dt = self.in_proj(x).split([self.heads * self.head_dim, sum(self.sections), self.heads], dim=-1)
        weight = self.conv1d.weight.squeeze(1)
        xbc, conv_state = causal_conv1d(xbc, weight, self.conv1d.bias, "silu", conv_state, output_final_state=keep)
        shared_x, shared_b, state_out = xbc.split(self.sections, dim=-1)
        value, state_in = (part.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2)
                           for part in (shared_x, shared_b))  # fmt: skip
        state_out = state_out.unflatten(-1, (self.heads, -1))
        dt = F.softplus(dt.float() + self.dt_bias)
        y, state = ssd(value, dt, -self.A_log.exp(), state_in, state_out, self.D, state, output_final_state=keep)
        if keep:
            cache.states[self.layer] = (conv_state, state)
        norm = self.norm.weight
        return self.out_proj(
            gated_rms_norm(y.reshape(b, t, -1), z, norm, self.eps, group_size=self.head_dim, norm_before_gate=False)
        )


class HyloGatedDeltaNet(nn.Module):
    """`G`: Gated DeltaNet, S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T, o_t = S_t^T q_t."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.heads, self.eps = layer, c.linear_num_heads, c.layernorm_epsilon
        keys, values = self.heads * c.linear_key_head_dim, self.heads * c.linear_value_head_dim
        for name, width in {"q": keys, "k": keys, "v": values, "g": values, "b": self.heads, "a": self.heads}.items():
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=False))
        for name, width in {"q": keys, "k": keys, "v": values}.items():
            conv = nn.Conv1d(width, width, c.linear_conv_kernel_dim, groups=width, bias=False)
            setattr(self, f"{name}_conv1d", conv)
        self.sections = [keys, keys, values]
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.o_norm = HyloRMSNorm(c.linear_value_head_dim, self.eps)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: None, cache: HyloCache | None) -> Tensor:
        """x: [batch, new tokens, hidden] -> the same."""
        b, t, _ = x.shape
        conv_state, state = (None, None) if cache is None else cache.state(self.layer)
        keep = cache is not None
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        weight = torch.cat([conv.weight.squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        qkv, conv_state = causal_conv1d(qkv, weight, None, "silu", conv_state, output_final_state=keep)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.sections, dim=-1))
        decay = -self.A_log.exp() * F.softplus(self.a_proj(x).float() + self.dt_bias)
        beta = self.b_proj(x).sigmoid()
        out, state = gated_delta_rule(query, key, value, decay, beta, state, output_final_state=keep)
        if keep:
            cache.states[self.layer] = (conv_state, state)
        gate = self.g_proj(x).view(out.shape)
        return self.o_proj(gated_rms_norm(out, gate, self.o_norm.weight, self.eps, norm_before_gate=True).reshape(b, t, -1))


MIXERS: dict[str, tuple[str, type[nn.Module]]] = {  # symbol -> (name in the layer, class)
    "*": ("self_attn", HyloAttention),
    "+": ("self_attn", HyloLatentAttention),
    "M": ("mamba", HyloMamba2),
    "G": ("linear_attn", HyloGatedDeltaNet),
}


class HyloMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HyloLayer(nn.Module):
    """A token mixer and an MLP, each behind a norm and with a residual."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.mixer_name, mixer = MIXERS[config.mixers[layer]]
        self.input_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.add_module(self.mixer_name, mixer(config, layer))
        self.post_attention_layernorm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)
        self.mlp = HyloMLP(config.hidden_size, c.ffn_hidden_size)

    def forward(self, x: Tensor, rope: Rope | None, cache: HyloCache | None) -> Tensor:
        """x: [batch, new tokens, hidden] -> the same."""
        x = x + getattr(self, self.mixer_name)(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class HyloModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: HyloConfig) -> None:
        super().__init__()
        c = config.architecture()
        self.mixers = config.mixers
        latent = c.kv_channels if c.mla_rotary_pairs else c.qk_pos_emb_head_dim  # layers choose out of the base model's table
        self.rotations = {"*": (c.kv_channels, c.rope_scaling), "+": (latent, c.mla_rope_scaling)}
        self.rotary_base = c.rotary_base
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyloLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HyloRMSNorm(config.hidden_size, c.layernorm_epsilon)

    def forward(self, input_ids: Tensor, cache: HyloCache | None) -> Tensor:
        """input_ids: int64 [batch, new tokens], after those in the cache -> hidden states [batch, new tokens, hidden]."""
        x = self.embed_tokens(input_ids)
        length = input_ids.shape[1] + (0 if cache is None else cache.length)
        ropes = {symbol: self._rope(symbol, length, x.device) for symbol in set(self.mixers) & set(self.rotations)}
        for symbol, layer in zip(self.mixers, self.layers):
            x = layer(x, ropes.get(symbol), cache)
        if cache is not None:
            cache.length = length
        return self.norm(x)

    def _rope(self, symbol: str, length: int, device: torch.device) -> Rope:
        channels, scaling = self.rotations[symbol]
        frequencies = rope_frequencies(channels, self.rotary_base, scaling, device)
        return rope_cos_sin(torch.arange(length, device=device), frequencies, scaling.cos_sin_multiplier)


class HyloForCausalLM(PreTrainedModel, GenerationMixin):
    """A HyLo model with its output head."""

    config_class = HyloConfig
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ["HyloLayer"]
    _skip_keys_device_placement = ["cache"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "mamba.D"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.model = HyloModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (HyloMamba2, HyloGatedDeltaNet)):  # decay rates 1 .. heads, step size 0.01
            init.copy_(module.A_log, torch.arange(1, module.heads + 1).log())
            init.constant_(module.dt_bias, math.log(math.expm1(0.01)))
        if isinstance(module, HyloMamba2):
            init.ones_(module.D)
        if isinstance(module, HyloLatentAttention) and module.aligned_norm:
            init.ones_(module.k_norm.rotary_mix)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HyloCache | None = None,
        use_cache: bool = True,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Logits of the tokens after those in the cache.

        Args:
            input_ids: int64 [batch, new tokens]; every sequence starts at position 0 and has no padding.
            attention_mask: all ones, or None.
            past_key_values: continued and changed in place.
            use_cache: make and return a cache where none is given.
            labels: int64 like input_ids, -100 where ignored; asks for the loss of predicting them, shifted by one.
            logits_to_keep: only the last so many tokens' logits, 0 for all; or their indices.

        Returns:
            logits [batch, kept tokens, vocabulary], past_key_values, loss.

        Raises:
            ValueError: an attention mask with zeros.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "attention_mask has zeros, but padding is not supported (it would enter the recurrent states); "
                "give sequences of equal length, or one at a time"
            )
        cache = HyloCache() if past_key_values is None and use_cache else past_key_values
        hidden = self.model(input_ids, cache=cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """Called by generate(), which would make a cache of its own kind."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation {generation_config.cache_implementation!r} is not supported; leave it out")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HyloCache()
