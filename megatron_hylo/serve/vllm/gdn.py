"""`G`: vLLM's own Gated DeltaNet layer, with the project's torch kernels where vLLM's do not run."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as qwen
from vllm.third_party.flash_linear_attention.ops import fused_gdn_prefill_post_conv as preparation
from vllm.third_party.flash_linear_attention.ops import fused_recurrent as decoding
from vllm.triton_utils import triton

from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.serve.vllm.recurrence import ReferenceMixin, sharded

qwen.FLA_CHUNK_SIZE = 4096  # tokens that Triton tunes the kernels of prompts with; vLLM's 64 time the start of a kernel
# Triton refuses vLLM's kernel before the recurrence where blocks of values are wider than those of keys
widest = dict.fromkeys(("BK", "BV"), lambda launch: max(launch["BK"], launch["BV"]))
preparation._fused_post_conv_kernel = triton.heuristics(widest)(preparation._fused_post_conv_kernel)
# vLLM's kernel of decode steps holds a block of a state in the registers of one warp, which 256 key channels overflow
enough = {"num_warps": lambda launch: max(launch["num_warps"], launch["BK"] * launch["BV"] // 4096)}
decode_kernel = triton.heuristics(enough)(decoding.fused_recurrent_gated_delta_rule_packed_decode_kernel)
decoding.fused_recurrent_gated_delta_rule_packed_decode_kernel = decode_kernel


class HyloGatedDeltaNet(ReferenceMixin, qwen.QwenGatedDeltaNetAttention):
    """Gated DeltaNet in Qwen3.5's layout of weights; states are [heads, value channels, key channels]."""

    recurrence: Any = staticmethod(gated_delta_rule)

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        c = config.architecture()
        sizes = SimpleNamespace(
            hidden_size=config.hidden_size, hidden_act="silu", rms_norm_eps=c.layernorm_epsilon,
            linear_num_key_heads=c.linear_num_heads, linear_num_value_heads=c.linear_num_heads,
            linear_key_head_dim=c.linear_key_head_dim, linear_value_head_dim=c.linear_value_head_dim,
            linear_conv_kernel_dim=c.linear_conv_kernel_dim,
        )  # fmt: skip
        super().__init__(sizes, vllm_config, prefix)
        self.register_parameter("dt_bias", sharded(len(self.dt_bias), dtype=torch.float32))  # as the exported tensor
        self.choose_kernels(vllm_config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Make q, k, v [tokens, channels], to be convolved, and the gate [tokens, heads, value channels]."""
        joined, values = self.in_proj_qkvz(x)[0], self.value_dim // self.tp_size
        return joined[:, :-values], joined[:, -values:].unflatten(-1, (-1, self.head_v_dim))

    def decay_and_strength(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and writing strengths of tokens [tokens, hidden]: [tokens, heads] each."""
        b, a = self.in_proj_ba(x)[0].chunk(2, dim=-1)
        return -self.A_log.exp() * F.softplus(a.float() + self.dt_bias), b.sigmoid()

    def heads(self, x: Tensor) -> list[Tensor]:
        """Split convolved q, k, v [1, tokens, channels] into [1, tokens, heads, channels of a head] each."""
        sections = [self.key_dim // self.tp_size, self.key_dim // self.tp_size, self.value_dim // self.tp_size]
        widths = (self.head_k_dim, self.head_k_dim, self.head_v_dim)
        return [part.unflatten(-1, (-1, width)) for part, width in zip(x.split(sections, dim=-1), widths)]

    def forward_reference(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to [tokens, hidden] by torch kernels."""
        qkv, gate = self.project(hidden_states)
        return self._output_projection(self.convolve_and_recur(qkv, *self.decay_and_strength(hidden_states)), gate)

    def step(self, x: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Step over convolved q, k, v with log decays and writing strengths; states [1, heads, value, key channels]."""
        state = None if state is None else state.transpose(-1, -2).float()
        y, after = self.recurrence(*self.heads(x), decay, beta, state, output_final_state=True)
        return y, after.transpose(-1, -2)
