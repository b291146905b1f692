"""`K`: KDA, Gated DeltaNet with a decay for each key channel, by vLLM's kernels of Kimi Linear or the project's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.kernels.kda import kda
from megatron_hylo.serve.vllm.config import REFERENCE
from megatron_hylo.serve.vllm.gdn import HyloGatedDeltaNet
from megatron_hylo.serve.vllm.recurrence import sharded, states_of


class HyloKimiDeltaAttention(HyloGatedDeltaNet):
    """Gated DeltaNet's layer and states with another decay; gate and norm are Gated DeltaNet's, not Kimi Linear's.

    Raises:
        ConfigError: vLLM's kernel does not take the sizes of keys and values.
    """

    recurrence: Any = staticmethod(kda)

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__(config, layer, vllm_config, prefix)
        rank = config.architecture().kda_decay_rank
        del self.in_proj_ba
        self.b_proj = ColumnParallelLinear(config.hidden_size, self.num_v_heads, bias=False, prefix=f"{prefix}.b_proj")
        self.f_a_proj = ReplicatedLinear(config.hidden_size, rank, bias=False, prefix=f"{prefix}.f_a_proj")
        self.f_b_proj = ColumnParallelLinear(rank, self.key_dim, bias=False, prefix=f"{prefix}.f_b_proj")
        self.register_parameter("dt_bias", sharded(self.key_dim // self.tp_size, dtype=torch.float32))
        if not self.reference and self.head_v_dim % self.head_k_dim:
            sizes = f"linear_value_head_dim {self.head_v_dim} to be a multiple of linear_key_head_dim {self.head_k_dim}"
            raise ConfigError(f"vLLM's KDA kernel needs {sizes}; additional_config {{'{REFERENCE}': 'reference'}} does not")

    def decay_and_strength(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays [tokens, heads, key channels] and writing strengths [tokens, heads] of tokens [tokens, hidden]."""
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)[0])[0].float() + self.dt_bias)
        return -self.A_log.exp()[:, None] * step.unflatten(-1, (-1, self.head_k_dim)), self.b_proj(x)[0].float().sigmoid()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to [tokens, hidden] -> the same shape, by vLLM's Triton kernels or the reference."""
        if self.reference:
            return self.forward_reference(hidden_states)
        from vllm.third_party.flash_linear_attention.ops.kda import chunk_kda, fused_recurrent_kda

        qkv, gate = self.project(hidden_states)
        out = torch.zeros_like(gate, memory_format=torch.contiguous_format)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM profiles
            return self._output_projection(out, gate)
        m = metadata[self.prefix]
        n, slots, starts = m.num_actual_tokens, m.non_spec_state_indices_tensor, m.non_spec_query_start_loc
        decay, beta = (part[None, :n] for part in self.decay_and_strength(hidden_states))
        (conv_states, states), weight = states_of(self), self.conv1d.weight.squeeze(1)
        if m.num_prefills:
            x = causal_conv1d_fn(
                qkv[:n].transpose(0, 1), weight, None, activation="silu", conv_states=conv_states, cache_indices=slots,
                has_initial_state=m.has_initial_state, query_start_loc=starts, metadata=m,
            ).transpose(0, 1)  # fmt: skip
        else:
            x = causal_conv1d_update(qkv[:n], conv_states, weight, None, activation="silu", conv_state_indices=slots[:n])
        q, k, v = (part.contiguous() for part in self.heads(x[None]))
        if m.num_prefills:
            before = states[slots] * m.has_initial_state.view(-1, 1, 1, 1)
            y, after = chunk_kda(
                q=q, k=k, v=v, g=decay, beta=beta, initial_state=before.contiguous(), output_final_state=True,
                use_qk_l2norm_in_kernel=True, cu_seqlens=starts,
            )  # fmt: skip
            states[slots] = after.to(states.dtype)
        else:
            # the kernel wants values as wide as keys: a head of wider ones is as many heads that share its key
            parts = self.head_v_dim // self.head_k_dim
            q, k, g, beta = (part.repeat_interleave(parts, 2) for part in (q, k, decay, beta))
            y, _ = fused_recurrent_kda(
                q=q, k=k, v=v.view(k.shape), g=g, beta=beta, initial_state=states, use_qk_l2norm_in_kernel=True,
                cu_seqlens=starts[: m.num_decodes + 1], ssm_state_indices=slots,
            )  # fmt: skip
            y = y.reshape(v.shape)
        out[:n] = y[0]
        return self._output_projection(out, gate)
