"""`M`: Mamba2 as HyLo builds it from attention (Mamba-in-the-Llama map: x from V, B from K, C from Q).

x and B have only the base model's KV heads and are repeated to all heads after the convolution; every head is a
group of its own. h_t = exp(dt A) h_{t-1} + dt x_t B_t^T,  y_t = h_t C_t + D x_t,  out = W_O RMSNorm_head(y * silu(z)).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.sections import split_sections
from megatron_hylo.kernels.ssd import ssd
from megatron_hylo.models.layers import (
    ChannelParallelModule,
    fused_gated_rms_norm,
    sharded_mixer_state,
    tensor_parallel_parameter,
)
from megatron_hylo.models.linear_mixer import ShortConvolution, decay_parameters
from megatron_hylo.models.mixer import Mixer, MixerSubmodules, fused_column_linear, row_linear
from megatron_hylo.models.placement import weights_device
from megatron_hylo.models.transformer_config import HyloTransformerConfig
from megatron_hylo.parallel.documents import Packed, batch_first, sequence_first
from megatron_hylo.parallel.recurrence import ssd_over_ranks


class GatedGroupNorm(ChannelParallelModule):
    """RMSNorm(y * silu(z)) over groups of `group_size` channels; one weight a channel of this rank."""

    def __init__(self, config: HyloTransformerConfig, channels: int, group_size: int, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        self.group_size = group_size
        self.weight = tensor_parallel_parameter(torch.ones(channels, device=weights_device()), dtype=config.params_dtype)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate y by silu(z) and normalise it by groups: [batch, sequence, channels] each, and out."""
        eps = self.config.layernorm_epsilon
        return fused_gated_rms_norm(y, z, self.weight, eps, group_size=self.group_size, norm_before_gate=False)


class Mamba2(Mixer):
    """State-space layer with a state of [head_dim, state_dim] a head."""

    symbol = "M"

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        config = self.config
        tp = self.tp_group.size()
        self.heads, self.groups = c.mamba_num_heads // tp, c.num_query_groups // tp
        inner = self.heads * c.mamba_head_dim
        self.sections = {
            "z": inner,
            "x": self.groups * c.mamba_head_dim,
            "B": self.groups * c.mamba_state_dim,
            "C": self.heads * c.mamba_state_dim,
            "dt": self.heads,
        }
        self.in_proj = fused_column_linear(submodules, config, c.hidden_size, tp * sum(self.sections.values()), self.tp_group)
        self.conv1d = ShortConvolution(config, sum(self.sections[n] for n in "xBC"), bias=True, tp_group=self.tp_group)
        self.norm = GatedGroupNorm(config, inner, c.mamba_head_dim, self.tp_group)
        self.A_log, self.dt_bias = decay_parameters(self.symbol, self.heads)
        self.D = tensor_parallel_parameter(torch.ones(self.heads, device=weights_device()), keep_fp32=True)
        self.out_proj = row_linear(submodules, config, tp * inner, c.hidden_size, self.tp_group)

    def mix(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, None]:
        """Mix tokens: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same shape, and no bias.

        Shapes below: s tokens, n heads and g groups of this rank; with `a2a`, between `exchange` and `heads_to_sequence`, all
        tokens of its share of the heads. p is mamba_head_dim, N mamba_state_dim.
        """
        c, context, documents = self.config.hylo, self.context, self.context.seen(packed)
        projected, _ = self.in_proj(hidden_states)  # [s, b, sum of section widths]
        inner, *widths, heads = self.sections.values()
        z, xbc, dt = split_sections(batch_first(projected, packed), [inner, sum(widths), heads])
        # z [b, s, n p], xbc [b, s, g (p + N) + n N], dt [b, s, n]
        xbc, dt = context.exchange((xbc, widths), (dt, [heads]))
        (b, s, _), widths = dt.shape, [width // context.shares for width in widths]
        own = functools.partial(context.head_shard, widths=[self.sections[name] for name in "xBC"])
        places = documents.own_positions if documents is not None else None
        (xbc,) = self.conv1d(*context.tokens_before([xbc], c.linear_conv_kernel_dim - 1), places, own)
        x, state_in, state_out = xbc.split(widths, dim=-1)  # [b, s, g p], [b, s, g N], [b, s, n N]
        repeats = self.heads // self.groups
        x = x.reshape(b, s, -1, c.mamba_head_dim).repeat_interleave(repeats, dim=2)  # [b, s, n, p]
        # [b, s, n, N]
        state_in = state_in.reshape(b, s, -1, c.mamba_state_dim).repeat_interleave(repeats, dim=2)
        state_out = state_out.reshape(b, s, -1, c.mamba_state_dim)  # [b, s, n, N]
        decay, bias, skip = (context.head_shard(parameter) for parameter in (self.A_log, self.dt_bias, self.D))
        dt = torch.nn.functional.softplus(dt.float() + bias)  # [b, s, n], fp32
        rate = -decay.exp()  # [n], fp32
        reset_mask = documents.reset_mask if documents is not None else None
        inputs = (x, dt, rate, state_in, state_out, skip)
        y = ssd_over_ranks(context, *inputs, reset_mask) if context.uses_all_gather else ssd(*inputs, reset_mask=reset_mask)[0]
        y = context.heads_to_sequence(y.reshape(b, s, -1))  # [b, s, n, p] -> [b, s, n p]
        return self.out_proj(sequence_first(self.norm(y, z), packed))  # [s, b, h]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The fused projection and convolution are stored by section, so that any tensor-parallel size can load them."""
        conv = {name: self.sections[name] for name in "xBC"}
        splits = {"in_proj.weight": self.sections, "conv1d.weight": conv, "conv1d.bias": conv}
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, self.tp_group, splits)
