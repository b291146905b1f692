"""Causal attention of a piece's queries to keys and values that are made block by block, as prefill of a long prompt needs.

Only one block of keys and values is there at a time. Each block's softmax sums to one; with the logarithms of what they were
divided by, outputs are combined as in attention_after_prefix.py. No gradients.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_hylo.kernels.attention import choose_backend
from megatron_hylo.kernels.flash_attention_3 import choose_forward, flash_attention_3
from megatron_hylo.kernels.fused_inputs import padded, readable, same_width

aten = torch.ops.aten
SCORES = 2**25  # numbers that the plain form holds at a time, in fp32


def blockwise_attention(
    query: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], own: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """Attend to all blocks, and causally to the queries' own keys.

    Args:
        query: [b, t, hq, d].
        blocks: keys [b, n, hkv, d] and values [b, n, hkv, dv] before the first query's, made as they are asked for.
        own: keys and values of the queries' own tokens, [b, t, hkv, ...].
        scale: factor on the scores.

    Returns:
        [b, t, hq, dv] in query's dtype.
    """
    q = query.transpose(1, 2)
    key, value = own
    out, log_sum = attend_block(q, key.transpose(1, 2), value.transpose(1, 2), scale, causal=query.shape[1] > 1)
    for key, value in blocks:
        added, log_added = attend_block(q, key.transpose(1, 2), value.transpose(1, 2), scale, causal=False)
        total = torch.logaddexp(log_sum, log_added)
        out.lerp_(added, (log_added - total).exp()[..., None])
        log_sum = total
    return out.transpose(1, 2).to(query.dtype)


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to one block, and the logarithms of the softmax's sums.

    Args:
        q: [b, hq, t, d].
        k, v: [b, hkv, n, ...]; n = t where causal.
        scale: factor on the scores.
        causal: query i sees keys 0 .. i.

    Returns:
        [b, hq, t, dv] and [b, hq, t], fp32 (float64 stays).
    """
    wide, width = torch.promote_types(q.dtype, torch.float32), v.shape[-1]
    if choose_forward(q, k, v) != "torch":  # in bf16: with centred keys logarithms of blocks would not be comparable
        out, log_sum = flash_attention_3(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, causal)
        return out.transpose(1, 2).to(wide), log_sum
    if q.is_cuda:  # these operators do not pad by themselves, as scaled_dot_product_attention does
        q, k, v = padded(q, k, v)
    backend = choose_backend(q, k, v, causal)
    if backend in ("cudnn", "flash"):
        q, k, v = (readable(x) for x in (q, k, v))
    if backend == "cudnn":
        out, log_sum, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    elif backend == "flash":
        out, log_sum, *_ = aten._scaled_dot_product_flash_attention(*same_width(q, k, v), 0.0, causal, False, scale=scale)
    else:
        out, log_sum = _plain(q.to(wide), k.to(wide), v.to(wide), scale, causal)
    return out[..., :width].to(wide), log_sum.reshape(q.shape[:3]).to(wide)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax in plain torch, so many queries at a time that the scores stay bounded."""
    (b, heads, t, _), (groups, n) = q.shape, k.shape[1:3]
    outs, log_sums = [], []
    rows = max(1, SCORES // (b * heads * n))
    for first in range(0, t, rows):
        part = q[:, :, first : first + rows]
        scores = torch.einsum("bgrtd,bgnd->bgrtn", part.unflatten(1, (groups, -1)), k) * scale
        if causal:
            seen = torch.arange(n, device=q.device) <= torch.arange(first, first + part.shape[2], device=q.device)[:, None]
            scores = scores.masked_fill(~seen, -torch.inf)
        log_sums.append(scores.logsumexp(-1).flatten(1, 2))
        outs.append(torch.einsum("bgrtn,bgnv->bgrtv", scores.softmax(-1), v).flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(log_sums, 2)
