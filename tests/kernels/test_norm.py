"""RMS norms against their formulas, written out in float64."""

import pytest
import torch

from megatron_hylo.kernels.norm import gated_rms_norm, rms_norm

EPS = 1e-3  # large, so that leaving it out shows


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 12), (3, 5, 12), (12,))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in values]


def explicit(x: torch.Tensor, group: int) -> torch.Tensor:
    """Each group of channels divided by its root mean square, one group after another."""
    parts = [part / (part.pow(2).mean(-1, keepdim=True) + EPS).sqrt() for part in x.split(group, -1)]
    return torch.cat(parts, -1)


def test_rms_norm_matches_formula() -> None:
    x, _, weight = inputs()
    torch.testing.assert_close(rms_norm(x, weight, EPS), explicit(x, 12) * weight, rtol=1e-12, atol=0)


def test_rms_norm_by_another_tensors_mean_square_and_gradients_match_formula() -> None:
    x, reference, weight = values = inputs()
    reference = reference[..., :5]  # any number of channels
    truth = x / (reference.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    out = rms_norm(x, weight, EPS, reference)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=0)
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), values) for y in (out, truth))):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    narrow = [t.bfloat16() for t in (x, weight, reference)]
    wide = rms_norm(narrow[0].float(), narrow[1].float(), EPS, narrow[2].float())
    assert torch.equal(rms_norm(narrow[0], narrow[1], EPS, narrow[2]), wide.bfloat16())  # statistics in float32


@pytest.mark.parametrize("group", [None, 12, 4, 1])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_rms_norm_and_gradients_match_formula(group: int | None, norm_before_gate: bool) -> None:
    x, gate, weight = values = inputs()
    silu = gate * torch.sigmoid(gate)
    if norm_before_gate:
        truth = explicit(x, group or 12) * weight * silu
    else:
        truth = explicit(x * silu, group or 12) * weight
    out = gated_rms_norm(x, gate, weight, EPS, group, norm_before_gate=norm_before_gate)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad(y.square().sum(), values) for y in (out, truth))
    for value, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_float32_inside(weight_dtype: torch.dtype) -> None:
    """Computed wide and rounded once, a bfloat16 result is at most one rounding away from the exact one."""
    x, gate, weight = (y.detach() for y in inputs(torch.bfloat16))
    weight = weight.to(weight_dtype)
    for out, truth in (
        (rms_norm(x, weight, EPS), explicit(x.double(), 12) * weight.double()),
        (
            gated_rms_norm(x, gate, weight, EPS, 4, norm_before_gate=False),
            explicit(x.double() * torch.nn.functional.silu(gate.double()), 4) * weight.double(),
        ),
    ):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), truth, rtol=2**-8, atol=0)


def test_wrong_sizes_are_refused() -> None:
    x, gate, weight = inputs()
    with pytest.raises(ValueError, match=r"weight must be \[12\]"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="group_size 5 must divide"):
        gated_rms_norm(x, gate, weight, EPS, 5, norm_before_gate=True)
