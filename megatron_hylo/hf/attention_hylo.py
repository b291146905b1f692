"""Attention layers of HyLo models: attention `*` and MLA `+`.

The cache holds keys and values for `*`, and one latent and one rotary key a token for `+`, unrotated where a norm comes first.
Few new tokens after many cached ones attend to the latents themselves; a piece of a long prompt makes keys and values of the
cached latents block by block. Source: HyLo (arXiv:2604.24715).
"""

import functools

import torch
from torch import Tensor, nn

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.decode_attention import decode_attention
from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.norm import rms_norm
from megatron_hylo.kernels.quantised_latents import dequantise_latents, quantise_latents
from megatron_hylo.kernels.rope import apply_rope, unfold_rotary_key

from .attend_hylo import attend, attend_in_blocks, choose_tokens, decodes, in_blocks
from .cache_hylo import HyloCache
from .configuration_hylo import HyloConfig
from .fused_hylo import linear, project
from .inputs_hylo import SequenceInputs

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


class HyloAlignedKeyNorm(HyloRMSNorm):
    """RMSNorm of MLA keys by the mean squares that the base model's keys had."""

    def __init__(self, channels: int, eps: float, groups: int, pairs: list[int]) -> None:
        super().__init__(channels, eps)
        self.rotary_mix = nn.Parameter(torch.ones(groups, len(pairs)))  # each head's share of the rotary key
        self.pairs = pairs

    def forward(self, key: Tensor, plain: int) -> Tensor:  # type: ignore[override]
        """Normalise keys [batch, tokens, groups, plain | rotary], the rotary channels being those of all groups."""
        pairs = index_tensor(tuple(self.pairs), key.device)
        return super().forward(key, unfold_rotary_key(key[..., :plain], key[..., 0, plain:], self.rotary_mix, pairs))


def index_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as int64 [n] on the device, copied there once: a captured graph cannot copy from the host."""
    if torch.compiler.is_compiling():  # torch.export traces with false tensors, which must not be kept
        return torch.tensor(numbers, device=device)
    return _kept_index_tensor(numbers, device)


@functools.lru_cache(maxsize=256)
def _kept_index_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def rotate_last(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """Rotate the last `rotary` channels of x: [batch, tokens, (heads,) channels] -> the same shape."""
    plain, turned = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, apply_rope(turned, cos, sin, interleaved=True)], dim=-1)


fused_rotate_last, fused_apply_rope = on_request(rotate_last), on_request(apply_rope)


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

    def query_key_value(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [batch, new tokens, hidden], normalise and rotate: [batch, new tokens, heads or groups, channels] each."""
        cos, sin = (table[:, -x.shape[1] :] for table in rope)
        parts = project(x, [[self.q_proj], [self.k_proj], [self.v_proj]])
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        query = fused_apply_rope(self.q_norm(query), cos, sin, interleaved=False)
        return query, fused_apply_rope(self.k_norm(key), cos, sin, interleaved=False), value

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: Rope, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        query, key, value = self.query_key_value(x, rope)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        scale = self.head_dim**-0.5
        if decodes(query, inputs):
            out = decode_attention(query[:, 0], key, value, scale, inputs.length, inputs.real, starts=inputs.starts)
        elif in_blocks(query, key.shape[1], inputs, makes_keys=False):
            out = attend_in_blocks(
                query, key.shape[1], inputs, scale, lambda rows, tokens: (key[rows][:, tokens], value[rows][:, tokens])
            )
        else:
            out = attend(query, key, value, scale, inputs)
        return linear(self.o_proj, out.reshape(b, t, -1))


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
        self.qk = c.qk_head_dim + c.qk_pos_emb_head_dim
        self.norms, self.aligned_norm = c.qk_layernorm, c.mla_whole_head_norm
        self.pairs = list(c.mla_rotary_pairs[layer]) if c.mla_rotary_pairs else None
        self.q_a_proj = nn.Linear(config.hidden_size, c.q_lora_rank, bias=False)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * self.qk, bias=c.mla_bias)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rotary, bias=c.mla_bias)
        self.kv_b_proj = nn.Linear(self.rank, self.groups * (self.plain + self.value), bias=c.mla_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * self.value, config.hidden_size, bias=False)
        self.q_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        self.k_norm = HyloRMSNorm(self.qk, c.layernorm_epsilon) if c.qk_layernorm else nn.Identity()
        if self.aligned_norm:
            pairs = list(range(self.rotary // 2)) if self.pairs is None else self.pairs
            self.k_norm = HyloAlignedKeyNorm(self.qk, c.layernorm_epsilon, self.groups, pairs)

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: Rope, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        b, t, _ = x.shape
        if self.pairs is not None:
            chosen = index_tensor(tuple(self.pairs), x.device)
            rope = (rope[0][..., chosen], rope[1][..., chosen])
        low, compressed = project(x, [[self.q_a_proj], [self.kv_a_proj_with_mqa]])
        query = linear(self.q_b_proj, low).view(b, t, -1, self.qk)
        if not self.norms:  # nothing stands between the shared key and its rotation
            query, compressed = self._rotate(query, rope), self._rotate(compressed, rope)
        stored: tuple[Tensor, ...] = (compressed,)
        if cache is not None:
            if cache.latents is not None:
                stored = quantise_latents(compressed, self.rank, cache.latents)
            stored = cache.append(self.layer, *stored)
            blockwise = in_blocks(query, stored[0].shape[1], inputs, makes_keys=True)
            if self.absorbs(t) and inputs.attentions is None and (t == 1 or not blockwise):
                return linear(self.o_proj, self._absorbed(query, stored, inputs))
        total = stored[0].shape[1]
        if self.norms:
            query = self._rotate(
                self.q_norm(query, query[..., : self.plain]) if self.aligned_norm else self.q_norm(query), rope
            )

        def make(rows: slice, tokens: slice | Tensor) -> tuple[Tensor, Tensor]:
            """Make keys and values of these sequences' cached tokens, [sequences, tokens, heads, channels] each."""
            turns: Rope = (rope[0], rope[1])
            if self.norms:  # cached keys are rotated
                turns = tuple((table[rows] if len(table) > 1 else table)[:, tokens] for table in rope)  # type: ignore[assignment]
            return self._keys_and_values(tuple(choose_tokens(part, rows, tokens) for part in stored), turns, x.dtype)

        if in_blocks(query, total, inputs, makes_keys=True):
            out = attend_in_blocks(query, total, inputs, self.qk**-0.5, make)
        elif inputs.length is not None:
            key, value = make(slice(None), slice(0, total))  # the last position is the query's
            out = decode_attention(query[:, 0], key, value, self.qk**-0.5, inputs.length, inputs.real)
        else:
            out = attend(query, *make(slice(None), slice(None)), self.qk**-0.5, inputs)
        return linear(self.o_proj, out.reshape(b, t, -1))

    def _keys_and_values(self, stored: tuple[Tensor, ...], rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make keys and values [batch, tokens, groups, ...] of these tokens' latents; `rope` turns those behind a norm."""
        latent, rotary_key = self._loaded(stored, dtype).split([self.rank, self.rotary], dim=-1)
        key_value = self.kv_b_proj(latent).unflatten(-1, (self.groups, self.plain + self.value))
        plain_key, value = key_value.split([self.plain, self.value], dim=-1)
        key = torch.cat([plain_key, rotary_key.unsqueeze(2).expand(-1, -1, self.groups, -1)], dim=-1)
        if self.norms:
            key = self.k_norm(key, self.plain) if self.aligned_norm else self.k_norm(key)
            key = self._rotate(key, rope)
        return key, value

    def _loaded(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return latents and rotary keys [batch, tokens, rank + rotary] of what the cache holds."""
        return stored[0] if len(stored) == 1 else dequantise_latents(stored[0], stored[1], self.rank, dtype)

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Rotate the last channels of x: [batch, tokens, (heads,) channels] -> the same shape."""
        cos, sin = (table[:, -x.shape[1] :] for table in rope)
        return fused_rotate_last(x, cos, sin, self.rotary)

    def absorbs(self, tokens: int) -> bool:
        """Whether attention to latents needs fewer products than making all keys and values anew.

        A norm between the two forbids it; so does a kv_b_proj that is more than its weight (an adapter, a quantised or
        offloaded one).
        """
        if self.norms or type(self.kv_b_proj) is not nn.Linear:
            return False
        weight = self.kv_b_proj.weight
        if type(weight) is not nn.Parameter or weight.is_meta:
            return False
        heads, width = self.q_b_proj.out_features // self.qk, self.plain + self.value
        return tokens * heads * (2 * self.rank - width) < self.rank * self.groups * width

    def _absorbed(self, query: Tensor, stored: tuple[Tensor, ...], inputs: SequenceInputs) -> Tensor:
        """Attend to the latents themselves, with kv_b_proj absorbed by the queries and the outputs (DeepSeek-V2, 2.1.2).

        Its bias adds the same to all scores of a query, which a softmax does not see, and itself to the output.

        Args:
            query: [batch, new tokens, heads, unrotated | rotated].
            stored: the cache's rows, latent | rotated key.
            inputs: the pass's padding.

        Returns:
            [batch, new tokens, heads * value channels].
        """
        b, t, heads, _ = query.shape
        weight = self.kv_b_proj.weight.view(self.groups, self.plain + self.value, self.rank)
        key_weight, value_weight = weight.split([self.plain, self.value], dim=1)
        plain, rotary = query.split([self.plain, self.rotary], dim=-1)
        absorbed = torch.einsum("btgnp,gpr->btgnr", plain.unflatten(2, (self.groups, -1)), key_weight).flatten(2, 3)
        queries = torch.cat([absorbed, rotary], dim=-1)
        if decodes(query, inputs):
            scales = stored[1] if len(stored) == 2 else None
            out = decode_attention(
                queries[:, 0],
                stored[0][:, :, None],
                self.rank,
                self.qk**-0.5,
                inputs.length,
                inputs.real,
                scales,
                inputs.starts,
            )
        else:
            compressed = self._loaded(stored, query.dtype)
            s, mask = compressed.shape[1], inputs.visible(t)
            if mask is None and t > 1:
                mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)[None, None]
            if mask is not None:
                mask = mask.repeat_interleave(heads, dim=2)
            # the keys are the same for all heads, which so stand side by side as queries of one head
            keys = compressed[:, :, None]  # the values are their first channels; a slice would be copied
            out = attention(queries.flatten(1, 2)[:, :, None], keys, keys, self.qk**-0.5, causal=False, mask=mask)
            out = out[..., : self.rank]
        out = torch.einsum("btgnr,gvr->btgnv", out.reshape(b, t, self.groups, -1, self.rank), value_weight)
        if self.kv_b_proj.bias is not None:
            out = out + self.kv_b_proj.bias.view(self.groups, -1)[:, None, self.plain :]
        return out.reshape(b, t, -1)
