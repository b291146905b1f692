"""`+`: MLA over a cache of latents, absorbed in decode steps, with keys and values made anew where prompts are read."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from megatron_hylo.kernels.norm import rms_norm
from megatron_hylo.kernels.rope import unfold_rotary_key
from megatron_hylo.serve.vllm.attention import Rope
from megatron_hylo.serve.vllm.backends import LatentBackend, LatentMetadata
from megatron_hylo.serve.vllm.config import asks_for_reference, latent_row, logger
from megatron_hylo.serve.vllm.latent_kernels import Cached, decode_torch, key_scales, prefill_flash, prefill_torch, split_scales
from megatron_hylo.serve.vllm.recurrence import sharded
from megatron_hylo.serve.vllm.versions import known


def choose_kernels(vllm_config: Any, c: Any) -> tuple[Any, Any]:
    """Choose the kernels of decode steps and of prompts by device, dtype and sizes, and say which."""
    decode, prefill, width = decode_torch, prefill_torch, max(c.qk_head_dim + c.qk_pos_emb_head_dim, c.v_head_dim)
    if current_platform.is_cuda() and not asks_for_reference(vllm_config):
        from megatron_hylo.serve.vllm.latent_triton import decode_triton as decode

        if vllm_config.model_config.dtype != torch.float32 and width % 8 == 0 and width <= 256:
            prefill = prefill_flash
    logger.info_once("HyLo MLA: %d numbers a token, kernels %s and %s", latent_row(c), decode.__name__, prefill.__name__)
    return decode, prefill


class HyloLatentAttention(nn.Module, AttentionLayerBase):
    """MLA with heads [unrotated | rotary] and a shared rotary key, which is cached rotated.

    With q/k-norm a key is s_g [w * (W_g c) | rotation of w * rotary key], with one factor s_g a token and KV head g, which is
    cached beside the latent c: so attention to latents needs no key made anew, with a norm as without.
    """

    pairs: Tensor  # int64 [rotary / 2], the layer's pairs out of the table of frequencies

    def __init__(self, config: Any, layer: int, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        c = config.architecture()
        hidden, tp = config.hidden_size, get_tensor_model_parallel_world_size()
        self.prefix, self.row, self.eps = prefix, latent_row(c), c.layernorm_epsilon
        self.heads, self.groups = c.num_attention_heads // tp, c.num_query_groups // tp
        self.rank, self.plain, self.rotary, self.value = c.kv_lora_rank, c.qk_head_dim, c.qk_pos_emb_head_dim, c.v_head_dim
        self.qk, self.norms, self.whole_head = self.plain + self.rotary, c.qk_layernorm, c.mla_whole_head_norm
        all_heads, compressed = c.num_attention_heads, self.rank + self.rotary
        self.q_a_proj = ReplicatedLinear(hidden, c.q_lora_rank, bias=False, prefix=f"{prefix}.q_a_proj")
        self.q_b_proj = ColumnParallelLinear(c.q_lora_rank, all_heads * self.qk, bias=c.mla_bias, prefix=f"{prefix}.q_b_proj")
        self.kv_a_proj_with_mqa = ReplicatedLinear(hidden, compressed, bias=c.mla_bias, prefix=f"{prefix}.kv_a_proj_with_mqa")
        self.o_proj = RowParallelLinear(all_heads * self.value, hidden, bias=False, prefix=f"{prefix}.o_proj")
        rows = self.groups * (self.plain + self.value)
        self.kv_b_proj: Any = nn.ParameterDict({"weight": sharded(rows, self.rank)})  # vLLM packs its linear layers on CPUs
        if c.mla_bias:
            self.kv_b_proj["bias"] = sharded(rows)
        else:
            self.kv_b_proj.register_buffer("bias", torch.zeros(rows), persistent=False)
        pairs = c.mla_rotary_pairs[layer] if c.mla_rotary_pairs else range(self.rotary // 2)
        self.register_buffer("pairs", torch.tensor(list(pairs)), persistent=False)
        if self.norms:
            self.q_norm, self.k_norm = RMSNorm(self.qk, eps=self.eps), RMSNorm(self.qk, eps=self.eps)
        if self.whole_head:
            self.k_norm.register_parameter("rotary_mix", sharded(self.groups, self.rotary // 2))  # of the shared rotary key
        self.decode_kernel, self.prefill_kernel = choose_kernels(vllm_config, c)
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

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
        turns = torch.complex(*rope)[:, self.pairs]
        query, rows = self.make_queries(x, turns), self.make_rows(x, turns)
        out = x.new_zeros(len(x), self.heads, self.value)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM profiles
            return self.o_proj(out.flatten(1))[0]
        m: LatentMetadata = metadata[self.prefix]
        cache = self.kv_cache[:, 0]  # [blocks, tokens a block, row], perhaps with padding between blocks
        slots, size = m.slots.clamp(min=0), cache.shape[1]  # padding goes to page 0, which vLLM leaves empty
        cache[slots // size, slots % size, : rows.shape[-1]] = rows[: len(slots)].to(cache.dtype)  # scales of this rank's heads
        if m.decodes:
            out[: m.decodes] = self.attend_to_latents(query[: m.decodes], cache, m)
        for prefill in m.prefills:
            key, value = self.expand(cache[prefill.blocks, prefill.places].to(x.dtype))
            out[prefill.tokens] = self.prefill_kernel(query[prefill.tokens], key, value, prefill, self.qk**-0.5)
        return self.o_proj(out.flatten(1))[0]

    def make_queries(self, x: Tensor, turns: Tensor) -> Tensor:
        """Make rotated queries [tokens, heads, qk] of x [tokens, hidden]."""
        query = self.q_b_proj(self.q_a_proj(x)[0])[0].unflatten(-1, (self.heads, self.qk))
        if self.norms:
            query = rms_norm(query, self.q_norm.weight, self.eps, query[..., : self.plain] if self.whole_head else None)
        return self.rotate(query, turns)

    def make_rows(self, x: Tensor, turns: Tensor) -> Tensor:
        """Make the rows that are cached [tokens, row] of x [tokens, hidden]: latent, rotated key and, with q/k-norm, scales."""
        rows = self.kv_a_proj_with_mqa(x)[0]
        if not self.norms:
            return self.rotate(rows, turns)
        latent, rotary = rows.split([self.rank, self.rotary], dim=-1)
        plain, _ = self.up_project(latent)
        if self.whole_head:
            reference = unfold_rotary_key(plain[None], rotary[None], self.k_norm.rotary_mix, self.pairs)[0]
        else:
            reference = torch.cat([plain, rotary[:, None].expand(-1, self.groups, -1)], dim=-1).float()
        scales = (reference.square().mean(-1) + self.eps).rsqrt()
        weighted = (rotary.float() * self.k_norm.weight[self.plain :].float()).to(rotary.dtype)
        rows = self.rotate(torch.cat([latent, weighted], dim=-1), turns)
        return torch.cat([rows, split_scales(scales, latent.dtype)], dim=-1)

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotate the last channels of x [tokens, (heads,) channels] in place, by `turns`, complex64 [tokens, rotary / 2].

        Pairs (2i, 2i + 1) are complex numbers, whose product is three kernels and a third of `apply_rope`'s traffic.
        """
        rotary = x[..., -self.rotary :]
        pairs = torch.view_as_complex(rotary.float().contiguous().unflatten(-1, (-1, 2)))
        rotary.copy_(torch.view_as_real(pairs * (turns if x.dim() == 2 else turns[:, None])).flatten(-2))
        return x

    def up_project(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Make unrotated keys and values [tokens, KV heads, channels] of latents [tokens, rank]."""
        both = F.linear(latent, self.kv_b_proj.weight, self.kv_b_proj.bias).unflatten(-1, (self.groups, -1))
        return both.split([self.plain, self.value], dim=-1)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values [tokens, KV heads, channels] of cached rows."""
        latent, rotated, scales = rows.split([self.rank, self.rotary, self.row - self.rank - self.rotary], dim=-1)
        plain, value = self.up_project(latent.contiguous())
        rotated = rotated[:, None].expand(-1, self.groups, -1)
        if not self.norms:
            return torch.cat([plain, rotated], dim=-1), value
        plain = plain.float() * self.k_norm.weight[: self.plain].float()
        return (torch.cat([plain, rotated], dim=-1) * key_scales(scales, self.groups)[..., None]).to(rows.dtype), value

    def attend_to_latents(self, query: Tensor, cache: Tensor, m: LatentMetadata) -> Tensor:
        """Attend with kv_b_proj absorbed by queries and outputs (DeepSeek-V2, 2.1.2): [requests, heads, qk] -> [..., value].

        A bias of keys adds the same to all scores of a query, which a softmax does not see, unless the keys have scales.
        """
        up, bias = (part.unflatten(0, (self.groups, -1)) for part in (self.kv_b_proj.weight, self.kv_b_proj.bias))
        plain, rotary = query.split([self.plain, self.rotary], dim=-1)
        plain, offset = plain.unflatten(1, (self.groups, -1)), None
        if self.norms:
            plain = plain * self.k_norm.weight[: self.plain]
            offset = torch.einsum("tgnp,gp->tgn", plain.float(), bias[:, : self.plain].float()).flatten(1)
        absorbed = torch.einsum("tgnp,gpr->tgnr", plain, up[:, : self.plain]).flatten(1, 2)
        cached = Cached(cache, m.block_table, m.lengths, self.rank, self.groups)
        out = self.decode_kernel(torch.cat([absorbed, rotary], dim=-1), offset, cached, self.qk**-0.5)
        out = torch.einsum("tgnr,gvr->tgnv", out.unflatten(1, (self.groups, -1)), up[:, self.plain :])
        return (out + bias[:, None, self.plain :]).flatten(1, 2)
