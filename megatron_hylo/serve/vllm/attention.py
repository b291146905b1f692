"""`*`: attention of Llama, Qwen2.5 and Qwen3 by vLLM's own Attention, with the rotation of the exported model."""

from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from megatron_hylo.kernels.rope import apply_rope

Rope = tuple[Tensor, Tensor]  # cos and sin of the batch's tokens, fp32 [tokens, rotated channels / 2]


class HyloAttention(nn.Module):
    """Causal attention with grouped queries, optional biases and q/k-norm."""

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        c, tp = config.architecture(), get_tensor_model_parallel_world_size()
        self.head_dim, heads, groups = c.kv_channels, c.num_attention_heads, c.num_query_groups
        self.sections = [heads // tp * self.head_dim, groups // tp * self.head_dim, groups // tp * self.head_dim]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, groups, bias=c.add_qkv_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj")
        norms = (RMSNorm(self.head_dim, eps=c.layernorm_epsilon) if c.qk_layernorm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.attn = Attention(
            heads // tp, self.head_dim, self.head_dim**-0.5, num_kv_heads=groups // tp,
            cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Apply the mixer to x: [tokens, hidden] -> the same shape."""
        query, key, value = self.qkv_proj(x)[0].split(self.sections, dim=-1)
        query, key = (part.unflatten(-1, (-1, self.head_dim)).contiguous() for part in (query, key))
        query, key = self.q_norm(query), self.k_norm(key)
        query, key = (apply_rope(part[None], *rope, interleaved=False)[0].flatten(1) for part in (query, key))
        return self.o_proj(self.attn(query, key, value))[0]
