"""`M`: vLLM's own Mamba2 layer with a group a head, with the project's torch kernels where vLLM's do not run."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from megatron_hylo.kernels.ssd import ssd
from megatron_hylo.serve.vllm.recurrence import ReferenceMixin, sharded
from megatron_hylo.serve.vllm.versions import known


class HyloMamba2(ReferenceMixin, MambaMixer2):
    """Mamba2 whose x and B, which share the base model's KV heads, are repeated in the weights (weights.py)."""

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        c = config.architecture()
        super().__init__(
            hidden_size=config.hidden_size, ssm_state_size=c.mamba_state_dim, conv_kernel_size=c.linear_conv_kernel_dim,
            intermediate_size=c.mamba_num_heads * c.mamba_head_dim, use_conv_bias=True, use_bias=False,
            n_groups=c.mamba_num_heads, num_heads=c.mamba_num_heads, head_dim=c.mamba_head_dim,
            rms_norm_eps=c.layernorm_epsilon, activation="silu", model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=prefix,
        )  # fmt: skip
        for name in ("dt_bias", "D"):  # as the exported tensors
            self.register_parameter(name, sharded(len(getattr(self, name)), dtype=torch.float32))
        self.choose_kernels(vllm_config)

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Describe the states; the reference has none within a prefill to checkpoint."""
        spec = super().get_kv_cache_spec(vllm_config)
        off = known(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
        return replace(spec, **off) if self.reference else spec

    def forward_reference(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to [tokens, hidden] by torch kernels."""
        projected = self.in_proj(hidden_states)[0]
        gate, xbc, dt = projected.split([self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size], dim=-1)
        out = self.convolve_and_recur(xbc, F.softplus(dt.float() + self.dt_bias))
        return self.out_proj(self.norm(out.flatten(1), gate))[0]

    def step(self, x: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Step over convolved x, B, C with step sizes dt [1, tokens, heads]; states [1, heads, head_dim, state]."""
        value, state_in, state_out = (part.unflatten(-1, (dt.shape[-1], -1)) for part in self.split_hidden_states_B_C_fn(x))
        return ssd(value, dt, self.A.float(), state_in, state_out, self.D, state, output_final_state=True)
