"""`+`: MLA over a cache of latents, absorbed in decode steps, with keys and values made anew where prompts are read."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.norm import rms_norm
from megatron_hylo.kernels.rope import apply_rope, unfold_rotary_key
from megatron_hylo.serve.vllm.attention import Rope
from megatron_hylo.serve.vllm.config import REFERENCE, latent_row, logger
from megatron_hylo.serve.vllm.latent_backend import LatentBackend, LatentMetadata, Prefill
from megatron_hylo.serve.vllm.latent_kernels import Cached, decode_torch, key_scales, split_scales
from megatron_hylo.serve.vllm.recurrence import sharded
from megatron_hylo.serve.vllm.versions import known


class Weights(nn.Module):
    """Parameters by name, kept as they are, where vLLM packs those of its linear layers on CPUs."""

    def __init__(self, **parameters: nn.Parameter | None) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class HyloLatentAttention(nn.Module, AttentionLayerBase):
    """MLA with heads [unrotated | rotary] and a shared rotary key, which is cached rotated.

    With q/k-norm a key is s_g [w * (W_g c) | rotation of w * rotary key], with one factor s_g a token and KV head g, which is
    cached beside the latent c: so attention to latents needs no key made anew, with a norm as without.
    """

    pairs: Tensor  # int64, the rotary pairs of the base model's table that the layer has

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        c = config.architecture()
        tp = get_tensor_model_parallel_world_size()
        self.prefix, self.rank, self.rotary, self.row = prefix, c.kv_lora_rank, c.qk_pos_emb_head_dim, latent_row(c)
        self.plain, self.value, self.groups = c.qk_head_dim, c.v_head_dim, c.num_query_groups // tp
        self.heads, self.qk, self.eps = c.num_attention_heads // tp, c.qk_head_dim + c.qk_pos_emb_head_dim, c.layernorm_epsilon
        self.norms, self.whole_head = c.qk_layernorm, c.mla_whole_head_norm
        hidden, queries = config.hidden_size, c.num_attention_heads
        self.q_a_proj = ReplicatedLinear(hidden, c.q_lora_rank, bias=False, prefix=f"{prefix}.q_a_proj")
        self.q_b_proj = ColumnParallelLinear(c.q_lora_rank, queries * self.qk, bias=c.mla_bias, prefix=f"{prefix}.q_b_proj")
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden, self.rank + self.rotary, bias=c.mla_bias, prefix=f"{prefix}.kv_a_proj_with_mqa"
        )
        rows = self.groups * (self.plain + self.value)
        self.kv_b_proj: Any = Weights(weight=sharded(rows, self.rank), bias=sharded(rows) if c.mla_bias else None)
        self.o_proj = RowParallelLinear(queries * self.value, hidden, bias=False, prefix=f"{prefix}.o_proj")
        pairs = c.mla_rotary_pairs[layer] if c.mla_rotary_pairs else range(self.rotary // 2)
        self.chosen = bool(c.mla_rotary_pairs)  # out of the base model's frequencies
        self.register_buffer("pairs", torch.tensor(list(pairs)), persistent=False)
        if self.norms:
            mix = {"rotary_mix": sharded(self.groups, self.rotary // 2)} if self.whole_head else {}  # of the shared rotary key
            self.q_norm: Any = Weights(weight=nn.Parameter(torch.empty(self.qk), requires_grad=False))
            self.k_norm: Any = Weights(weight=nn.Parameter(torch.empty(self.qk), requires_grad=False), **mix)
        self.choose_kernels(vllm_config)
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def choose_kernels(self, vllm_config: Any) -> None:
        """Choose kernels by device, dtype and sizes, and say which."""
        dtype, asked = vllm_config.model_config.dtype, (vllm_config.additional_config or {}).get(REFERENCE)
        self.decode_kernel, self.flash, names = decode_torch, False, ("torch", "torch")
        if current_platform.is_cuda() and asked != "reference":
            from megatron_hylo.serve.vllm.latent_triton import decode_triton

            self.decode_kernel = decode_triton
            self.flash = dtype != torch.float32 and self.qk % 8 == 0 and max(self.qk, self.value) <= 256
            names = "Triton", "FlashAttention" if self.flash else f"torch (no FlashAttention for {dtype} heads of {self.qk})"
        logger.info_once("HyLo MLA: %d numbers a token, decode absorbed by %s, prefill by %s", self.row, *names)

    def get_attn_backend(self) -> type[LatentBackend]:
        """Backend whose metadata this layer reads."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Describe pages of rows; padded pages are fine, so other layers may have larger ones."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.row // 2,
            dtype=vllm_config.model_config.dtype, **known(FullAttentionSpec, indexes_kv_by_block_stride=True),
        )  # fmt: skip

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Apply the mixer to x: [tokens, hidden] -> the same shape."""
        if self.chosen:
            rope = (rope[0][:, self.pairs], rope[1][:, self.pairs])
        query = self.q_b_proj(self.q_a_proj(x)[0])[0].unflatten(-1, (self.heads, self.qk))
        rows = self.kv_a_proj_with_mqa(x)[0]
        if self.norms:
            reference = query[..., : self.plain] if self.whole_head else None
            query = rms_norm(query, self.q_norm.weight, self.eps, reference)
        query, rows = self.rotate(query, rope), self.make_rows(rows, rope)
        out = x.new_zeros(len(x), self.heads, self.value)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM profiles
            return self.o_proj(out.flatten(1))[0]
        m: LatentMetadata = metadata[self.prefix]
        cache = self.kv_cache[:, 0]  # [blocks, tokens a block, row], perhaps with padding between blocks
        slots, size = m.slots.clamp(min=0), cache.shape[1]  # padding goes to page 0, which vLLM leaves empty
        cache[slots // size, slots % size, : rows.shape[-1]] = rows[: len(slots)].to(cache.dtype)
        if m.decodes:
            out[: m.decodes] = self.attend_to_latents(query[: m.decodes], cache, m)
        for prefill in m.prefills:
            key, value = self.expand(cache[prefill.blocks, prefill.places].to(x.dtype))
            out[prefill.tokens] = self.attend(query[prefill.tokens], key, value, prefill)
        return self.o_proj(out.flatten(1))[0]

    def rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Rotate the last channels of x: [tokens, (heads,) channels] -> the same shape."""
        plain, rotary = x.split([x.shape[-1] - self.rotary, self.rotary], dim=-1)
        return torch.cat([plain, apply_rope(rotary[None], *rope, interleaved=True)[0]], dim=-1)

    def make_rows(self, compressed: Tensor, rope: Rope) -> Tensor:
        """Turn latents and rotary keys [tokens, rank + rotary] into cached rows: rotated, weighted, with the keys' scales."""
        if not self.norms:
            return self.rotate(compressed, rope)
        latent, rotary = compressed.split([self.rank, self.rotary], dim=-1)
        plain = F.linear(latent, self.kv_b_proj.weight, self.kv_b_proj.bias).unflatten(-1, (self.groups, -1))[..., : self.plain]
        if self.whole_head:
            reference = unfold_rotary_key(plain[None], rotary[None], self.k_norm.rotary_mix, self.pairs)[0]
        else:
            reference = torch.cat([plain, rotary[:, None].expand(-1, self.groups, -1)], dim=-1).float()
        scales = (reference.square().mean(-1) + self.eps).rsqrt()
        weighted = (rotary.float() * self.k_norm.weight[self.plain :].float()).to(rotary.dtype)
        return torch.cat([self.rotate(torch.cat([latent, weighted], dim=-1), rope), split_scales(scales, latent.dtype)], dim=-1)

    def attend_to_latents(self, query: Tensor, cache: Tensor, m: LatentMetadata) -> Tensor:
        """Attend with kv_b_proj absorbed by queries and outputs (DeepSeek-V2, 2.1.2): [requests, heads, qk] -> [..., value].

        A bias of keys adds the same to all scores of a query, which a softmax does not see, unless the keys have scales.
        """
        up = self.kv_b_proj.weight.unflatten(0, (self.groups, -1))
        plain, rotary = query.split([self.plain, self.rotary], dim=-1)
        if self.norms:
            plain = plain * self.k_norm.weight[: self.plain]
        plain = plain.unflatten(1, (self.groups, -1))
        absorbed = torch.einsum("tgnp,gpr->tgnr", plain, up[:, : self.plain]).flatten(1, 2)
        bias, offset = self.kv_b_proj.bias, None
        if bias is not None:
            bias = bias.unflatten(0, (self.groups, -1))
        if self.norms:
            offset = query.new_zeros(query.shape[:2], dtype=torch.float32)
            if bias is not None:
                offset = torch.einsum("tgnp,gp->tgn", plain.float(), bias[:, : self.plain].float()).flatten(1)
        cached = Cached(cache, m.block_table, m.lengths, self.rank, self.groups)
        out = self.decode_kernel(torch.cat([absorbed, rotary], dim=-1), offset, cached, self.qk**-0.5)
        out = torch.einsum("tgnr,gvr->tgnv", out.unflatten(1, (self.groups, -1)), up[:, self.plain :])
        return (out if bias is None else out + bias[:, None, self.plain :]).flatten(1, 2)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values [tokens, KV heads, channels] of cached rows."""
        latent, rotated = rows[:, : self.rank].contiguous(), rows[:, self.rank : self.rank + self.rotary]
        both = F.linear(latent, self.kv_b_proj.weight, self.kv_b_proj.bias).unflatten(-1, (self.groups, -1))
        plain, value = both.split([self.plain, self.value], dim=-1)
        if not self.norms:
            return torch.cat([plain, rotated[:, None].expand(-1, self.groups, -1)], dim=-1), value
        scales = key_scales(rows[:, self.rank + self.rotary :], self.groups)[..., None]
        plain = (plain.float() * self.k_norm.weight[: self.plain].float() * scales).to(rows.dtype)
        return torch.cat([plain, (rotated[:, None].float() * scales).to(rows.dtype)], dim=-1), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prefill: Prefill) -> Tensor:
        """Causal attention of each request's tokens to all of its: [tokens, heads, qk] -> [tokens, heads, value]."""
        if self.flash:
            from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

            width = max(self.qk, self.value)
            query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
            return flash_attn_varlen_func(
                q=query, k=key, v=value,
                max_seqlen_q=max(prefill.queries), cu_seqlens_q=prefill.query_starts, max_seqlen_k=max(prefill.keys),
                cu_seqlens_k=prefill.key_starts, softmax_scale=self.qk**-0.5, causal=True, fa_version=get_flash_attn_version(),
            )[..., : self.value]  # fmt: skip
        queries, keys, values = query.split(prefill.queries), key.split(prefill.keys), value.split(prefill.keys)
        return torch.cat([attention(q[None], k[None], v[None], self.qk**-0.5)[0] for q, k, v in zip(queries, keys, values)])
