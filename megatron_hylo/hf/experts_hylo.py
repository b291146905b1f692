"""Mixture of experts: the sparse block of transformers' own Qwen3-MoE."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from .configuration_hylo import HyloConfig

try:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
except ImportError:  # transformers 4 has experts one by one in memory, as they are in a folder
    pass
else:
    register_checkpoint_conversion_mapping("hylo", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True)


class HyloExperts(Qwen3MoeSparseMoeBlock):
    """Router and experts of one layer; tensors have the names of Qwen3-MoE folders."""

    def __init__(self, config: HyloConfig) -> None:
        c = config.architecture()
        sizes = Qwen3MoeConfig(
            hidden_size=c.hidden_size,
            moe_intermediate_size=c.moe_ffn_hidden_size,
            num_experts=c.num_moe_experts,
            num_experts_per_tok=c.moe_router_topk,
            norm_topk_prob=not c.moe_router_pre_softmax,
            hidden_act="silu",
        )
        sizes._experts_implementation = getattr(config, "_experts_implementation", None)
        super().__init__(sizes)
        if not isinstance(self.experts, nn.ModuleList):
            self.register_load_state_dict_pre_hook(_stack)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply each token's experts to x and add the residual: [batch, new tokens, hidden] -> the same shape."""
        out: Any = super().forward(x)
        out = out[0] if isinstance(out, tuple) else out  # transformers 4 returns the router's logits too
        return out if residual is None else residual + out

    def new_weights(self) -> Iterator[nn.Parameter]:
        """Parameters of a new layer that are drawn at random."""
        return (p for p in self.parameters() if not getattr(p, "_is_hf_initialized", False))


def _stack(block: HyloExperts, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Stack experts that come one by one, as transformers' loading does and `load_state_dict` alone does not."""
    own = f"{prefix}experts."
    if f"{own}0.gate_proj.weight" not in tensors:
        return
    gate, up, down = (
        torch.stack([tensors.pop(f"{own}{number}.{part}_proj.weight") for number in range(block.experts.num_experts)])
        for part in ("gate", "up", "down")
    )
    tensors |= {f"{own}gate_up_proj": torch.cat([gate, up], dim=1), f"{own}down_proj": down}
