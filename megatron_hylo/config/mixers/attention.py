"""`*`: grouped-query attention, the teacher's own mixer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers.base import Fields, MixerDescription

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig


class Attention(MixerDescription):
    """Softmax attention with `num_query_groups` key/value heads, rotary embedding on whole heads."""

    symbol, name, block, recurrent = "*", "attention", "self_attn", False
    output_fit = "keep"
    tensor_parallel_fields = ("num_attention_heads", "num_query_groups")
    joined = ("q_proj", "k_proj", "v_proj")

    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """No fields: a layer that stays attention is copied, so its sizes are the base model's."""
        return {}

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Projections, biases of q, k and v (Qwen2.5), norms of q and k (Qwen3)."""
        c, d = config, config.hidden_size
        query, key = c.num_attention_heads * c.kv_channels, c.num_query_groups * c.kv_channels
        names: dict[str, Shape] = {
            "self_attn.q_proj.weight": (query, d),
            "self_attn.k_proj.weight": (key, d),
            "self_attn.v_proj.weight": (key, d),
            "self_attn.o_proj.weight": (d, query),
        }
        if c.add_qkv_bias:
            names |= {f"self_attn.{part}_proj.bias": (width,) for part, width in (("q", query), ("k", key), ("v", key))}
        if c.qk_layernorm:
            names |= {f"self_attn.{part}_norm.weight": (c.kv_channels,) for part in "qk"}
        return names

    def kv_numbers(self, config: ModelConfig) -> int:
        """Keys and values: 2 num_query_groups kv_channels."""
        return 2 * config.num_query_groups * config.kv_channels

    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Half of 2 T d_h for the scores and of 2 T d_h for their sum, a head."""
        return config.num_attention_heads * 2 * config.kv_channels * sequence_length

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Projections, rotated queries and keys, output."""
        c = config
        heads = 2 * (c.num_attention_heads + 2 * c.num_query_groups) + c.num_attention_heads
        return c.hidden_size + heads * c.kv_channels / ranks
