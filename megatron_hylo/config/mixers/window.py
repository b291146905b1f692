"""`W`: the teacher's attention to a window of the last tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hylo.config.mixers.attention import Attention

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig


class WindowAttention(Attention):
    """`*` whose queries see `attention_window` keys at most, their own the last; keys and values before those are not kept."""

    symbol, name = "W", "windowed attention"
    size_fields = ("attention_window",)

    def kv_numbers(self, config: ModelConfig) -> int:
        """0: the cache does not grow beyond the window."""
        return 0

    def cached_numbers(self, config: ModelConfig, length: int) -> int:
        """Keys and values of the last tokens, a window of them at most."""
        return min(length, config.attention_window) * super().kv_numbers(config)

    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """As attention, over the keys that a query sees in the mean: of a sequence of T, w - w^2 / 2T."""
        window = min(config.attention_window, sequence_length)
        return super().sequence_flops(config, 1) * (2 * window - window**2 / sequence_length)

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """As attention, and for each query head the keys and values of two blocks a block."""
        return super().kept_numbers(config, ranks) + 4 * config.num_attention_heads * config.kv_channels / ranks
