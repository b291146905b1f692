"""Attention by FlashAttention-4: its kernels on a GPU; on a CPU the choice and what surrounds them, with a softmax in torch
that takes the kernels' arguments in their place and refuses what they refuse."""

import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels import attention as module
from megatron_hylo.kernels import flash_attention_4 as fa4
from megatron_hylo.kernels import registry
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.blockwise_attention import blockwise_attention
from megatron_hylo.kernels.flash_attention_3 import choose_forward
from megatron_hylo.kernels.registry import import_error, in_use, override
from megatron_hylo.models.kernel_check import Check, check_kernels
from tests.conftest import tiny_config
from tests.kernels.compare import relative_error
from tests.kernels.test_attention import explicit

DOCUMENTS = [(slice(0, 5),) * 2, (slice(5, 6),) * 2, (slice(6, 40),) * 2]  # one of a single token
# query heads, KV heads, width of queries and keys, of values
SHAPES = [
    (6, 2, 64, 64), (8, 2, 128, 128), (8, 2, 96, 64), (4, 4, 96, 64), (6, 3, 70, 64), (6, 3, 49, 35), (6, 2, 64, 96),
]  # fmt: skip


def inputs(t: int, heads: int, groups: int, d: int, dv: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(t + d)
    shapes = ((2, t, heads, d), (2, t, groups, d), (2, t, groups, dv))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def errors(values: list[Tensor], scale: float) -> list[float]:
    """Relative errors of the output and of the gradients of q, k and v against the definition in fp32 or wider."""
    exact = [x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for x in values]
    outs = [attention(*values, scale), explicit(*exact, scale)]
    upstream = torch.randn(outs[1].shape, generator=torch.Generator().manual_seed(0)).to(outs[1])
    gradients = [torch.autograd.grad(out, given, upstream.to(out)) for out, given in zip(outs, (values, exact))]
    return [relative_error(ours, theirs) for ours, theirs in [outs, *zip(*gradients, strict=True)]]


class PlainKernels(types.ModuleType):
    """`flash_attn_func` of flash_attn.cute in plain torch, with its restrictions on Hopper."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, None]:
        assert causal and q.shape[1] == k.shape[1] > 1
        assert k.shape[-1] == q.shape[-1] and (q.shape[-1], v.shape[-1]) in fa4.WIDTHS
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert q.shape[2] == k.shape[2] or q.shape[-1] == v.shape[-1], "grouped heads need equal widths backward"
        return explicit(q, k, v, softmax_scale), None


@pytest.fixture
def plain_kernels(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, fa4.MODULE, PlainKernels(fa4.MODULE))
    monkeypatch.setattr(fa4, "unsupported", lambda *_: None)
    monkeypatch.setattr(registry, "_logged", set())
    with override("attention", "fa4"):
        yield


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_match_explicit_softmax(shape) -> None:
    assert max(errors(inputs(24, *shape, torch.float64), 0.1)) < 1e-10
    assert in_use()["attention"] == "fa4"


@pytest.mark.usefixtures("plain_kernels")
def test_documents_match_explicit_softmax() -> None:
    q, k, v = (x[:1] for x in inputs(40, 8, 2, 96, 64, torch.float64))
    wanted = torch.cat([explicit(q[:, own], k[:, own], v[:, own], 0.1) for own, _ in DOCUMENTS], 1)
    assert relative_error(attention(q, k, v, 0.1, documents=DOCUMENTS), wanted) < 1e-10


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(("queries", "causal"), [(slice(8, None), True), (slice(None), False), (slice(23, None), True)])
def test_other_calls_keep_their_backend_and_say_why_once(queries, causal, caplog, monkeypatch) -> None:
    """Fewer queries than keys, no causality, one query: on a CPU torch chooses, on a feigned GPU cuDNN is the first."""
    q, k, v = inputs(24, 6, 2, 64, 64, torch.float64)
    assert not fa4.runs_flash_attention_4(q[:, queries], k, v, causal)
    found = attention(q[:, queries], k, v, 0.1, causal)
    assert relative_error(found, explicit(q[:, queries], k, v, 0.1, causal)) < 1e-10 and in_use()["attention"] == "torch"
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda *_: True)
    with caplog.at_level(logging.WARNING, logger="megatron_hylo.kernels"):
        chosen = [module.choose_backend(*(x.transpose(1, 2) for x in (q[:, queries], k, v)), False) for _ in range(2)]
    assert chosen == ["cudnn"] * 2 and [r.getMessage() for r in caplog.records] == [f"attention: cudnn ({fa4.ELSEWHERE})"]


@pytest.mark.usefixtures("plain_kernels")
def test_blocks_whose_sums_are_merged_keep_their_backend() -> None:
    q, k, v = inputs(24, 6, 2, 64, 48, torch.float64)
    with torch.no_grad():
        found = blockwise_attention(q[:, 16:], iter([(k[:, :16], v[:, :16])]), (k[:, 16:], v[:, 16:]), 0.1)
    assert relative_error(found, explicit(q, k, v, 0.1)[:, 16:]) < 1e-10


@pytest.mark.usefixtures("plain_kernels")
def test_the_check_before_a_run_names_a_wrong_gradient(monkeypatch) -> None:
    def checked() -> Check:
        checks = check_kernels(tiny_config("+-"), torch.bfloat16, torch.device("cpu"))
        (check,) = [c for c in checks if c.operation == "attention"]
        return check

    assert checked().ok and checked().implementation == "fa4"
    right = PlainKernels.flash_attn_func
    wrong = staticmethod(lambda q, k, v, **x: right(q, k.detach() + 0.5 * (k - k.detach()), v, **x))
    monkeypatch.setattr(PlainKernels, "flash_attn_func", wrong)
    assert not checked().ok and checked().where == "k"


def test_what_cannot_run_says_why(monkeypatch) -> None:
    q, k, v = inputs(8, 2, 2, 64, 64, torch.bfloat16)
    assert not fa4.runs_flash_attention_4(q, k, v, True)  # without the override it is not asked
    with override("attention", "fa4"):
        with pytest.raises(RuntimeError, match="fa4 was asked for by an override, but FlashAttention-4 needs a CUDA device"):
            attention(q, k, v, 0.125)
        assert choose_forward(q, k, v) == "torch"
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fa4, "import_error", lambda module: "no such module")
    wide = torch.zeros(1, 8, 2, 136, dtype=torch.bfloat16)
    for given, reason in (((q.float(), k, v), "bf16, not float32"), ((wide, wide, v), "up to 128 channels, not 136")):
        found = fa4.unsupported(*given)
        assert found is not None and reason in found.reason
    missing = fa4.unsupported(q, k, v)
    assert missing is not None and "no such module" in missing.reason and "flash-attn-4" in missing.advice
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found = fa4.unsupported(q, k, v)
    assert found is not None and "deterministic" in found.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    found = fa4.unsupported(q, k, v)
    assert found is not None and "Hopper" in found.reason


def test_the_advice_installs_the_version_of_the_extra() -> None:
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert fa4.INSTALL.split("'")[1] in extras


needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or import_error(fa4.MODULE) is not None,
    reason="needs a Hopper GPU and the package flash-attn-4",
)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("t", [40, 1000])
@pytest.mark.parametrize("shape", [(32, 8, 128, 128), (9, 3, 64, 64), *SHAPES])
def test_kernels_match_explicit_softmax_in_fp32(shape, t) -> None:
    with override("attention", "fa4"):
        found = errors(inputs(t, *shape, torch.bfloat16, "cuda"), shape[2] ** -0.5)
    assert in_use()["attention"] == "fa4"
    print(t, shape, " ".join(f"{error:.1e}" for error in found))
    assert max(found) < 2e-2


@pytest.mark.gpu
@needs_kernels
def test_documents_and_sections_of_a_projection_on_gpu() -> None:
    """Values that are a section of a wider tensor, and an upstream gradient without strides."""
    q, k, wide = (x[:1] for x in inputs(40, 8, 2, 96, 161, torch.bfloat16, "cuda"))
    with override("attention", "fa4"):
        found = attention(q, k, wide[..., 97:], 0.1, documents=DOCUMENTS)
    ours = torch.autograd.grad(found.sum(), (q, k, wide))
    exact = [x.detach().float().requires_grad_() for x in (q, k, wide)]
    parts = [explicit(exact[0][:, own], exact[1][:, own], exact[2][:, own, :, 97:], 0.1) for own, _ in DOCUMENTS]
    theirs = torch.autograd.grad(torch.cat(parts, 1).sum(), exact)
    pairs = [(found, torch.cat(parts, 1)), *zip(ours, theirs, strict=True)]
    # with an upstream gradient of ones the scores' gradient is a difference of near numbers, which bf16 rounds
    assert [relative_error(*pair) < 5e-2 for pair in pairs] == [True] * 4
