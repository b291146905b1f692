"""Triton kernel of matvec.py: some rows of the matrix a program."""

try:  # transformers refuses files of a model whose imports fail, unless they are tried
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel of matvec.py needs Triton") from error


@triton.jit
def multiply(
    x, weight, residual, scale, out, rows, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Fill out [rows] with weight [rows, WIDTH] x, with SWIGLU of weight [2 rows, WIDTH], plus `residual`; EVEN: no masks.

    With SCALED each row of the weight is multiplied with its number of `scale`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = tl.arange(0, COLUMNS)
    at = weight + row[:, None] * stride
    second = at + rows * stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    other = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, WIDTH, COLUMNS, loop_unroll_factor=2):
        place = start + column
        if EVEN:
            value = tl.load(x + place).to(tl.float32)[None, :]
            total += tl.load(at + place[None, :]).to(tl.float32) * value
            if SWIGLU:
                other += tl.load(second + place[None, :]).to(tl.float32) * value
        else:
            inside = there[:, None] & (place < WIDTH)[None, :]
            value = tl.load(x + place, mask=place < WIDTH, other=0.0).to(tl.float32)[None, :]
            total += tl.load(at + place[None, :], mask=inside, other=0.0).to(tl.float32) * value
            if SWIGLU:
                other += tl.load(second + place[None, :], mask=inside, other=0.0).to(tl.float32) * value
    result = tl.sum(total, 1)
    if SCALED:
        result *= tl.load(scale + row, mask=there, other=0.0)
    if SWIGLU:
        factor = tl.sum(other, 1)
        if SCALED:
            factor *= tl.load(scale + rows + row, mask=there, other=0.0)
        result = result * tl.sigmoid(result) * factor
    if RESIDUAL:
        result += tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=there)
