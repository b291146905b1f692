"""A part of a sequence and the state it begins with, put together afterwards, against the recurrence that begins with it."""

import importlib.util

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels.gated_delta_rule import fla_unsupported, gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.recurrence_part import DeltaRulePart, KdaPart, SsdPart, state_gradient, times
from megatron_hylo.kernels.registry import override
from megatron_hylo.kernels.ssd import MAMBA_MODULE, ssd
from tests.kernels import test_gated_delta_rule, test_kda, test_ssd
from tests.kernels.compare import interpreted_errors, relative_error


def delta_rule_errors(inputs: list[Tensor]) -> dict[str, float]:
    """Errors of a part of Gated DeltaNet; inputs: q, k, v, g, beta and the state before. The oracle computes in float64."""
    *values, state = (x.detach() for x in inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    with override("gated_delta_rule", "torch"):
        whole = gated_delta_rule(*leaves, output_final_state=True)
    return _errors(DeltaRulePart, values, state, leaves, whole)


def kda_errors(inputs: list[Tensor]) -> dict[str, float]:
    """Errors of a part of KDA; inputs as those of `delta_rule_errors`."""
    *values, state = (x.detach() for x in inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    with override("kda", "torch"):
        whole = kda(*leaves, output_final_state=True)
    return _errors(KdaPart, values, state, leaves, whole)


def ssd_errors(inputs: list[Tensor], reset_mask: Tensor | None) -> dict[str, float]:
    """Errors of a part of Mamba2; inputs: x, dt, A, B, C, D and the state before, [b, h, p, n]. The oracle is in float64."""
    *values, state = (x.detach() for x in inputs)
    leaves = [x.double().requires_grad_() for x in inputs]
    with override("ssd", "torch"):
        out, after = ssd(*leaves, output_final_state=True, reset_mask=reset_mask)
    return _errors(SsdPart, [*values, reset_mask], state.transpose(-1, -2), leaves, (out, after.transpose(-1, -2)))


def _errors(kind, values: list[Tensor | None], state: Tensor, leaves: list[Tensor], whole: tuple[Tensor, Tensor]) -> dict:
    """Outputs, state after, gradients of all inputs and of the state before; relative, by norm."""
    part, affine = kind.begin(*values)
    after = times(affine.transition, state) + affine.increment
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_after = (torch.randn(x.shape, generator=generator).to(y) for x, y in zip(whole, (affine.out, state)))
    mine = part.gradients(state, grad_out, grad_after)
    before = times(affine.transition.transpose(-1, -2), grad_after) + state_gradient(affine.readout, grad_out)
    theirs = torch.autograd.grad(whole, leaves, (grad_out.double(), grad_after.double()))
    oracle = theirs[-1].transpose(-1, -2) if kind is SsdPart else theirs[-1]
    found = {"outputs": (affine.outputs(state), whole[0]), "after": (after, whole[1]), "before": (before, oracle)}
    found |= {str(i): pair for i, pair in enumerate(zip(mine[: len(theirs) - 1], theirs[:-1], strict=True))}
    return {name: relative_error(a, b) for name, (a, b) in found.items()}


def test_a_part_of_gated_deltanet() -> None:
    errors = delta_rule_errors(test_gated_delta_rule.inputs(90))
    assert max(errors.values()) < 1e-9, errors


def test_a_part_of_kda() -> None:
    errors = kda_errors(test_kda.inputs(40))
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("documents", [False, True])
def test_a_part_of_mamba2(documents: bool) -> None:
    errors = ssd_errors(test_ssd.inputs(90), torch.arange(90) == 40 if documents else None)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.skipif(importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None, reason="needs fla")
def test_fla_s_kernels_in_triton_s_interpreter() -> None:
    """On the CPU, in fp32: what ranks, and layers that keep states, call of fla and its own layer does not."""
    errors = interpreted_errors("fla_interpreted")
    assert len(errors) == 8 + 1 + 2 * (4 + 5) + 3 and max(errors.values()) < 1e-5, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("t", "dk", "dv"), [(130, 64, 64), (333, 144, 288), (512, 256, 512)])
def test_a_part_by_fla(t: int, dk: int, dv: int) -> None:
    inputs = test_gated_delta_rule.inputs(t, torch.bfloat16, dk=dk, dv=dv, device="cuda")
    if unsupported := fla_unsupported(inputs[1], inputs[2], differentiates=True):
        pytest.skip(f"{unsupported.reason}; {unsupported.advice}")
    with override("gated_delta_rule", "fla"):
        errors = delta_rule_errors(inputs)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("documents", [False, True])
def test_a_part_by_mamba_ssm(documents: bool) -> None:
    if importlib.util.find_spec(MAMBA_MODULE.split(".")[0]) is None:
        pytest.skip("needs mamba-ssm")
    inputs = [x.detach().float().cuda() for x in test_ssd.inputs(700)]
    x, dt, A, B, C, D, state = inputs
    inputs = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D, state]
    with override("ssd", "mamba_ssm"):
        errors = ssd_errors(inputs, torch.arange(700, device="cuda") == 300 if documents else None)
    assert max(errors.values()) < 2e-2, errors
