"""The Triton kernel of sections.py: some rows of all parts a program."""

import triton
import triton.language as tl


@triton.jit
def place(parts, out, rows, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr):
    """Put parts [rows, WIDTHS[i]] side by side into `out` [rows, TOTAL]; COLUMNS[i] is the power of two from WIDTHS[i] on.

    Sizes are constants, so that the compiler sees where 16 bytes go at once.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None]
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        column = tl.arange(0, COLUMNS[i])[None, :]
        inside = (row[:, None] < rows) & (column < WIDTHS[i])
        value = tl.load(parts[i] + at * WIDTHS[i] + column, mask=inside)
        tl.store(out + at * TOTAL + first + column, value, mask=inside)
        first += WIDTHS[i]
