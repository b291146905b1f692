"""Attention of one new token a request to cached latents, in torch; latent_triton.py has it for GPUs.

All heads read the same keys, rows [latent | rotated key | scales], whose latents are the values. With q/k-norm a key of KV head
g is s_g times what it would be without, so its scores are s_g times those. s_g is kept as two numbers of the cache's dtype,
whose sum has twice its digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Cached(NamedTuple):
    """Cached rows of the requests that decode, and how to read them."""

    pages: Tensor  # [pages, tokens a page, row], rows [latent | rotated key | scales]
    table: Tensor  # int32 [requests, pages], pages of each request
    lengths: Tensor  # int32 [requests], tokens with the new one; 0 for padding
    rank: int  # width of a latent
    groups: int  # KV heads with scales on this rank


def decode_torch(query: Tensor, offset: Tensor | None, cached: Cached, scale: float) -> Tensor:
    """Attend to latents, request by request: query [requests, heads, rank + rotary], absorbed -> [requests, heads, rank].

    offset, fp32 [requests, heads], is added to scores before a key's scale; None where keys have no scales. Zeros for padding.
    """
    pages, _, _, rank, groups = cached
    heads, width = query.shape[1:]
    out = query.new_zeros(len(query), heads, rank)
    for i, length in enumerate(cached.lengths.tolist()):
        if not length:
            continue  # padding
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
