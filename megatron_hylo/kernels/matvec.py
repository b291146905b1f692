"""Product of a matrix with one vector: the linear maps of a decode step at batch 1, bound by the bandwidth of the weights.

On CUDA one kernel reads each weight once and does what else the step needs of the outputs: SwiGLU of two halves, or the sum
with the residual. Libraries' matrix products are made for many rows, and a small kernel takes as long as reading 8 MB. Weights
may be FP8 with a scale a row, half of the bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.registry import library_unsupported, select

# of the matrix, that a program reads at a time: fastest on an H200 for all shapes of a 3B hybrid (tools/tune_decode.py)
ROWS, ROWS_OF_LONG, COLUMNS, WARPS = 2, 8, 1024, 4  # long rows: at least twice as many columns as there are rows


def matvec(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, swiglu: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Compute weight x, or silu(first half of the rows x) * (second half x), perhaps added to the residual.

    Args:
        x: [..., k], floating.
        weight: [n, k], or [2 n, k] with `swiglu`; x's dtype, rows contiguous.
        residual: [..., n], or None.
        swiglu: the rows' first half is the gate, the second one what it multiplies.
        scale: fp32 [rows], which the rows of a weight of 8 bits (float8) are multiplied with; None: x's dtype.

    Returns:
        [..., n] in x's dtype, fp32 inside.

    Raises:
        ValueError: shapes that disagree.
    """
    rows, k = weight.shape
    if x.shape[-1] != k or (swiglu and rows % 2):
        raise ValueError(f"x {tuple(x.shape)} needs a matrix [n, {x.shape[-1]}], n even with swiglu, got {[rows, k]}")
    rows = rows // 2 if swiglu else rows
    if residual is not None and residual.shape != (*x.shape[:-1], rows):
        raise ValueError(f"residual {tuple(residual.shape)} must be {[*x.shape[:-1], rows]}")
    takes = x.numel() == k and (x.dtype == weight.dtype or scale is not None) and weight.stride(1) == 1
    if not takes or select("matvec", "triton", library_unsupported("triton", "triton", x, "pip install triton")) == "torch":
        out = F.linear(x, weight if scale is None else weight.to(x.dtype) * scale[:, None].to(x.dtype))
        if swiglu:
            gate, up = out.chunk(2, -1)
            out = F.silu(gate) * up
        return out if residual is None else residual + out
    return one_vector(x, weight, residual, swiglu, scale)


def one_vector(x: Tensor, weight: Tensor, residual: Tensor | None, swiglu: bool, scale: Tensor | None = None) -> Tensor:
    """Compute `matvec` of one vector by the Triton kernel.

    Args:
        x: [..., k] with one row, on a GPU.
        weight: [n, k], or [2 n, k] with `swiglu`; rows contiguous; x's dtype, or 8 bits with `scale`.
        residual, swiglu, scale: as of `matvec`.

    Returns:
        [..., n] in x's dtype.
    """
    from megatron_hylo.kernels.triton_matvec import multiply

    rows, k = weight.shape[0] // (2 if swiglu else 1), weight.shape[1]
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    tile = ROWS_OF_LONG if k >= 2 * rows else ROWS
    with torch.cuda.device_of(x):
        multiply[(-(-rows // tile),)](
            x, weight, x if residual is None else residual, x if scale is None else scale, out, rows, weight.stride(0),
            WIDTH=k, ROWS=tile, COLUMNS=COLUMNS, EVEN=k % COLUMNS == 0 and rows % tile == 0, SWIGLU=swiglu,
            RESIDUAL=residual is not None, SCALED=scale is not None, num_warps=WARPS,
        )  # fmt: skip
    return out
