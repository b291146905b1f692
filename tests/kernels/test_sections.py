"""Sections of a fused projection and what puts their gradients together."""

import importlib.util

import pytest
import torch

from megatron_hylo.kernels.sections import concatenate_by_triton, split_sections
from tests.kernels.compare import interpreted

WIDTHS = ((576, 576, 9, 9, 6), (1, 12, 5, 16), (33,))


def parts(widths: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The second one is not contiguous."""
    made = [torch.randn(2, 35, width).to(device, dtype) for width in widths]
    return [x.mT.contiguous().mT if i == 1 else x for i, x in enumerate(made)]


def test_gradients_of_sections_are_put_together():
    for padding in (0, 2):
        x = torch.randn(2, 3, 11 + padding, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(2, 3, 11, dtype=torch.float64)
        (torch.cat(split_sections(x, [4, 6, 1]), -1) * upstream).sum().backward()
        assert torch.equal(x.grad, torch.nn.functional.pad(upstream, (0, padding)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_in_triton_s_interpreter():
    assert interpreted("test_sections").split() == ["True"] * len(WIDTHS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_kernel_on_a_gpu(widths, dtype):
    given = parts(widths, "cuda", dtype)
    assert torch.equal(concatenate_by_triton(given), torch.cat(given, -1))


if __name__ == "__main__":
    for given in map(parts, WIDTHS):
        print(torch.equal(concatenate_by_triton(given), torch.cat(given, -1)))
