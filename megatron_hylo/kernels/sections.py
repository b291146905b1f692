"""Sections of a fused projection: views of it; their gradients are put side by side by one kernel.

torch's own takes more than twice as long as memory does where a row is no multiple of 16 channels (H200).
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hylo.kernels.registry import library_unsupported, select

MODULE = "megatron_hylo.kernels.triton_concatenate"


def split_sections(projected: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Sections of a fused projection, [..., width] each; channels after them are padding."""
    return _Sections.apply(projected, [*widths, projected.shape[-1] - sum(widths)])[: len(widths)]


class _Sections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        """Return views of x [..., sum of widths], [..., width] each."""
        return x.split(widths, dim=-1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        """Concatenate the sections' gradients to that of x; those of width 0 are left out."""
        return concatenate([grad for grad in grads if grad.shape[-1]]), None


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last dimension; on a GPU without a gradient.

    Args:
        parts: [..., width] each, of one dtype; no width is 0.

    Returns:
        [..., sum of widths].
    """
    unsupported = library_unsupported("triton", MODULE, parts[0], "pip install triton")
    if select("concatenate", "triton", unsupported) == "torch":
        return torch.cat(list(parts), dim=-1)
    return concatenate_by_triton(parts)


def concatenate_by_triton(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors [..., width] of one dtype on a GPU to [..., sum of widths] by our Triton kernel, in one launch."""
    widths, rows = tuple(x.shape[-1] for x in parts), parts[0].shape[:-1].numel()
    out = parts[0].new_empty(*parts[0].shape[:-1], sum(widths))
    columns = tuple(1 << (width - 1).bit_length() for width in widths)  # powers of two
    importlib.import_module(MODULE).place[(rows,)](
        tuple(x.contiguous() for x in parts), out, rows, WIDTHS=widths, COLUMNS=columns, TOTAL=sum(widths), ROWS=1, num_warps=4
    )
    return out
