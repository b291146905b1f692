"""Causal attention of each token to a window of the last ones, itself included (sliding-window attention).

Queries stand in blocks of at least a window, and a block's keys are its own and those of the block before: work and memory grow
with the sequence, not with its square. All blocks after the first have one mask, so torch's scaled_dot_product_attention runs
them as a batch. A window counts as transformers' `sliding_window` does (Mistral 7B, arXiv:2310.06825, section 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.flash_attention_3 import Documents
from megatron_hylo.kernels.registry import use

BLOCK = 64  # tokens that a block's length is a multiple of: fused kernels want masks of even rows


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    real: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attention softmax(scale q k^T) v over the last `window` keys; query head i reads key/value head i // (hq / hkv).

    Args:
        q: [b, t, hq, d], floating.
        k: [b, s, hkv, d], s >= t: query i stands at key s - t + i, and sees it and the window - 1 before it.
        v: [b, s, hkv, dv].
        scale: factor on the scores.
        window: keys that a query sees, at least 1.
        real: bool [b, s], False at keys that only their own query sees; None: there are none. They count in the window.
        documents: ranges of queries and of keys that attend to each other alone, in order and without gaps; None: one.

    Returns:
        [b, t, hq, dv] in q's dtype.

    Raises:
        ValueError: no positive window, more queries than keys, or documents with keys that are not real.
    """
    if documents is not None:
        if real is not None:
            raise ValueError("window attention takes documents or real keys, not both")
        return torch.cat([window_attention(q[:, own], k[:, seen], v[:, seen], scale, window) for own, seen in documents], 1)
    (t, s), size = (q.shape[1], k.shape[1]), -(-window // BLOCK) * BLOCK
    if window < 1 or t > s:
        raise ValueError(f"a window needs at least 1 key and no more queries than keys, got {window}, {t} queries, {s} keys")
    use("window_attention", "torch", "blocks of a window, by scaled_dot_product_attention")
    before = min(s - t, window - 1)  # keys before the first query's that it sees
    k, v = k[:, s - t - before :], v[:, s - t - before :]
    real = None if real is None else real[:, s - t - before :]
    if real is None and before + t <= window:
        return attention(q, k, v, scale)
    head, first = before + min(size, t), min(size, t)
    seen = _visible(first, head, window, q.device)
    mask = seen if real is None else _own_or_real(seen, real[:, None, None, :head], before)
    out = attention(q[:, :first], k[:, :head], v[:, :head], scale, mask=mask)
    if t <= size:
        return out
    q, k, v = (_in_blocks(x[:, place:], size) for x, place in ((q, 0), (k, before), (v, before)))  # [b, blocks, size, ...]
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1) for x in (k, v))  # [b (blocks - 1), 2 size, hkv, ...]
    mask = seen = _visible(size, 2 * size, window, q.device)
    if real is not None:
        kept = _in_blocks(real[:, before:], size)
        mask = _own_or_real(seen, torch.cat([kept[:, :-1], kept[:, 1:]], 2).flatten(0, 1)[:, None, None], size)
    rest = attention(q[:, 1:].flatten(0, 1), k, v, scale, mask=mask).unflatten(0, (len(out), -1)).flatten(1, 2)
    return torch.cat([out, rest[:, : t - size]], 1)


def _visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask of the keys within the window of queries that stand at the last of them: bool [1, 1, queries, keys]."""
    place = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return ((place >= 0) & (place < window))[None, None]


def _own_or_real(seen: Tensor, real: Tensor, before: int) -> Tensor:
    """Take keys that are not real out of a mask, but for each query's own: a row without any key has no softmax."""
    own = torch.ones(seen.shape[2:], dtype=torch.bool, device=seen.device).tril(before).triu(before)
    return seen & (real | own)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """Cut [b, tokens, ...] into blocks, [b, blocks, size, ...], the last one filled up with zeros."""
    spare = -x.shape[1] % size
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, spare)).unflatten(1, (-1, size))
