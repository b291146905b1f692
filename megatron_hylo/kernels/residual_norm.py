"""RMSNorm that also returns its input for the residual connection; one kernel adds both gradients.

A residual stream is as wide as a model's other tensors, but little is computed of it: what a norm costs is how often the
stream is read and written. The kernel of the gradient reads x and the two gradients once and writes their sum.
"""

import importlib

import torch
from torch import Tensor

from megatron_hylo.kernels.norm import check_weight, rms_norm
from megatron_hylo.kernels.registry import library_unsupported, select

MODULE = "megatron_hylo.kernels.triton_rms_norm"
PROGRAMS = 16  # of the backward pass, a multiprocessor


def rms_norm_and_residual(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (RMSNorm(x), x), the second for the residual connection.

    Args:
        x: [..., n], floating, contiguous on a GPU.
        weight: [n].
        eps: added to the mean square.

    Returns:
        [..., n] in x's dtype, computed in float32 (float64 stays), and x.

    Raises:
        ValueError: weight is not [n].
    """
    unsupported = library_unsupported("triton", MODULE, x, "pip install triton")
    if select("rms_norm", "triton", unsupported) == "torch":
        return rms_norm(x, weight, eps), x
    check_weight("rms_norm", x, weight)
    return _Triton.apply(x.contiguous(), weight, eps)


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return RMSNorm(x) and x itself, [..., n]; keeps one float32 scale a row."""
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        out, scales = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        importlib.import_module(MODULE).normalise[(-(-rows // 2),)](
            x, weight, out, scales, eps, rows, ROWS=2, num_warps=4, **_sizes(width)
        )
        ctx.save_for_backward(x, weight, scales)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx, upstream: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradient of x, the residual's added, and the weight's [n]; either upstream gradient may be None."""
        if upstream is None:  # only the residual was used
            return residual, None, None
        x, weight, scales = ctx.saved_tensors
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        programs = backward_programs(x.device)
        gradient, sums = torch.empty_like(x), torch.empty(programs, width, dtype=torch.float32, device=x.device)
        sizes = _sizes(width)
        tile = dict(ROWS=1, num_warps=1) if sizes["COLUMNS"] <= 1024 else dict(ROWS=2, num_warps=4)  # fastest on Hopper
        importlib.import_module(MODULE).differentiate[(programs,)](
            x, weight, scales, upstream.contiguous(), x if residual is None else residual.contiguous(), gradient, sums, rows,
            SHARE=-(-rows // programs), RESIDUAL=residual is not None, **tile, **sizes,
        )  # fmt: skip
        return gradient, sums.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def backward_programs(device: torch.device) -> int:
    """Number of programs that share the rows of the backward pass."""
    return PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


def _sizes(width: int) -> dict[str, int]:
    return dict(WIDTH=width, COLUMNS=1 << (width - 1).bit_length())  # the next power of two
