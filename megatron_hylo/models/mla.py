"""`+`: HyLo's Multi-head Latent Attention, and the teacher-shaped form of it that can equal the attention it replaces.

HyLo's (model cards and blog) differs from DeepSeek's and Megatron-Core's in that `linear_kv_up_proj` makes only the base
model's KV heads, each shared by a group of query heads; the latents have no layer norm; Qwen's q/k-norm is kept, over the
concatenated (unrotated, rotary) channels of each head and before the rotation. Heads have qk_head_dim +
qk_pos_emb_head_dim = kv_channels channels, and the rotary ones the frequencies of a standard table of their number.

The teacher-shaped form is ours, after TransMLA's RoRoPE (arXiv:2502.07864). qk_head_dim = kv_channels unrotated channels come
first, the rotary ones on top; each layer's rotary pairs take frequencies of the base model's table (mla_rotary_pairs),
several pairs the same one if need be; biases make room for Qwen2.5's (mla_bias). The q/k-norm then is that of the base
model's heads: the unrotated channels of a query are the base model's whole query; the unrotated channels of a key plus
its share of the rotary key (k_layernorm.rotary_mix, see `unfold_rotary_key`) are its whole key. Their mean squares
scale all channels of MLA's query and key, before the rotation. At full rank, with every pair rotary, nothing is lost.
"""

from functools import partial

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.rope import apply_rope, unfold_rotary_key
from megatron_hylo.models.layers import HeadNorm, ReplicatedLinear, WholeHeadKeyNorm, rotary_table
from megatron_hylo.models.mixer import Mixer, MixerSubmodules, column_linear, row_linear
from megatron_hylo.parallel.documents import Packed, batch_first, sequence_first
from megatron_hylo.platform.distributed import device


@elementwise
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2 n channels of every head of x [b, t, h, d] by cos and sin [t, n]."""
    plain, rotary = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    return torch.cat([plain, apply_rope(rotary, cos, sin, interleaved=True)], dim=-1)


@elementwise
def shared_key(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Append the rotated shared key [b, t, 2 n] to every head's own key [b, t, g, d]: [b, t, g, d + 2 n]."""
    rotated = apply_rope(rotary.unsqueeze(2), cos, sin, interleaved=True)
    return torch.cat([plain, rotated.expand(-1, -1, plain.shape[2], -1)], dim=-1)


class MultiLatentAttention(Mixer):
    """Causal attention whose cache is one latent of kv_lora_rank and one rotary key a token."""

    symbol = "+"

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        config = self.config
        bias = c.mla_bias
        self.qk_dim = c.qk_head_dim + c.qk_pos_emb_head_dim
        self.heads = c.num_attention_heads // self.tp_group.size()
        self.groups = c.num_query_groups // self.tp_group.size()
        query_width, kv_width = c.num_attention_heads * self.qk_dim, c.num_query_groups * (c.qk_head_dim + c.v_head_dim)
        self.linear_q_down_proj = ReplicatedLinear(c.hidden_size, c.q_lora_rank, config)
        self.linear_q_up_proj = column_linear(submodules, config, c.q_lora_rank, query_width, self.tp_group, bias)
        self.linear_kv_down_proj = ReplicatedLinear(c.hidden_size, c.kv_lora_rank + c.qk_pos_emb_head_dim, config, bias)
        self.linear_kv_up_proj = column_linear(submodules, config, c.kv_lora_rank, kv_width, self.tp_group, bias)
        self.linear_proj = row_linear(submodules, config, c.num_attention_heads * c.v_head_dim, c.hidden_size, self.tp_group)
        slots = c.qk_pos_emb_head_dim // 2
        pairs = c.mla_rotary_pairs[self.layer] if c.mla_rotary_pairs else range(slots)
        self.register_buffer("rotary_pairs", torch.tensor(pairs, device=device()), persistent=False)
        self.k_layernorm: HeadNorm | WholeHeadKeyNorm
        if c.qk_layernorm:
            self.q_layernorm = HeadNorm(config, self.qk_dim)
            if c.mla_whole_head_norm:
                self.k_layernorm = WholeHeadKeyNorm(config, self.qk_dim, self.groups, slots, self.tp_group)
            else:
                self.k_layernorm = HeadNorm(config, self.qk_dim)

    def mix(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, None]:
        """Mix tokens: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same shape, and no bias.

        Shapes below: s tokens of this rank's queries, t of the keys that they read (s x `parts_read`), n query and g key heads
        of this rank.
        """
        c = self.config.hylo
        query, _ = self.linear_q_up_proj(self.linear_q_down_proj(hidden_states))  # [s, b, r_q] -> [s, b, n d_qk]
        # Context parallelism moves the latents; each rank makes of them what keys and values its queries read.
        cached = self.context.up_to_here(self.linear_kv_down_proj(hidden_states))  # [t (/ TP), b, r_kv + d_rope]
        latent, rotary_key = cached.split([c.kv_lora_rank, c.qk_pos_emb_head_dim], dim=-1)
        key_value, _ = self.linear_kv_up_proj(latent.contiguous())  # [t, b, g (d_nope + d_v)]
        # Every rank's heads read the one rotary key, so its gradient is summed over the ranks.
        if self.config.sequence_parallel:
            rotary_key = gather_from_sequence_parallel_region(rotary_key.contiguous(), group=self.tp_group)
            key_value, rotary_key = self._in_order(key_value), self._in_order(rotary_key)
        else:
            rotary_key = copy_to_tensor_model_parallel_region(rotary_key, group=self.tp_group)
        query = batch_first(query, packed).unflatten(2, (self.heads, self.qk_dim))  # [b, s, n, d_qk]
        key_value = batch_first(key_value, packed).unflatten(2, (self.groups, c.qk_head_dim + c.v_head_dim))
        plain_key, value = key_value.split([c.qk_head_dim, c.v_head_dim], dim=-1)  # [b, t, g, d_nope], [b, t, g, d_v]
        rotary_key, keys = batch_first(rotary_key, packed), key_value.shape[1]  # [b, t, d_rope]; t
        if c.qk_layernorm:
            query, key = self._normalise(query, plain_key, rotary_key)  # [b, s, n, d_qk], [b, t, g, d_qk]
        (query,) = self.context.exchange((query.flatten(2), [self.heads * self.qk_dim]))
        query = query.unflatten(2, (-1, self.qk_dim))  # with `a2a`: all tokens of n / CP heads
        documents, s, own = self.context.seen(packed), query.shape[1], self.context.head_shard
        cos, sin = self._rotary_table(keys)  # [t, d_rope / 2] each
        if documents is not None:
            cos, sin = cos[documents.positions[:keys]], sin[documents.positions[:keys]]
        here = self.context.positions(s)
        query = rotate(query, cos[here], sin[here])
        key = rotate(own(key, dim=2), cos, sin) if c.qk_layernorm else shared_key(own(plain_key, dim=2), rotary_key, cos, sin)
        attend = partial(attention, scale=self.qk_dim**-0.5)
        out = self.context.attend(attend, documents, query, key, own(value, dim=2))  # [b, s, n, d_v]
        out = self.context.heads_to_sequence(out.flatten(2))  # [b, s, n d_v], this rank's tokens again
        return self.linear_proj(sequence_first(out, packed))  # [s, b, h]

    def _normalise(self, query: Tensor, plain_key: Tensor, rotary_key: Tensor) -> tuple[Tensor, Tensor]:
        """Apply q/k-norm before the rotation.

        Args:
            query: [b, s, n, d_qk].
            plain_key: [b, t, g, d_nope].
            rotary_key: [b, t, d_rope], copied for each key head.

        Returns:
            query [b, s, n, d_qk] and key [b, t, g, d_qk].
        """
        c, norm = self.config.hylo, self.k_layernorm
        key = torch.cat([plain_key, rotary_key.unsqueeze(2).expand(-1, -1, self.groups, -1)], dim=-1)
        if not isinstance(norm, WholeHeadKeyNorm):
            return self.q_layernorm(query), norm(key)
        base_key = unfold_rotary_key(plain_key, rotary_key, norm.rotary_mix, self.rotary_pairs)
        return self.q_layernorm(query, reference=query[..., : c.qk_head_dim]), norm(key, reference=base_key)

    def _in_order(self, x: Tensor) -> Tensor:
        """Put [t, b, ...] in token order after sequence parallelism gathered a slice of every context part from each rank."""
        parts = self.context.parts_read
        return x.unflatten(0, (self.tp_group.size(), parts, -1)).transpose(0, 1).flatten(0, 2) if parts > 1 else x

    def _rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Select cos and sin of this layer's rotary pairs, [length, pairs], from the table that all layers share."""
        c = self.config.hylo
        width = c.kv_channels if c.mla_rotary_pairs else c.qk_pos_emb_head_dim
        cos, sin = rotary_table(width, c.rotary_base, c.mla_rope_scaling, length, self.rotary_pairs.device)
        return (cos[:, self.rotary_pairs], sin[:, self.rotary_pairs]) if c.mla_rotary_pairs else (cos, sin)
