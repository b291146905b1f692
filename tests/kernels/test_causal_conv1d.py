"""Causal convolution against torch's grouped conv1d, with and without a carried state."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.kernels.causal_conv1d import FLA_MODULE, GLUON_MODULE, causal_conv1d, causal_conv1d_sections
from megatron_hylo.kernels.registry import import_error, override
from tests.kernels.compare import relative_error, worst_error


def oracle(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, output_final_state: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """conv1d of state and x in a row, then SiLU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    row = torch.cat([state, x.transpose(1, 2)], -1)
    y = F.silu(F.conv1d(row.to(wide), weight.to(wide)[:, None], bias.to(wide), groups=len(weight))).to(x.dtype)
    return y.transpose(1, 2), row[..., row.shape[-1] - weight.shape[1] + 1 :]


def ours(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor, output_final_state: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return causal_conv1d(x, weight, bias, "silu", state, output_final_state)


def inputs(t: int, dtype: torch.dtype = torch.float64, k: int = 4, c: int = 6, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    shapes = ((2, t, c), (c, k), (c,), (2, c, k - 1))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.to(device).requires_grad_() for x in values]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 2, 3, 17])
def test_outputs_state_and_gradients_match_conv1d(t: int, k: int) -> None:
    assert worst_error(ours, oracle, inputs(t, k=k)) < 1e-12


@pytest.mark.parametrize("t", [1, 3, 17])
def test_no_state_is_a_state_of_zeros(t: int) -> None:
    x, weight, bias, state = inputs(t)
    for activation in ("silu", None):
        bare, bare_state = causal_conv1d(x, weight, bias, activation, output_final_state=True)
        zeros, zeros_state = causal_conv1d(x, weight, bias, activation, torch.zeros_like(state), output_final_state=True)
        torch.testing.assert_close(bare, zeros, rtol=1e-14, atol=0)
        torch.testing.assert_close(bare_state, zeros_state, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_split_with_carried_state_equals_whole(cut: int) -> None:
    x, weight, _, state = inputs(10)
    whole, whole_state = causal_conv1d(x, weight, None, "silu", state, output_final_state=True)
    first, carried = causal_conv1d(x[:, :cut], weight, None, "silu", state, output_final_state=True)
    second, last = causal_conv1d(x[:, cut:], weight, None, "silu", carried, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(last, whole_state, rtol=0, atol=0)


def test_bfloat16_is_float32_inside() -> None:
    values = [x.detach() for x in inputs(33, torch.bfloat16)]
    out, _ = ours(*values)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, oracle(*(x.double() for x in values))[0]) < 4e-3  # only the output is rounded


def test_unknown_activation_and_wrong_shapes_are_refused() -> None:
    x, weight, bias, state = inputs(5)
    with pytest.raises(ValueError, match="'silu' or None"):
        causal_conv1d(x, weight, bias, "gelu")
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, weight[:2], bias)
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d(x, weight, bias, initial_state=state[..., :1])


IMPLEMENTATIONS = {"fla": FLA_MODULE, "gluon": GLUON_MODULE}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", [1, 5, 200])
def test_fla_matches_conv1d_on_gpu(t: int, implementation: str) -> None:
    if error := import_error(IMPLEMENTATIONS[implementation]):
        pytest.skip(f"needs fla: {error}")
    with override("causal_conv1d", implementation):
        assert worst_error(ours, oracle, inputs(t, torch.bfloat16, c=96, device="cuda")) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("sections", [1, 2])
def test_fla_keeps_documents_apart_on_gpu(sections: int, history: bool, implementation: str) -> None:
    if error := import_error(IMPLEMENTATIONS[implementation]):
        pytest.skip(f"needs fla: {error}")
    with override("causal_conv1d", implementation):
        assert max(document_errors(history, torch.float32, "cuda", sections).values()) < 1e-5


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("sections", [1, 2])
def test_no_tap_reaches_before_a_document(sections: int, history: bool) -> None:
    assert max(document_errors(history, sections=sections).values()) < 1e-12


def document_errors(
    history: bool, dtype: torch.dtype = torch.float64, device: str = "cpu", sections: int = 1
) -> dict[str, float]:
    """Documents in a row against each alone, outputs and gradients. With a history, the first began two tokens before x.

    The channels of those in a row lie in so many sections.
    """
    x, weight, bias, state = (z.detach()[:1] if z.dim() == 3 else z.detach() for z in inputs(14, dtype, device=device))
    x, weight, bias, state = (z.requires_grad_() for z in (x, weight, bias, state))
    lengths = [5, 1, 2, 6]
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    if history:
        positions[:5] += 2
    widths = [2, x.shape[-1] - 2] if sections == 2 else [x.shape[-1]]
    given = (x.split(widths, -1), weight, bias, "silu", state if history else None, positions)
    packed = torch.cat(causal_conv1d_sections(*given), -1)
    parts, leaves = [], [x, weight, bias, *([state] if history else [])]
    exact = [z.detach().double().requires_grad_() for z in leaves]
    with override("causal_conv1d", "torch"):
        for i, piece in enumerate(exact[0].split(lengths, 1)):
            start = torch.cat([torch.zeros_like(state[..., :1]), exact[3][..., 1:]], -1) if history and i == 0 else None
            parts.append(causal_conv1d(piece, *exact[1:3], "silu", start)[0])
    alone = torch.cat(parts, 1)
    upstream = torch.randn_like(packed)
    mine = (packed, *torch.autograd.grad((packed * upstream).sum(), leaves))
    theirs = (alone, *torch.autograd.grad((alone * upstream).sum(), exact))
    names = ("output", "x", "weight", "bias", "state")
    return {name: relative_error(a, b) for name, a, b in zip(names, mine, theirs)}
