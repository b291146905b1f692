"""`K`: Kimi Delta Attention, Gated DeltaNet with a decay for each key channel (Kimi Linear, arXiv:2510.26692, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers.base import Fields
from megatron_hylo.config.mixers.gdn import GatedDeltaNet

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig


class KimiDeltaAttention(GatedDeltaNet):
    """Sizes of Gated DeltaNet (`linear_*`); the decay comes from a projection of rank `kda_decay_rank`.

    The output gate is Gated DeltaNet's (full rank, SiLU), where Kimi Linear has one of low rank with a sigmoid.
    """

    symbol, name = "K", "KDA"
    size_fields = (*GatedDeltaNet.size_fields, "kda_decay_rank")
    undivided = ("f_a_proj",)
    decay_range = (1.0, 16.0)

    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """Gated DeltaNet's, and the decay's rank as wide as a value head."""
        sizes = super().default_sizes(base, base_name, teacher_shapes)
        return sizes | {"kda_decay_rank": sizes["linear_value_head_dim"]}

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Gated DeltaNet's, with two maps to the decay (f_a, f_b) for its one, and a dt_bias for each key channel."""
        keys = config.linear_num_heads * config.linear_key_head_dim
        names: dict[str, Shape] = {}
        for name, shape in super().tensors(config).items():
            if name == "linear_attn.a_proj.weight":
                names["linear_attn.f_a_proj.weight"] = (config.kda_decay_rank, config.hidden_size)
                names["linear_attn.f_b_proj.weight"] = (keys, config.kda_decay_rank)
            else:
                names[name] = (keys,) if name == "linear_attn.dt_bias" else shape
        return names

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Gated DeltaNet's and a decay for each key channel, before and after its softplus (fp32), and the low-rank input."""
        keys = config.linear_num_heads * config.linear_key_head_dim
        return super().kept_numbers(config, ranks) + config.kda_decay_rank + 3 * keys / ranks
