"""Triton kernels of residual_norm.py: some rows a program; the gradient in one reading of what it is made of."""

import triton
import triton.language as tl


@triton.jit
def normalise(x, weight, out, scales, eps, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Fill `out` [rows, WIDTH] with x / rms(x) * weight, and `scales` fp32 [rows] with 1 / rms(x)."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < WIDTH)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + at, (value * scale[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def differentiate(
    x, weight, scales, upstream, residual, gradient, weight_gradient, rows,
    SHARE: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fill `gradient` [rows, WIDTH] with that of x, `residual` added.

    A program has SHARE rows, and puts the sum over them that the weight's gradient consists of into its row of
    `weight_gradient`, fp32 [programs, WIDTH].
    """
    program, column = tl.program_id(0), tl.arange(0, COLUMNS)
    valid = column < WIDTH
    factor = tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, SHARE, ROWS):
        within = start + tl.arange(0, ROWS)
        row = program * SHARE + within
        there = (within < SHARE) & (row < rows)
        inside = there[:, None] & valid[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        scale = tl.load(scales + row, mask=there, other=0.0)
        normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        above = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        total += above * normal
        weighted = above * factor[None, :]
        along = tl.sum(weighted * normal, 1) / WIDTH
        below = (weighted - normal * along[:, None]) * scale[:, None]
        if RESIDUAL:
            below += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + at, below.to(gradient.dtype.element_ty), mask=inside)
    tl.store(weight_gradient + program * WIDTH + column, tl.sum(total, 0), mask=valid)
