"""Check of the kernels that run here: each operation of a model, at its shapes, against its definition in fp32 torch.

Kernels have been wrong on some GPU with some compiler (Gated DeltaNet's gradients on Hopper with Triton 3.4 to 3.7.0: fla issue
640), silently. So training compares them first on a short sequence: outputs and gradients, whatever implementation the registry
chooses. A wrong kernel is off by as much as the gradient itself, rounding in bf16 by less than a percent.
kernel_cases.py has the cases.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.kernel_cases import Case, all_cases

# relative, by norm; several times what rounding makes (fla's Gated DeltaNet in bf16: 1.2e-2), a fraction of what a fault does
LIMITS = {torch.bfloat16: 0.1, torch.float32: 0.03}  # fp32 kernels multiply in TF32


@dataclass(frozen=True)
class Check:
    """Result of checking one operation at one shape."""

    operation: str  # as the registry calls it
    shape: str
    implementation: str
    error: float  # the largest relative difference of the output and of a gradient
    where: str  # "output", or the input whose gradient it is
    limit: float

    @property
    def ok(self) -> bool:
        """Within the limit (NaN is not)."""
        return self.error < self.limit


def check_kernels(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, known: Container[tuple[str, str]] = (), parts: bool = False
) -> list[Check]:
    """Run every operation that the model's layers and its head use.

    Args:
        config: gives layers and shapes.
        dtype: of weights and activations, bf16 or fp32.
        device: where.
        known: operations and shapes to leave out.
        parts: also attention and recurrences whose sequence is split over ranks (context parallelism).
    """
    return [_check(case, dtype) for case in all_cases(config, device, parts) if (case.operation, case.shape) not in known]


def _check(case: Case, dtype: torch.dtype) -> Check:
    given = {name: x if name in case.kept else x.to(dtype) for name, x in case.inputs.items()}
    exact = {name: x.detach().float().requires_grad_() for name, x in given.items()}  # the same numbers
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    with torch.set_grad_enabled(not case.forward_only):
        ours, theirs = case.run(**given), case.definition(**exact)
    if case.forward_only:
        return Check(case.operation, case.shape, in_use()[case.operation], _relative(ours, theirs), "output", LIMITS[dtype])
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(theirs)
    (ours.float() * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    errors = {"output": _relative(ours, theirs)}
    for name, x in exact.items():
        assert x.grad is not None
        errors[name] = _relative(given[name].grad, x.grad)
    where = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return Check(case.operation, case.shape, in_use()[case.operation], errors[where], where, LIMITS[dtype])


def _relative(ours: Tensor | None, theirs: Tensor) -> float:
    theirs = theirs.detach().double()
    ours = torch.zeros_like(theirs) if ours is None else ours.detach().double()  # a gradient that did not come
    return float((ours - theirs).norm() / theirs.norm())
