"""Shared parts of the kernel tests: relative errors by norm, of outputs and of every gradient; Triton's interpreter."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def relative_error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """||value - oracle|| / ||oracle||, in float64; an oracle below 1e-10 (a vanishing gradient) counts as 1e-10."""
    value, oracle = value.detach().double(), oracle.detach().double()
    return float((value - oracle).norm() / oracle.norm().clamp_min(1e-10))


def results(kernel: Kernel, inputs: Sequence[torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    """Output, final state and the gradient of each input, for a fixed random cotangent of both.

    Args:
        kernel: called as kernel(*inputs, output_final_state=True).
        inputs: leaves that require gradients, the initial state last.
        seed: of the cotangents.
    """
    out, state = kernel(*inputs, output_final_state=True)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (out, state))
    return [out, state, *torch.autograd.grad(loss, inputs)]


def worst_error(kernel: Kernel, oracle: Kernel, inputs: Sequence[torch.Tensor]) -> float:
    """Largest relative error over output, final state and gradients; nan if any value is not finite."""
    pairs = zip(results(kernel, inputs), results(oracle, inputs), strict=True)
    errors = [relative_error(value, truth) for value, truth in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def interpreted(module: str) -> str:
    """Output of a module of tests.kernels, run as a script on the CPU with Triton's interpreter."""
    settings = {"TRITON_INTERPRET": "1", "HYLO_AUTOTUNE": "never", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}"], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2], env=os.environ | settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def interpreted_errors(module: str) -> dict[str, float]:
    """Errors by name, out of the lines "ERROR name number" that a module prints."""
    found = [line.split() for line in interpreted(module).splitlines() if line.startswith("ERROR ")]
    return {name: float(error) for _, name, error in found}
