"""Attention of one new token a request to cached latents in Triton: heads share the keys, programs share the sequence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_hylo.serve.vllm.latent_kernels import Cached


def decode_triton(query: Tensor, offset: Tensor | None, cached: Cached, scale: float) -> Tensor:
    """Attend to latents as `decode_torch` does, on a GPU; the grid follows from shapes alone, so it can be captured."""
    (requests, heads, width), (pages, table, lengths, rank, groups) = query.shape, cached
    query, head_blocks = query.contiguous(), triton.cdiv(heads, 16)
    splits = min(64, max(1, triton.next_power_of_2(528 // max(1, requests * head_blocks))))  # 4 programs a multiprocessor
    partial = query.new_empty(requests, heads, splits, rank, dtype=torch.float32)
    weights = query.new_empty(requests, heads, splits, dtype=torch.float32)
    _decode[(requests, head_blocks, splits)](
        query, weights if offset is None else offset, pages, table, lengths, partial, weights, scale,
        pages.stride(0), pages.stride(1), table.stride(0), heads, RANK=rank, ROTARY=width - rank,
        PADDED_RANK=max(16, triton.next_power_of_2(rank)), PADDED_ROTARY=max(16, triton.next_power_of_2(width - rank)),
        PAGE=pages.shape[1], GROUPS=groups, HEADS_A_GROUP=heads // groups, SPLITS=splits, SCALED=offset is not None,
        TOKENS=32, num_warps=4,
    )  # fmt: skip
    shares = weights.softmax(-1).nan_to_num()  # rows of padding have no keys
    return torch.einsum("bhs,bhsr->bhr", shares, partial).to(query.dtype)


@triton.jit
def _decode(
    query, offset, pages, table, lengths, partial, weights, scale, page_stride, row_stride, table_stride, heads,
    RANK: tl.constexpr, ROTARY: tl.constexpr, PADDED_RANK: tl.constexpr, PADDED_ROTARY: tl.constexpr, PAGE: tl.constexpr,
    GROUPS: tl.constexpr, HEADS_A_GROUP: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    request, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * 16 + tl.arange(0, 16)
    is_head = head < heads
    latent, rotary = tl.arange(0, PADDED_RANK), tl.arange(0, PADDED_ROTARY)
    is_latent, is_rotary = latent < RANK, rotary < ROTARY
    length = tl.load(lengths + request)
    share = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    begin = split * share
    end = tl.minimum(begin + share, length)

    here = query + (request * heads + head[:, None]) * (RANK + ROTARY)
    query_latent = tl.load(here + latent[None, :], mask=is_head[:, None] & is_latent[None, :], other=0.0)
    query_rotary = tl.load(here + RANK + rotary[None, :], mask=is_head[:, None] & is_rotary[None, :], other=0.0)
    highest = tl.full([16], -float("inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    out = tl.zeros([16, PADDED_RANK], tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = token < end
        block = tl.load(table + request * table_stride + token // PAGE, mask=is_token, other=0).to(tl.int64)
        row = pages + block * page_stride + (token % PAGE) * row_stride
        key = tl.load(row[:, None] + latent[None, :], mask=is_token[:, None] & is_latent[None, :], other=0.0)
        rotated = tl.load(row[:, None] + RANK + rotary[None, :], mask=is_token[:, None] & is_rotary[None, :], other=0.0)
        scores = tl.dot(query_latent, tl.trans(key), input_precision="ieee")
        scores += tl.dot(query_rotary, tl.trans(rotated), input_precision="ieee")
        if SCALED:
            parts = row[None, :] + RANK + ROTARY + head[:, None] // HEADS_A_GROUP
            there = is_head[:, None] & is_token[None, :]
            high = tl.load(parts, mask=there, other=0.0).to(tl.float32)
            low = tl.load(parts + GROUPS, mask=there, other=0.0).to(tl.float32)
            scores = (scores + tl.load(offset + request * heads + head, mask=is_head, other=0.0)[:, None]) * (high + low)
        scores = tl.where(is_token[None, :], scores * scale, -float("inf"))
        top = tl.maximum(highest, tl.max(scores, 1))
        kept = tl.exp(highest - top)
        probabilities = tl.exp(scores - top[:, None])
        total = total * kept + tl.sum(probabilities, 1)
        out = out * kept[:, None] + tl.dot(probabilities.to(key.dtype), key, input_precision="ieee")
        highest = top
    seen = end > begin
    place = (request * heads + head) * SPLITS + split
    out = tl.where(seen, out / tl.where(seen, total, 1.0)[:, None], 0.0)
    tl.store(partial + place[:, None] * RANK + latent[None, :], out, mask=is_head[:, None] & is_latent[None, :])
    tl.store(weights + place, tl.where(seen, highest + tl.log(total), -float("inf")), mask=is_head)
