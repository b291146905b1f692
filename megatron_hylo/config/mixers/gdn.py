"""`G`: Gated DeltaNet as fla's layer has it (HyLo, appendix A.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers.base import Fields, MixerDescription

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig


class GatedDeltaNet(MixerDescription):
    """Delta-rule recurrence with one decay a head and an output gate."""

    symbol, name, block, recurrent = "G", "Gated DeltaNet", "linear_attn", True
    tensor_parallel_fields = ("linear_num_heads",)
    size_fields: ClassVar[tuple[str, ...]] = ("linear_num_heads", "linear_key_head_dim", "linear_value_head_dim")
    fp32_parameters = ("A_log", "dt_bias")
    joined = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    decay_range = (0.0, 16.0)

    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """The paper's: key width 0.75 d in heads of 256 (or the next size that divides), values twice as wide.

        With teacher shapes: the attention's heads.
        """
        if teacher_shapes:
            heads, keys, values = base.num_attention_heads, base.kv_channels, base.kv_channels
        else:
            width = base.hidden_size * 3 // 4
            keys = next((h for h in (256, 144, 128, 64, 48, 32, 16, 8) if width % h == 0), width)
            heads, values = width // keys, 2 * keys
        return dict(linear_num_heads=heads, linear_key_head_dim=keys, linear_value_head_dim=values)

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Projections of query, key, value, gate, writing strength (b) and decay (a), convolutions, norm, output."""
        c, d, heads, kernel = config, config.hidden_size, config.linear_num_heads, config.linear_conv_kernel_dim
        keys, values = heads * c.linear_key_head_dim, heads * c.linear_value_head_dim
        return {
            "linear_attn.q_proj.weight": (keys, d),
            "linear_attn.k_proj.weight": (keys, d),
            "linear_attn.v_proj.weight": (values, d),
            "linear_attn.g_proj.weight": (values, d),
            "linear_attn.b_proj.weight": (heads, d),
            "linear_attn.a_proj.weight": (heads, d),
            "linear_attn.q_conv1d.weight": (keys, 1, kernel),
            "linear_attn.k_conv1d.weight": (keys, 1, kernel),
            "linear_attn.v_conv1d.weight": (values, 1, kernel),
            "linear_attn.A_log": (heads,),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.o_norm.weight": (c.linear_value_head_dim,),
            "linear_attn.o_proj.weight": (d, values),
        }

    def state_numbers(self, config: ModelConfig) -> int:
        """State [key_head_dim, value_head_dim] of each head, and the convolutions' last inputs."""
        c = config
        convolved = c.linear_num_heads * (2 * c.linear_key_head_dim + c.linear_value_head_dim)
        state = c.linear_num_heads * c.linear_key_head_dim * c.linear_value_head_dim
        return state + convolved * (c.linear_conv_kernel_dim - 1)

    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Six FLOPs a state element: decay and correction, update, read."""
        return 6.0 * config.linear_num_heads * config.linear_key_head_dim * config.linear_value_head_dim

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Projected and convolved sections, queries and keys normalised, outputs before and after the gate."""
        c = config
        keys, values = c.linear_num_heads * c.linear_key_head_dim, c.linear_num_heads * c.linear_value_head_dim
        projected, mixed = 2 * (keys + values + c.linear_num_heads), 2 * keys + values
        return c.hidden_size + (projected + mixed + 2 * keys + 2 * values) / ranks

    def scratch_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Solutions of the chunks' triangular systems."""
        return 2 * config.linear_num_heads * (config.linear_key_head_dim + config.linear_value_head_dim) / ranks
