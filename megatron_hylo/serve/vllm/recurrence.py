"""Recurrences of linear layers by this project's torch kernels, request by request: on CPUs, in fp32, and as a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.serve.vllm.backend import Backend, Builder

# convolved inputs [1, tokens, channels], other inputs, a state or None -> outputs [1, tokens, heads, channels], the state after
Step = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass
class StateMetadata:
    """Places of each request's tokens and of its state."""

    starts: list[int]  # of each request's tokens in the batch, and the end
    slots: list[int]  # block of each request's states
    continued: list[bool]  # whether its state holds earlier tokens


class StateBuilder(Builder):
    """Makes StateMetadata once a step."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        """Read the blocks of states for the cache mode that is set."""
        m = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)
        starts = m.query_start_loc_cpu.tolist()
        continued = [length > end - begin for length, begin, end in zip(m.seq_lens.tolist(), starts, starts[1:])]
        return StateMetadata(starts, table[:, 0].tolist(), continued)


class StateBackend(Backend):
    """Backend of linear layers, as far as vLLM asks."""

    builder = StateBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether pages hold states of fixed size."""
        return True


class Referable:
    """A linear layer of vLLM that this project's torch kernels may compute in place of its own."""

    reference: bool

    def get_attn_backend(self) -> Any:
        """Backend whose metadata the kernels read."""
        return StateBackend if self.reference else super().get_attn_backend()  # type: ignore[misc]


def run_reference(layer: Any, x: Tensor, others: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, step: Step) -> Tensor:
    """Convolve x [tokens, channels] and run a recurrence, request by request, from their states and into them.

    `layer.kv_cache` is (convolution's inputs, recurrent states), a row a block; `others` [tokens, ...] are inputs of the step
    that are not convolved; weight and bias are the convolution's, [channels, taps] and [channels].
    Returns [tokens, heads, channels], with zeros for padding.
    """
    metadata = get_forward_context().attn_metadata
    m = StateMetadata([0, len(x)], [], [False]) if metadata is None else metadata[layer.prefix]
    out: Tensor | None = None
    for i, (begin, end) in enumerate(zip(m.starts, m.starts[1:])):
        here, conv, state = slice(begin, end), None, None
        if begin == end:
            continue
        if m.continued[i]:
            conv, state = (part[m.slots[i]][None].clone() for part in layer.kv_cache[:2])
            conv = conv if is_conv_state_dim_first() else conv.transpose(1, 2)
        y, conv = causal_conv1d(x[None, here], weight, bias, "silu", conv, output_final_state=True)
        y, state = step(y, *(part[None, here] for part in others), state)
        out = y.new_zeros(len(x), *y.shape[2:]) if out is None else out
        out[here] = y[0]
        if metadata is not None:
            assert conv is not None and state is not None, "asked for"
            conv = conv if is_conv_state_dim_first() else conv.transpose(1, 2)
            for kept, new in zip(layer.kv_cache, (conv, state)):
                kept[m.slots[i]] = new[0].to(kept.dtype)
    assert out is not None, "a batch has tokens"
    return out


def sharded(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Make a parameter whose rows are this rank's part of an exported tensor's."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]
    return parameter
