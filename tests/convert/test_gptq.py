"""Rounding of weights: bounds from the formats, GPTQ against its definition."""

import pytest
import torch

from megatron_hylo.convert import gptq
from megatron_hylo.convert.gptq import FORMATS, Format, choose_scales, quantise, to_values


def inputs(columns: int, count: int = 400) -> torch.Tensor:
    """Correlated inputs [count, columns] of very different sizes."""
    return torch.randn(count, columns) @ torch.randn(columns, columns) * torch.logspace(-1, 1, columns)


@pytest.mark.parametrize("name, group", [("fp8", None), ("int8", None), ("int4", 32)])
def test_nearest_values_are_half_a_step_wrong_at_most(name, group):
    weight = torch.randn(40, 96) * torch.logspace(-5, 2, 40)[:, None]
    weight[3] = 0
    values, scales = quantise(weight.to(torch.bfloat16), FORMATS[name], group)
    weight = weight.to(torch.bfloat16).float()
    assert scales.shape == (40, 96 // (group or 96)) and torch.equal(scales, scales.to(torch.bfloat16).float())
    spread = scales.repeat_interleave(group or 96, 1)
    back, largest = values * spread, weight.unflatten(1, (-1, group or 96)).abs().amax(-1).repeat_interleave(group or 96, 1)
    if name == "fp8":
        assert torch.equal(scales.log2(), scales.log2().round())
        assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, spread * 2**-10)).all()
        assert torch.equal(back, back.to(torch.bfloat16).float())  # bf16 holds every weight
        assert torch.equal(quantise(back, FORMATS[name])[0] * quantise(back, FORMATS[name])[1], back)
    else:
        limit = 2 ** (FORMATS[name].bits - 1) - 1
        assert values.abs().max() <= limit + 1 and torch.equal(values, values.round())
        uncut = back.abs() < limit * spread
        assert ((back - weight).abs() <= 0.501 * spread)[uncut].all()
        assert (spread <= largest / limit * 1.01 + 1e-30).all() and (spread >= largest / limit * 0.59).all()
    assert not back[3].any()


def test_gptq_equals_its_definition(monkeypatch):
    """Each column in turn: the others, still free, move by what minimises the error of the outputs (OBS, Hassibi 1993)."""
    monkeypatch.setattr(gptq, "COLUMNS", 5)  # so that errors go from one block of columns to later ones
    form, weight, x = Format("int3", 3, groups=(6,)), torch.randn(7, 18), inputs(18)
    moments = x.T @ x
    values, scales = quantise(weight, form, 6, moments)
    hessian = moments.double() + gptq.DAMPING * moments.diagonal().mean() * torch.eye(18)
    work, spread = weight.double(), choose_scales(weight, form, 6, moments.diagonal()).repeat_interleave(6, 1)
    free = moments.diagonal().argsort(descending=True).tolist()
    expected = torch.empty(7, 18)
    while free:
        inverse, column = hessian[free][:, free].inverse(), free[0]
        expected[:, column] = to_values(work[:, column].float(), spread[:, column], form)
        error = work[:, column] - expected[:, column] * spread[:, column]
        work[:, free] -= error[:, None] * inverse[0] / inverse[0, 0]
        free = free[1:]
    assert torch.equal(values, expected)
    nearest = to_values(weight, spread, form) * spread
    output_error = ((values * spread - weight) @ x.T).norm()
    assert output_error < 0.8 * ((nearest - weight) @ x.T).norm()


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_with_inputs_that_are_always_zero(name):
    x = inputs(64)
    x[:, [3, 40]] = 0
    weight = torch.randn(5, 64)
    values, scales = quantise(weight, FORMATS[name], 32 if name == "int4" else None, x.T @ x)
    back = values * scales.repeat_interleave(64 // scales.shape[1], 1)
    assert torch.isfinite(back).all() and ((back - weight) @ x.T).norm() < 0.12 * (weight @ x.T).norm()
