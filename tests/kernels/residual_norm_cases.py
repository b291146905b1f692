"""The Triton kernels of residual_norm against the formula in float64; run as a script, in Triton's interpreter on the CPU."""

import itertools

import torch

from megatron_hylo.kernels import residual_norm
from tests.kernels.compare import relative_error

EPS = 1e-2  # large, so that leaving it out shows
USED = ("both", "norm", "residual")  # outputs that a loss is made of
SHAPES = ((3, 5, 12), (70, 64), (1, 3, 257), (37, 1100))


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def errors(shape: tuple[int, ...], dtype: torch.dtype, used: str, device: str = "cpu") -> list[float]:
    """Relative, of the norm, the gradient of x, that of the weight (only where there is one)."""
    generator = torch.Generator().manual_seed(0)
    x, weight, *upstream = (
        torch.randn(size, generator=generator).to(device, dtype) for size in (shape, shape[-1:], shape, shape)
    )
    found = []
    for run, wide in ((residual_norm._Triton.apply, dtype), (lambda x, w, _: (formula(x, w), x), torch.float64)):
        leaves = [a.to(wide).requires_grad_() for a in (x, weight)]
        out, rest = run(*leaves, EPS)
        assert torch.equal(rest, leaves[0])
        terms = [(out * upstream[0].to(wide)).sum(), (rest * upstream[1].to(wide)).sum()]
        loss = sum(terms) if used == "both" else terms[USED.index(used) - 1]
        found.append([out, *(g for g in torch.autograd.grad(loss, leaves, allow_unused=used == "residual") if g is not None)])
    return [relative_error(mine, truth) for mine, truth in zip(*found, strict=True)]


if __name__ == "__main__":
    for shape, dtype, used in itertools.product(SHAPES, (torch.float32, torch.bfloat16), USED):
        print("CASE", shape, dtype, used, "|", max(errors(shape, dtype, used)))
