"""Small linear algebra on second moments, shared by the calibrated initialisers. All in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 1e-2  # of the mean diagonal: what CARE and TransMLA add before they take roots


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Add damping * mean(diagonal) to the diagonal: [n, n] -> the same, positive definite where `moment` is not zero."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + damping * mean[..., None, None] * identity


def square_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and inverse root of a positive (semi)definite matrix: [..., n, n] -> the same, twice.

    Eigenvalues below 1e-12 of the largest count as zero, and stay zero in the inverse.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    kept = values > 1e-12 * values[..., -1:]
    roots = torch.where(kept, values, 1.0).sqrt()
    root, inverse = (
        (vectors * torch.where(kept, scale, 0.0)[..., None, :]) @ vectors.transpose(-1, -2) for scale in (roots, 1 / roots)
    )
    return root, inverse


def leading_eigenvectors(moment: Tensor, count: int) -> Tensor:
    """The `count` eigenvectors of the largest eigenvalues, in falling order: [n, n] -> [n, count]."""
    return torch.linalg.eigh(moment).eigenvectors[:, -count:].flip(-1)


def factor_outputs(weight: Tensor, input_moment: Tensor, metric: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The factors down, up of `weight` whose product has the least error on data, measured by `metric`.

    Least E |B^.5 (W - up down) x|^2 for B = metric: with R the leading eigenvectors of B^.5 E[W x x^T W^T] B^.5,
    down = R^T B^.5 W and up = B^-.5 R. It is CARE's and SVD-LLM's optimum without a root of the input moment, and exact
    where the rank suffices. Each latent is scaled so that its row of `down` and its column of `up` are equally long.

    Args:
        weight: [out, in].
        input_moment: [in, in], E[x x^T].
        metric: the blocks on its diagonal, each [n, n] and positive definite, their sizes `out` in all.
        rank: latents, at most `out`.

    Returns:
        down [rank, in], up [out, rank].
    """
    root, inverse_root = (torch.block_diag(*roots) for roots in zip(*map(square_roots, metric)))
    output_moment = root @ weight @ input_moment @ weight.T @ root
    basis = leading_eigenvectors(output_moment, rank)
    down, up = basis.T @ root @ weight, inverse_root @ basis
    balance = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-30)).sqrt().clamp(min=1e-6, max=1e6)
    return down * balance[:, None], up / balance


def unit_functional(input_mean: Tensor, input_moment: Tensor) -> Tensor:
    """The linear functional nearest to the constant 1 on the data: w with E[w x] = 1 and little variance: [in].

    Layers without biases get one through it: w = (M + damping)^-1 m / (m^T (M + damping)^-1 m).
    """
    solved = torch.linalg.solve(damped(input_moment), input_mean)
    return solved / (solved @ input_mean)
