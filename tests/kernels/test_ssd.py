"""State-space duality: chunked form against the token-by-token definition."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.kernels.registry import import_error, override
from megatron_hylo.kernels.ssd import MAMBA_CHUNK, MAMBA_MODULE, _SumsOfOne, document_numbers, recurrent_ssd, segment_sum, ssd
from tests.kernels.compare import relative_error, worst_error


def inputs(
    t: int, dtype: torch.dtype = torch.float64, h: int = 3, p: int = 10, n: int = 12, step: float = 1.0, device: str = "cpu"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = [
        normal(2, t, h, p).to(dtype),
        (step * F.softplus(normal(2, t, h))).to(wide),
        -normal(h).exp().to(wide),
        normal(2, t, h, n).to(dtype),
        normal(2, t, h, n).to(dtype),
        normal(h).to(wide),
        normal(2, h, p, n).to(wide),
    ]
    return [x.to(device).requires_grad_() for x in values]


@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 150])
def test_outputs_state_and_gradients_match_recurrence(t: int) -> None:
    assert worst_error(ssd, recurrent_ssd, inputs(t)) < 1e-10


@pytest.mark.parametrize("step", [1e-3, 1.0, 1e3])
def test_float32_matches_recurrence_for_any_decay(step: float) -> None:
    """With dt A near -1000 a token decays underflow and their inverses would overflow: all must stay finite."""
    assert worst_error(ssd, recurrent_ssd, inputs(130, torch.float32, step=step)) < 1e-5


def test_recurrence_is_the_definition() -> None:
    """Three tokens of one head, written out with numbers."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    c = torch.tensor([[1.0, 1.0], [0.5, -1.0], [2.0, 3.0]], dtype=torch.float64)
    dt, a, d = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64), 0.7
    state, rows = torch.zeros(2, 2, dtype=torch.float64), []
    for i in range(3):
        state = torch.exp(dt[i] * a) * state + dt[i] * torch.outer(x[i], b[i])
        rows.append(state @ c[i] + d * x[i])
    tokens = (x[None, :, None], dt[None, :, None], a, b[None, :, None], c[None, :, None])
    out, last = recurrent_ssd(*tokens, torch.tensor([d], dtype=torch.float64), output_final_state=True)
    torch.testing.assert_close(out[0, :, 0], torch.stack(rows), rtol=1e-14, atol=0)
    torch.testing.assert_close(last[0, 0], state, rtol=1e-14, atol=0)


def test_gradcheck() -> None:
    x, dt, A, B, C, D, state = (y.detach().requires_grad_() for y in inputs(4, h=1, p=2, n=3))
    assert torch.autograd.gradcheck(lambda *y: ssd(*y, output_final_state=True), (x, dt, A, B, C, D, state))


@pytest.mark.parametrize("cut", [1, 40, 64, 149])
def test_split_with_carried_state_equals_whole(cut: int) -> None:
    x, dt, A, B, C, D, state = inputs(150)
    whole, whole_state = ssd(x, dt, A, B, C, D, state, output_final_state=True)
    first, carried = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state, output_final_state=True)
    second, last = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, carried, output_final_state=True)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(last, whole_state) < 1e-12


def test_without_skip_and_state() -> None:
    x, dt, A, B, C, D, _ = inputs(70)
    out, state = ssd(x, dt, A, B, C)
    assert state is None
    assert relative_error(out + x * D[:, None], ssd(x, dt, A, B, C, D)[0]) < 1e-12


def test_segment_sum_matches_explicit_sums() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    sums = segment_sum(x)
    for i in range(6):
        for j in range(6):
            expected = x[:, j + 1 : i + 1].sum(-1) if j <= i else torch.full((2,), -torch.inf, dtype=torch.float64)
            torch.testing.assert_close(sums[:, i, j], expected, rtol=0, atol=1e-14)


def test_bfloat16_is_float32_inside() -> None:
    values = [x.detach() for x in inputs(70, torch.bfloat16)]
    out, state = ssd(*values, output_final_state=True)
    truth, truth_state = recurrent_ssd(*(x.double() for x in values), output_final_state=True)
    assert out.dtype == torch.bfloat16
    assert relative_error(state, truth_state) < 1e-5
    assert relative_error(out, truth) < 4e-3  # half a bfloat16 digit: only the output is rounded


def test_autocast_leaves_float32_inside() -> None:
    values = inputs(70, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ssd(*values)
    assert relative_error(out, ssd(*values)[0]) == 0


def test_wrong_shapes_are_refused() -> None:
    x, dt, A, B, C, *_ = inputs(4)
    with pytest.raises(ValueError, match=r"A \[h\]"):
        ssd(x, dt, A[:1], B, C)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("t", "p", "n"), [(130, 64, 64), (600, 64, 128)])
def test_mamba_ssm_matches_recurrence_on_gpu(t: int, p: int, n: int) -> None:
    if error := import_error(MAMBA_MODULE):
        pytest.skip(f"needs mamba_ssm: {error}")
    values = inputs(t, torch.bfloat16, p=p, n=n, device="cuda")
    with override("ssd", "mamba_ssm"):
        assert worst_error(ssd, recurrent_ssd, values) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("used", ["both", "output", "state"])
@pytest.mark.parametrize("skip", [True, False])
def test_mamba_ssm_s_own_function_gives_the_same(skip: bool, used: str) -> None:
    """mamba_ssm's scan, with copies left out of its backward pass, equals its own; with documents."""
    if error := import_error(MAMBA_MODULE):
        pytest.skip(f"needs mamba_ssm: {error}")
    values = inputs(600, torch.bfloat16, p=64, n=64, device="cuda")
    x, dt, A, B, C, D, state = values
    reset_mask, D = torch.arange(600, device="cuda") == 300, D if skip else None
    documents, theirs = document_numbers(x, reset_mask), importlib.import_module(MAMBA_MODULE).mamba_chunk_scan_combined
    settings = dict(D=D, initial_states=state, seq_idx=documents, return_final_states=True)
    found = []
    for out, last in (ssd(x, dt, A, B, C, D, state, True, reset_mask), theirs(x, dt, A, B, C, MAMBA_CHUNK, **settings)):
        loss = (out.float().square().sum() if used != "state" else 0) + (last.square().sum() if used != "output" else 0)
        found.append([out, last, *torch.autograd.grad(loss, values, allow_unused=True)])
    for mine, his in zip(*found, strict=True):
        assert (mine is None) == (his is None) and (mine is None or relative_error(mine, his) < 1e-5)


def test_documents_equal_separate_calls_and_the_last_state() -> None:
    """Values and gradients; the state before belongs to the first document alone."""
    x, dt, A, B, C, D, state = inputs(140)
    cuts = [3, 1, 70, 66]
    reset_mask = torch.zeros(140, dtype=torch.bool)
    reset_mask[torch.tensor([3, 4, 74])] = True
    packed = ssd(x, dt, A, B, C, D, state, True, reset_mask)
    parts, carried = [], state
    for piece in zip(*(value.split(cuts, 1) for value in (x, dt, B, C))):
        y, carried = ssd(piece[0], piece[1], A, piece[2], piece[3], D, carried if not parts else None, True)
        parts.append(y)
    alone = torch.cat(parts, 1), carried
    upstream = [torch.randn_like(value) for value in alone]
    gradients = [torch.autograd.grad(sum((a * u).sum() for a, u in zip(found, upstream)), (x, dt, A, B, C, D, state))
                 for found in (packed, alone)]  # fmt: skip
    for mine, theirs in zip((*packed, *gradients[0]), (*alone, *gradients[1]), strict=True):
        assert relative_error(mine, theirs) < 1e-10
    recurrent = recurrent_ssd(x, dt, A, B, C, D, state, True, reset_mask)
    assert all(relative_error(mine, theirs) < 1e-10 for mine, theirs in zip(packed, recurrent))


def test_sums_over_one_element_are_no_copies() -> None:
    x = torch.randn(2, 1, 3)
    with _SumsOfOne():
        views = [x.sum(1), x.sum(dim=1), x.sum(-2)]
        sums = [x.sum(2), x.sum(), x.sum((0, 1)), x.half().sum(1), x.sum(1, keepdim=True), x.sum(1, dtype=torch.float64)]
    assert all(y.data_ptr() == x.data_ptr() and torch.equal(y, x[:, 0]) for y in views)
    expected = [x.sum(2), x.sum(), x.sum((0, 1)), x.half().sum(1), x, x[:, 0].double()]
    assert all(y.data_ptr() != x.data_ptr() and torch.equal(y, z) for y, z in zip(sums, expected, strict=True))
