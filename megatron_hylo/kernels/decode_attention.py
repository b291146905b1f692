"""Attention of one new token to all cached ones: the decode step, bound by the bandwidth at which keys and values are read.

On CUDA the keys are split over programs, whose partial outputs are combined by their log-sum-exp (flash-decoding; Dao et al.,
2023): with one sequence and few heads, one program a head would leave most of the GPU idle. The number of cached tokens may lie
on the device, so that a captured CUDA graph stays valid as the sequence grows. Keys and values may be the same tensor, MLA's
latents, which is read once then, and may be 8 bits wide, with scales (quantised_latents.py).

Sequences of different lengths may lie one after the other in one tensor of rows, each from a row of its own on: a packed batch,
without padding that would take memory or be read.
"""

import torch
from torch import Tensor

from megatron_hylo.kernels.quantised_latents import dequantise_latents
from megatron_hylo.kernels.registry import library_unsupported, select

BLOCK = 64  # keys that a program reads at a time
PROGRAMS = 512  # at least as many, about four a multiprocessor of a large GPU, where there are keys for them
PACKED_PARTS = 1024  # of all sequences of a packed batch: about eight a multiprocessor, so that the last ones end together
WARPS, STAGES = 4, 3  # of a program; blocks of keys that are on their way


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | int,
    scale: float,
    length: Tensor | None = None,
    real: Tensor | None = None,
    scales: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention softmax(scale q k^T) v of one query a sequence and head; query head i reads key head i // (hq / hkv).

    Args:
        q: [b, hq, d], floating.
        k: [b, rows, hkv, d], q's dtype, or 8 bits with `scales`; channels contiguous.
        v: [b, rows, hkv, dv], or a number: values are so many first channels of k.
        scale: factor on the scores.
        length: int [1] on q's device, rows that are keys, the first ones; None: all.
        real: bool [b, rows], rows that are keys, among them one at least; None: all.
        scales: [b, rows, 2], of the first v and of the other channels of k; hkv is 1 then.
        starts: int [b], a packed batch: k, v and scales are [1, rows, ...], and the keys of sequence i are `length[i]` rows
            from `starts[i]` on; `length` is int [b] then, 1 at least, and there is no `real`.

    Returns:
        [b, hq, dv] in q's dtype.

    Raises:
        ValueError: shapes that disagree.
    """
    (b, hq, d), (rows, hkv) = q.shape, k.shape[1:3]
    if starts is not None:
        if length is None or length.shape != (b,) or starts.shape != (b,) or real is not None:
            raise ValueError(f"a packed batch of {b} sequences needs length [{b}] and starts [{b}], and has no padding")
        b = 1
    if k.shape != (b, rows, hkv, d) or hq % hkv or (isinstance(v, Tensor) and v.shape[:3] != k.shape[:3]):
        shape = v if isinstance(v, int) else tuple(v.shape)
        raise ValueError(
            f"q {tuple(q.shape)} [b, hq, d] needs k [b, rows, hkv, d] and v like it, got {tuple(k.shape)}, {shape}"
        )
    if scales is not None and (not isinstance(v, int) or hkv != 1 or scales.shape != (b, rows, 2)):
        raise ValueError(f"scales {tuple(scales.shape)} must be {[b, rows, 2]}, and values the first channels of one key head")
    unsupported = library_unsupported("triton", "triton", q, "pip install triton")
    if select("decode_attention", "triton", unsupported) == "torch":
        if starts is not None:
            assert length is not None
            return _packed_torch(q, k, v, scale, length, scales, starts)
        return _torch(q, k, v, scale, length, real, scales)
    return split_attention(q, k, v, scale, length, real, scales, starts)


def _packed_torch(
    q: Tensor, k: Tensor, v: Tensor | int, scale: float, length: Tensor, scales: Tensor | None, starts: Tensor
) -> Tensor:
    """The definition of a packed batch: each sequence by itself."""
    found = []
    for number, (start, count) in enumerate(zip(starts.tolist(), length.tolist())):
        mine = slice(start, start + count)
        values, own = (v if isinstance(v, int) else v[:, mine]), None if scales is None else scales[:, mine]
        found.append(_torch(q[number : number + 1], k[:, mine], values, scale, None, None, own))
    return torch.cat(found)


def _torch(
    q: Tensor, k: Tensor, v: Tensor | int, scale: float, length: Tensor | None, real: Tensor | None, scales: Tensor | None
) -> Tensor:
    """The definition, scores and softmax in fp32 (float64 stays)."""
    b, hkv = q.shape[0], k.shape[2]
    if scales is not None:
        assert isinstance(v, int)
        k = dequantise_latents(k[:, :, 0], scales, v, q.dtype)[:, :, None]
    value = k[..., :v] if isinstance(v, int) else v
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bghd,bsgd->bghs", q.unflatten(1, (hkv, -1)).to(wide), k.to(wide)) * scale
    keys = torch.arange(k.shape[1], device=q.device)[None]
    visible = keys < (k.shape[1] if length is None else length)
    visible = visible if real is None else visible & real
    # rows that nothing was written into may hold anything: 0 x NaN is NaN
    value = value.to(wide).masked_fill(~visible[..., None, None], 0.0)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bghs,bsgv->bghv", weights, value).reshape(b, q.shape[1], -1).to(q.dtype)


def split_attention(
    q: Tensor, k: Tensor, v: Tensor | int, scale: float, length: Tensor | None, real: Tensor | None, scales: Tensor | None,
    starts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend as `decode_attention` by the Triton kernels, whose arguments and result it has, without its checks.

    The keys of each sequence are divided among several programs, which write fp32 outputs and softmax sums of their part; a
    second kernel combines them (flash decoding). In a packed batch (`starts`) all parts but a sequence's last one are equally
    long.
    """
    from megatron_hylo.kernels.triton_decode_attention import attend_part, combine_packed_parts, combine_parts

    (b, hq, d), (rows, hkv) = q.shape, k.shape[1:3]
    shared = isinstance(v, int)
    width = v if isinstance(v, int) else v.shape[-1]
    first = width if shared else d  # channels of the first product; a shared key's others, MLA's rotary ones, have their own
    packed, columns = starts is not None, max(16, _power(b))
    splits = PACKED_PARTS // hkv if packed else number_of_splits(b * hkv, rows)
    grid = (splits + b, hkv) if packed else (b * hkv, splits)
    q = q.contiguous()
    heads = hq // hkv
    partial = torch.empty(grid[0] * grid[1] * heads, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(len(partial), 2, dtype=torch.float32, device=q.device)  # largest score, sum of exponentials
    out = torch.empty(b, hq, width, dtype=q.dtype, device=q.device)
    value = k if isinstance(v, int) else v
    with torch.cuda.device_of(q):
        attend_part[grid](
            q, k, value, *(q if x is None else x for x in (length, starts, real, scales)),
            partial, sums, scale * 1.4426950408889634, rows, hkv, b,
            k.stride(0), k.stride(1), k.stride(2), value.stride(0), value.stride(1), value.stride(2),
            real.stride(0) if real is not None else 0,
            scales.stride(0) if scales is not None else 0, scales.stride(1) if scales is not None else 0,
            HEADS=heads, HEAD_ROWS=max(16, _power(heads)), FIRST=first, FIRST_COLUMNS=max(16, _power(first)),
            REST=d - first, REST_COLUMNS=max(16, _power(d - first)), WIDTH=width, WIDTH_COLUMNS=max(16, _power(width)),
            SHARED=shared, LENGTH=length is not None, MASKED=real is not None, QUANTISED=scales is not None, SPLITS=splits,
            BLOCK=BLOCK, PACKED=packed, COLUMNS=columns if packed else 16, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        if packed:
            combine_packed_parts[(b, hq)](
                partial, sums, length, out, b, HEADS=hq, PARTS=splits, BLOCK=BLOCK, WIDTH=width,
                WIDTH_COLUMNS=_power(width), TILE=16, COLUMNS=columns, num_warps=4,
            )  # fmt: skip
        else:
            combine_parts[(b * hq,)](
                partial, sums, out, SPLITS=splits, WIDTH=width, COLUMNS=_power(width), TILE=min(splits, 32), num_warps=4
            )  # fmt: skip
    return out


def number_of_splits(programs: int, rows: int) -> int:
    """Return a power of two of parts that keys are split into: enough programs for the GPU, at least 4 blocks a part."""
    wanted = _power(-(-PROGRAMS // programs))
    return max(1, min(wanted, _power(rows // (4 * BLOCK))))


def _power(number: int) -> int:
    """The next power of two, 1 at least."""
    return 1 << max(number - 1, 0).bit_length()
