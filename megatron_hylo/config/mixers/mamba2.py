"""`M`: Mamba2 with B and x from the attention's key/value heads (Mamba-in-the-Llama, Zebra-Llama)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers.base import Fields, MixerDescription

if TYPE_CHECKING:
    from megatron_hylo.config.model import ModelConfig

BACKWARD_SCRATCH = 720  # numbers a token and head that mamba_ssm's backward pass needs besides, measured


class Mamba2(MixerDescription):
    """State-space layer; x and B come from `num_query_groups` heads and are repeated after the convolution."""

    symbol, name, block, recurrent = "M", "Mamba2", "mamba", True
    tensor_parallel_fields = ("num_attention_heads", "num_query_groups", "mamba_num_heads")  # x and B: of key/value heads
    size_fields = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim")
    fp32_parameters = ("A_log", "dt_bias", "D")
    decay_range = (1.0, 16.0)
    norm_after_gate = True

    def check(self, config: ModelConfig) -> None:
        """Check that heads share their x and B evenly.

        Raises:
            ConfigError: num_query_groups does not divide mamba_num_heads, or a size is not positive.
        """
        super().check(config)
        if config.mamba_num_heads % config.num_query_groups:
            raise ConfigError(
                f"mamba_num_heads {config.mamba_num_heads} must be a multiple of num_query_groups {config.num_query_groups}"
            )

    def default_sizes(self, base: ModelConfig, base_name: str | None, teacher_shapes: bool) -> Fields:
        """The attention's heads and sizes, in the paper and with teacher shapes alike."""
        return dict(mamba_num_heads=base.num_attention_heads, mamba_head_dim=base.kv_channels, mamba_state_dim=base.kv_channels)

    def tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Rows of in_proj: z, x, B, C, dt; the convolution runs over x, B (not yet repeated) and C."""
        c, d, heads = config, config.hidden_size, config.mamba_num_heads
        inner, conv = heads * c.mamba_head_dim, _convolved(c)
        return {
            "mamba.in_proj.weight": (inner + conv + heads, d),
            "mamba.conv1d.weight": (conv, 1, c.linear_conv_kernel_dim),
            "mamba.conv1d.bias": (conv,),
            "mamba.dt_bias": (heads,),
            "mamba.A_log": (heads,),
            "mamba.D": (heads,),
            "mamba.norm.weight": (inner,),
            "mamba.out_proj.weight": (d, inner),
        }

    def state_numbers(self, config: ModelConfig) -> int:
        """State [head_dim, state_dim] of each head, and the convolution's last inputs."""
        c = config
        return c.mamba_num_heads * c.mamba_head_dim * c.mamba_state_dim + _convolved(c) * (c.linear_conv_kernel_dim - 1)

    def sequence_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Four FLOPs a state element: its update and its read."""
        return 4.0 * config.mamba_num_heads * config.mamba_head_dim * config.mamba_state_dim

    def kept_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Projected and convolved sections, x and B repeated for all heads, outputs before and after the gated norm."""
        c = config
        inner, state = c.mamba_num_heads * c.mamba_head_dim, c.mamba_num_heads * c.mamba_state_dim
        conv = _convolved(c)
        return c.hidden_size + (inner + conv + c.mamba_num_heads + conv + inner + state + 2 * inner) / ranks

    def scratch_numbers(self, config: ModelConfig, ranks: int) -> float:
        """Scratch tensors of mamba_ssm's backward pass."""
        return BACKWARD_SCRATCH * config.mamba_num_heads / ranks


def _convolved(c: ModelConfig) -> int:
    """Channels of x, B and C."""
    return c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim) + c.mamba_num_heads * c.mamba_state_dim
