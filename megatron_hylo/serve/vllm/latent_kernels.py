"""Attention of new tokens to cached latents in decode steps, and of prompts to keys; latent_triton.py decodes on GPUs.

In decode steps all heads read the same keys, rows [latent | rotated key | scales], whose latents are the values. With q/k-norm
a key of KV head g is s_g times what it would be without, so its scores are s_g times those. s_g is kept as two numbers of the
cache's dtype, whose sum has twice its digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.fused_inputs import readable, same_width


class Cached(NamedTuple):
    """Cached rows of the requests that decode, and how to read them."""

    pages: Tensor  # [pages, tokens a page, row], rows [latent | rotated key | scales]
    table: Tensor  # int32 [requests, pages], pages of each request
    lengths: Tensor  # int32 [requests], tokens with the new one; 0 for padding
    rank: int  # width of a latent
    groups: int  # KV heads with scales on this rank


class Prefill(NamedTuple):
    """Some of the requests that read several tokens: queries that lie side by side, and all tokens that they see."""

    tokens: slice  # of the batch
    queries: list[int]  # tokens a request
    keys: list[int]  # tokens a request, cached ones included
    query_starts: Tensor  # int32 [requests + 1]
    key_starts: Tensor
    blocks: Tensor  # int64 [all keys], pages
    places: Tensor  # in them


def decode_torch(query: Tensor, offset: Tensor | None, cached: Cached, scale: float) -> Tensor:
    """Attend to latents, request by request: query [requests, heads, rank + rotary], absorbed -> [requests, heads, rank].

    offset, fp32 [requests, heads], is added to scores before a key's scale, None where keys have none; `scale` multiplies all.
    Outputs have the query's dtype; zeros for padding.
    """
    pages, _, _, rank, groups = cached
    heads, width = query.shape[1:]
    out = query.new_zeros(len(query), heads, rank)
    for i, length in enumerate(cached.lengths.tolist()):
        blocks = cached.table[i, : -(-length // pages.shape[1])].long()
        rows = pages[blocks].flatten(0, 1)[:length].to(query.dtype)
        scores = (query[i] @ rows[:, :width].T).float()
        if offset is not None:
            scales = key_scales(rows[:, width:], groups).T.repeat_interleave(heads // groups, 0)
            scores = (scores + offset[i, :, None]) * scales
        out[i] = (scores * scale).softmax(-1).to(query.dtype) @ rows[:, :rank]
    return out


def key_scales(parts: Tensor, groups: int) -> Tensor:
    """Scales of keys, fp32 [tokens, groups], from the end of cached rows [tokens, 2 * all groups or more]."""
    return parts[:, :groups].float() + parts[:, groups : 2 * groups].float()


def split_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales fp32 [tokens, groups] as two numbers each: [tokens, 2 * groups]."""
    high = scales.to(dtype)
    return torch.cat([high, (scales - high.float()).to(dtype)], dim=-1)


def prefill_torch(query: Tensor, key: Tensor, value: Tensor, prefill: Prefill, scale: float) -> Tensor:
    """Causal attention of each request's tokens to all of its: [tokens, heads, qk] -> [tokens, heads, value].

    key and value are [keys of all requests, KV heads, qk or value]; scale is a factor on the scores.
    """
    parts = zip(query.split(prefill.queries), key.split(prefill.keys), value.split(prefill.keys))
    return torch.cat([attention(q[None], k[None], v[None], scale)[0] for q, k, v in parts])


def prefill_flash(query: Tensor, key: Tensor, value: Tensor, prefill: Prefill, scale: float) -> Tensor:
    """Attend as `prefill_torch`, by vLLM's FlashAttention, which wants keys and values of one width: zeros are added."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    channels = value.shape[-1]
    query, key, value = (readable(x) for x in same_width(query, key, value))  # values may be a view in the midst of rows
    return flash_attn_varlen_func(
        q=query, k=key, v=value, max_seqlen_q=max(prefill.queries), cu_seqlens_q=prefill.query_starts,
        max_seqlen_k=max(prefill.keys), cu_seqlens_k=prefill.key_starts, softmax_scale=scale, causal=True,
        fa_version=get_flash_attn_version(),
    )[..., :channels]  # fmt: skip
