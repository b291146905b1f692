"""Parts that the recurrent mixers share: the short convolution and the parameters of the decay."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.initialise.defaults import inverse_softplus_step, log_decay_rate
from megatron_hylo.kernels.causal_conv1d import causal_conv1d_sections
from megatron_hylo.models.layers import ChannelParallelModule, tensor_parallel_parameter
from megatron_hylo.models.placement import weights_device
from megatron_hylo.models.transformer_config import HyloTransformerConfig


def decay_parameters(symbol: str, heads: int, steps: int | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh A_log and dt_bias of a recurrent mixer, different on each tensor-parallel rank.

    Args:
        symbol: the mixer; its description has the range of A.
        heads: heads of this rank, the length of A_log.
        steps: length of dt_bias; by default one a head.

    Returns:
        Two fp32 parameters.
    """
    bounds = MIXERS[symbol].decay_range
    assert bounds is not None, f"mixer {symbol} has no decay"
    with get_cuda_rng_tracker().fork():
        decay = log_decay_rate(heads, bounds, device=weights_device())
        step = inverse_softplus_step(steps or heads, device=weights_device())
    return tensor_parallel_parameter(decay, keep_fp32=True), tensor_parallel_parameter(step, keep_fp32=True)


class ShortConvolution(ChannelParallelModule):
    """Depthwise causal convolution over `channels` of this rank, SiLU after it. Weight [channels, 1, kernel]."""

    def __init__(self, config: HyloTransformerConfig, channels: int, bias: bool, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        kernel, where = config.hylo.linear_conv_kernel_dim, weights_device()
        bound = 1 / math.sqrt(kernel)  # nn.Conv1d's default for one input channel a group
        with get_cuda_rng_tracker().fork():
            weight = torch.empty(channels, 1, kernel, device=where).uniform_(-bound, bound)
            offset = torch.empty(channels, device=where).uniform_(-bound, bound)
        self.weight = tensor_parallel_parameter(weight, dtype=config.params_dtype)
        self.bias = tensor_parallel_parameter(offset, dtype=config.params_dtype) if bias else None

    def forward(
        self,
        sections: Sequence[Tensor],
        before: Tensor | None = None,
        positions: Tensor | None = None,
        own: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    ) -> list[Tensor]:
        """Convolve the sections of the channels, [batch, sequence, width] each, into contiguous tensors of the same shapes.

        Args:
            sections: the inputs, all channels together.
            before: the tokens before them, [batch, all channels, kernel - 1].
            positions: place of each token in its document, int64 [sequence]; no tap reaches before a document.
            own: weight or bias of all channels -> that of the sections' channels.
        """
        weight, bias = own(self.weight.squeeze(1)), own(self.bias) if self.bias is not None else None
        return causal_conv1d_sections(sections, weight, bias, "silu", before, positions)
