"""KDA's recurrence: chunked form against the token-by-token definition, fla's naive one and the gated delta rule."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.kernels.gated_delta_rule import fla_unsupported, normalised, recurrent_gated_delta_rule
from megatron_hylo.kernels.kda import FLA_MODULE, kda, recurrent_kda
from megatron_hylo.kernels.registry import override
from megatron_hylo.kernels.ssd import RESET
from tests.kernels.compare import relative_error, worst_error


def inputs(
    t: int, dtype: torch.dtype = torch.float64, h: int = 2, dk: int = 12, dv: int = 20, decay: float = 1.0, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v, g, beta and a state, with gradients."""
    generator = torch.Generator().manual_seed(t)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = [
        normal(2, t, h, dk).to(dtype),
        normal(2, t, h, dk).to(dtype),
        normal(2, t, h, dv).to(dtype),
        (-decay * F.softplus(normal(2, t, h, dk))).to(wide),
        normal(2, t, h).sigmoid().to(dtype),
        normal(2, h, dk, dv).to(wide),
    ]
    return [x.to(device).requires_grad_() for x in values]


@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 70])
def test_outputs_state_and_gradients_match_recurrence(t: int) -> None:
    assert worst_error(kda, recurrent_kda, inputs(t)) < 1e-10


@pytest.mark.parametrize("decay", [0.0, 1.0, 30.0, 1e3])
def test_no_and_overwhelming_decay_match_recurrence(decay: float) -> None:
    """exp(-1000 a token) underflows and its inverse would overflow: values and gradients must stay finite."""
    assert worst_error(kda, recurrent_kda, inputs(70, torch.float32, decay=decay)) < 1e-5


def test_gradcheck() -> None:
    values = [x.detach()[:1].requires_grad_() for x in inputs(5, dk=3, dv=2)]
    assert torch.autograd.gradcheck(lambda *x: kda(*x, output_final_state=True), values)


@pytest.mark.parametrize("cut", [1, 16, 40])
def test_split_with_carried_state_equals_whole(cut: int) -> None:
    *tokens, state = inputs(70)
    whole, whole_state = kda(*tokens, state, output_final_state=True)
    first, carried = kda(*(x[:, :cut] for x in tokens), state, output_final_state=True)
    second, last = kda(*(x[:, cut:] for x in tokens), carried, output_final_state=True)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(last, whole_state) < 1e-12


def test_reset_forgets_the_tokens_before() -> None:
    q, k, v, g, beta, _ = (x.detach() for x in inputs(40))
    whole, _ = kda(q, k, v, g.index_fill(1, torch.tensor(21), RESET), beta)
    alone, _ = kda(*(x[:, 21:] for x in (q, k, v, g, beta)))
    assert relative_error(whole[:, 21:], alone) < 1e-12


def test_equal_channels_match_the_gated_delta_rule() -> None:
    q, k, v, g, beta, state = (x.detach() for x in inputs(70))
    same = g[..., 0]
    mine = kda(q, k, v, same[..., None].expand_as(g), beta, state, output_final_state=True)
    theirs = recurrent_gated_delta_rule(q, k, v, same, beta, state, output_final_state=True)
    assert max(relative_error(a, b) for a, b in zip(mine, theirs)) < 1e-12


def test_matches_fla_naive_recurrence() -> None:
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("needs flash-linear-attention")
    path = Path(package.origin).parent / "ops/kda/naive.py"
    naive = runpy.run_path(str(path))["naive_recurrent_kda"]  # the file alone: importing all of fla takes long
    q, k, v, g, beta, state = (x.detach() for x in inputs(70, torch.float32))
    truth, truth_state = naive(normalised(q), normalised(k), v, g, beta, initial_state=state, output_final_state=True)
    out, last = kda(q, k, v, g, beta, state, output_final_state=True)
    assert relative_error(out, truth) < 1e-5
    assert relative_error(last, truth_state) < 1e-5


def test_bfloat16_is_float32_inside() -> None:
    values = [x.detach() for x in inputs(70, torch.bfloat16)]
    out, state = kda(*values, output_final_state=True)
    truth, truth_state = recurrent_kda(*(x.double() for x in values), output_final_state=True)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(state, truth_state) < 1e-5
    assert relative_error(out, truth) < 4e-3  # half a bfloat16 digit: only the output is rounded


def test_wrong_shapes_are_refused() -> None:
    q, k, v, g, beta, _ = inputs(4)
    with pytest.raises(ValueError, match="k and g like q"):
        kda(q, k, v, g[..., 0], beta)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("t", "dk", "dv"), [(130, 64, 64), (333, 128, 256), (512, 256, 512)])
def test_fla_matches_recurrence(t: int, dk: int, dv: int) -> None:
    values = inputs(t, torch.bfloat16, dk=dk, dv=dv, device="cuda")
    if unsupported := fla_unsupported(values[1], values[2], True, FLA_MODULE):
        pytest.skip(f"{unsupported.reason}; {unsupported.advice}")
    with override("kda", "fla"):
        out, state = kda(*values, output_final_state=True)
    exact = [x.detach().double().requires_grad_() for x in values]
    truth, truth_state = recurrent_kda(*exact, output_final_state=True)
    upstream = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0), dtype=out.dtype)
    mine = torch.autograd.grad((out, state), values, (upstream, truth_state.float()))
    theirs = torch.autograd.grad((truth, truth_state), exact, (upstream.double(), truth_state.detach()))
    errors = [relative_error(a, b) for a, b in zip((out, state, *mine), (truth, truth_state, *theirs))]
    assert max(errors) < 2e-2, errors
