"""Rounding of weights to 8 or 4 bits with scales; with second moments of the inputs, by GPTQ (arXiv:2210.17323).

GPTQ rounds a matrix column by column and moves each column's error, as far as the inputs allow, into those that are still to be
rounded. Columns of large inputs come first; their scales are those of their place in the matrix, so that groups stay groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 128  # whose errors are moved together
DAMPING = 0.01  # of the mean diagonal, added to it
LARGEST_FP8 = 448.0  # of e4m3
SHRINKS = tuple(1 - 0.05 * i for i in range(9))  # of an integer's scale: cutting off the largest may round the others better


@dataclass(frozen=True)
class Format:
    """Numbers that a weight is rounded to.

    Attributes:
        name: as users give it.
        bits: of a value.
        is_float: e4m3 with scales that are powers of two, so that bf16 holds every weight exactly; else integers, scales bf16.
        keeps: last names of maps that it does not round: after a conversion q_a_proj is the identity with small changes, which
            integers with the one's scale would lose.
        groups: allowed numbers of neighbouring weights of a row with one scale, the first that fits; () for whole rows.
    """

    name: str
    bits: int
    is_float: bool = False
    groups: tuple[int, ...] = ()
    keeps: frozenset[str] = frozenset()


NEAR_IDENTITY = frozenset({"q_a_proj"})
FORMATS = {
    "fp8": Format("fp8", 8, is_float=True),
    "int8": Format("int8", 8, keeps=NEAR_IDENTITY),
    "int4": Format("int4", 4, groups=(128, 64, 32), keeps=NEAR_IDENTITY),
}


def to_values(weight: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Divide by scales and round to the format's values; what is too large becomes the largest.

    Args:
        weight: float32, of any shape.
        scale: float32, positive, of a shape that broadcasts to the weight's.
        form: the format.

    Returns:
        float32, of the weight's shape.
    """
    if form.is_float:
        return (weight / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()
    half = 2 ** (form.bits - 1)
    return (weight / scale).round().clamp(-half, half - 1)


def choose_scales(weight: Tensor, form: Format, group: int | None, importance: Tensor | None = None) -> Tensor:
    """Choose the scale of each row, or of each group of a row.

    Args:
        weight: float32 [rows, columns].
        form: the format.
        group: columns with one scale; None: all.
        importance: float32 [columns], mean squares of the inputs, which weigh the squared errors of integers.

    Returns:
        float32 [rows, columns / group], numbers that bf16 holds.
    """
    parts = weight.unflatten(1, (-1, group or weight.shape[1]))  # [rows, groups, columns of a group]
    largest = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if form.is_float:
        return torch.exp2((largest / LARGEST_FP8).log2().ceil())[..., 0]
    weighing = 1.0 if importance is None else importance.view(parts.shape[1:])
    best, lowest = largest, torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = (largest * shrink / (2 ** (form.bits - 1) - 1)).to(torch.bfloat16).float()
        error = ((to_values(parts, scale, form) * scale - parts).square() * weighing).sum(-1, keepdim=True)
        best, lowest = torch.where(error < lowest, scale, best), torch.minimum(error, lowest)
    return best[..., 0]


def quantise(weight: Tensor, form: Format, group: int | None = None, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight.

    Args:
        weight: [rows, columns], floating.
        form: the format.
        group: columns with one scale, which divide the columns; None: all.
        moments: float32 [columns, columns], sum or mean of x x^T over inputs x; None: each weight to its nearest value.

    Returns:
        values [rows, columns] and scales [rows, columns / group], float32; the weight is values * scales.
    """
    work = weight.detach().float().clone()
    importance = None if moments is None else moments.diagonal()
    scales = choose_scales(work, form, group, importance)
    spread = scales.repeat_interleave(group or work.shape[1], 1)
    if moments is None or importance is None:
        return to_values(work, spread, form), scales
    order = importance.argsort(descending=True)
    upper = _inverse_root(moments[order][:, order])
    work, spread = work.T[order], spread.T[order]  # a column is a row from here on, whose numbers lie side by side
    values = torch.empty_like(work)
    for start in range(0, len(work), COLUMNS):
        end = min(start + COLUMNS, len(work))
        errors = torch.empty_like(work[start:end])
        for column in range(start, end):
            values[column] = to_values(work[column], spread[column], form)
            error = (work[column] - values[column] * spread[column]) / upper[column, column]
            work[column:end].addr_(upper[column, column:end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(values)
    back[order] = values
    return back.T.contiguous(), scales


def _inverse_root(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of damped moments; inputs that are always zero are given a one."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, DAMPING * diagonal.mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
