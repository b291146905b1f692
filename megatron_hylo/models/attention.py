"""`*` and `W`: the teacher's attention (Llama, Mistral, Qwen2.5, Qwen3), to all tokens before or to a window of the last ones.

Grouped queries, optional QKV bias and q/k-norm, RoPE.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.rope import apply_rope
from megatron_hylo.kernels.window_attention import window_attention
from megatron_hylo.models.layers import HeadNorm, rotary_table
from megatron_hylo.models.mixer import Mixer, MixerSubmodules, column_linear, row_linear
from megatron_hylo.parallel.documents import Packed, PackedDocuments, batch_first, sequence_first

fused_rope = elementwise(apply_rope)


class GroupedQueryAttention(Mixer):
    """Causal softmax attention; `linear_qkv` has Megatron's order, for each KV head its queries, key, value."""

    symbol = "*"
    window: int | None = None  # keys that a query sees; None: all before it

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        config = self.config
        self.head_dim = c.kv_channels
        self.queries_per_group = c.num_attention_heads // c.num_query_groups
        self.groups = c.num_query_groups // self.tp_group.size()
        width = (c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels
        self.linear_qkv = column_linear(submodules, config, c.hidden_size, width, self.tp_group, bias=c.add_qkv_bias)
        self.linear_proj = row_linear(submodules, config, c.num_attention_heads * c.kv_channels, c.hidden_size, self.tp_group)
        self.q_layernorm = HeadNorm(config, c.kv_channels) if c.qk_layernorm else None
        self.k_layernorm = HeadNorm(config, c.kv_channels) if c.qk_layernorm else None

    def query_key_value(self, hidden_states: Tensor, packed: Packed = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project to query, key and value before the rotation: bias added, q/k-norm applied.

        Args:
            hidden_states: [sequence (/ TP with sequence parallelism), batch, hidden].
            packed: what lies end to end in the sequence.

        Returns:
            query [batch, sequence, KV heads of this rank, queries of each, head_dim], key and value [batch, sequence, KV
            heads, head_dim].
        """
        qkv, _ = self.linear_qkv(hidden_states)  # [s, b, groups (queries + 2) head_dim], with r = queries of a group below
        # [b, s, groups, r + 2, head_dim]
        qkv = batch_first(qkv, packed).unflatten(2, (self.groups, self.queries_per_group + 2, self.head_dim))
        query, key, value = torch.split(qkv, [self.queries_per_group, 1, 1], dim=3)  # [b, s, groups, r or 1, head_dim]
        key, value = key.squeeze(3), value.squeeze(3)  # [b, s, groups, head_dim]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def rotate(self, x: Tensor, documents: PackedDocuments | None = None) -> Tensor:
        """RoPE at this rank's positions: [batch, sequence, heads or groups of heads ..., head_dim] -> the same."""
        c, here = self.config.hylo, self.context.positions(x.shape[1])
        cos, sin = rotary_table(self.head_dim, c.rotary_base, c.rope_scaling, here.stop, x.device)
        places = here if documents is None else documents.own_positions
        return fused_rope(x, cos[places], sin[places], interleaved=False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed = None) -> tuple[Tensor, None]:
        """Rotation, softmax attention and output projection: [sequence (/ TP), batch, hidden], and no bias.

        Shapes below: s tokens and g key/value heads that this rank computes with, r query heads of each.
        """
        documents = self.context.seen(packed)
        if self.context.uses_all_to_all:
            parts = [x.flatten(2) for x in (query, key, value)]
            own = self.context.exchange(*((x, [x.shape[-1]]) for x in parts))
            # all tokens of fewer heads: query [b, s, g r, head_dim], key and value [b, s, g, head_dim]
            query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in own)
        query, key = self.rotate(query, documents), self.rotate(key, documents)
        query = query.flatten(2, -2)  # [b, s, g r, head_dim], a copy already
        if self.context.uses_all_gather:
            key_value = torch.cat([key, value], dim=-1).transpose(0, 1)  # [s, b, g, 2 head_dim]
            # [b, parts_read s, g, head_dim] each
            key, value = self.context.up_to_here(key_value).transpose(0, 1).chunk(2, dim=-1)
        out = self.context.attend(self.softmax_attention(), documents, query, key, value)  # [b, s, g r, head_dim]
        out = self.context.heads_to_sequence(out.flatten(2))  # [b, s, heads of this rank x head_dim]
        return self.linear_proj(sequence_first(out, packed))  # [s, b, h]

    def softmax_attention(self) -> Callable[..., Tensor]:
        """Causal attention, the last query aligned with the last key: function of q [b, t, hq, d] and k, v [b, s, hkv, d]."""
        return functools.partial(attention, scale=self.head_dim**-0.5)

    def mix(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, None]:
        """Mix tokens: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same shape, and no bias."""
        return self.attend(*self.query_key_value(hidden_states, packed), packed)


class WindowAttention(GroupedQueryAttention):
    """Attention of each token to the last `attention_window` ones, itself included; its weights are those of `*`."""

    symbol = "W"

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        self.window = c.attention_window
        super().build(c, submodules)

    def softmax_attention(self) -> Callable[..., Tensor]:
        """Attention within the window; shapes and alignment as of `GroupedQueryAttention.softmax_attention`."""
        assert self.window is not None, "build sets it"
        return functools.partial(window_attention, scale=self.head_dim**-0.5, window=self.window)
