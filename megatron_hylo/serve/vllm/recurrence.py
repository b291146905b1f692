"""Linear layers by this project's torch kernels, request by request: on CPUs, in fp32, and as a reference."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader

from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.serve.vllm.backends import StateBackend, StateMetadata
from megatron_hylo.serve.vllm.config import uses_reference


def states_of(layer: Any) -> tuple[Tensor, Tensor]:
    """Views of a layer's pages: inputs of the convolution [blocks, channels, taps - 1], recurrent states [blocks, ...]."""
    conv, states = layer.kv_cache[:2]
    return (conv if is_conv_state_dim_first() else conv.transpose(1, 2)), states


class ReferenceMixin:
    """A linear layer of vLLM that this project's torch kernels compute where `reference` is set.

    `step` runs the recurrence on a request's tokens: convolved inputs [1, tokens, channels], others [1, tokens, heads, ...], a
    state as vLLM's pages have it, [1, heads, ...], or None for zeros -> outputs [1, tokens, heads, channels], next state.
    """

    reference: bool
    prefix: str
    conv1d: Any
    step: Callable[..., tuple[Tensor, Tensor | None]]
    forward_reference: Callable[[Tensor], Tensor]

    def choose_kernels(self, vllm_config: Any) -> None:
        """Set `reference`; keep the convolution's weight as loaded then, which vLLM packs for its kernels on some CPUs."""
        self.reference = uses_reference(vllm_config)
        if self.reference:
            self.conv1d.quant_method = None

    def get_attn_backend(self) -> Any:
        """Backend whose metadata the kernels read."""
        return StateBackend if self.reference else super().get_attn_backend()  # type: ignore[misc]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to [tokens, hidden] -> the same shape."""
        return self.forward_reference(hidden_states) if self.reference else super().forward(hidden_states)  # type: ignore[misc]

    def convolve_and_recur(self, x: Tensor, *others: Tensor) -> Tensor:
        """Convolve x [tokens, channels] and step over it, request by request, from their states and into them.

        `others` [tokens, ...] are inputs of the step that are not convolved. Returns [tokens, heads, channels], 0 for padding.
        """
        metadata = get_forward_context().attn_metadata
        m = StateMetadata([0, len(x)], [0], [False]) if metadata is None else metadata[self.prefix]  # None: vLLM profiles
        weight, bias, outputs = self.conv1d.weight.squeeze(1), self.conv1d.bias, []
        for begin, end, slot, continued in zip(m.starts, m.starts[1:], m.slots, m.continued):
            if begin == end:
                continue  # padding
            here = slice(begin, end)
            conv, state = (part[slot][None].clone() for part in states_of(self)) if continued else (None, None)
            y, conv = causal_conv1d(x[None, here], weight, bias, "silu", conv, output_final_state=True)
            y, state = self.step(y, *(part[None, here] for part in others), state)
            outputs.append(y[0])
            if metadata is not None:
                assert conv is not None and state is not None, "asked for"
                for kept, new in zip(states_of(self), (conv, state)):
                    kept[slot] = new[0]
        return F.pad(out := torch.cat(outputs), (0, 0, 0, 0, 0, len(x) - len(out)))


def sharded(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Make a parameter whose rows are this rank's part of an exported tensor's."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]
    return parameter
