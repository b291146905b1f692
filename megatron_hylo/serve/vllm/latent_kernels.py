"""Attention of one new token a request to cached latents, in torch; latent_triton.py has it for GPUs.

All heads read the same keys, rows [latent | rotated key | scales]; the values are the latents. With q/k-norm a key of KV head g
is s_g times what it would be without, so its scores are s_g times those. s_g is kept as two numbers of the cache's dtype, whose sum
has twice its digits.
"""

import torch
from torch import Tensor


def decode_torch(
    query: Tensor,
    offset: Tensor | None,
    cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rank: int,
    groups: int,
    scale: float,
) -> Tensor:
    """Attend to latents, request by request.

    Args:
        query: [requests, heads, rank + rotary], absorbed.
        offset: [requests, heads], added to scores before a key's scale; None where keys have no scales.
        cache: [blocks, tokens a block, row].
        block_table: int32 [requests, blocks].
        lengths: int32 [requests].
        rank: width of a latent.
        groups: KV heads with scales on this rank.
        scale: factor on the scores.

    Returns:
        [requests, heads, rank] in the query's dtype.
    """
    heads, width = query.shape[1:]
    out = query.new_zeros(len(query), heads, rank)
    for i, length in enumerate(lengths.tolist()):
        if not length:
            continue  # padding
        blocks = block_table[i, : -(-length // cache.shape[1])].long()
        rows = cache[blocks].flatten(0, 1)[:length].to(query.dtype)
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
