"""Heads of a width that is no multiple of 8, which fused kernels want padded, against an explicit softmax without padding."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels import blockwise_attention as blockwise
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.fused_inputs import padded
from megatron_hylo.kernels.registry import in_use, override
from tests.kernels.compare import relative_error
from tests.kernels.test_attention import explicit, inputs, worst_error

WIDTHS = [(98, 64), (70, 64), (64, 70), (49, 35)]  # of queries and keys, of values
widths = pytest.mark.parametrize(("d", "dv"), WIDTHS)
SCALE = 0.11  # not what a kernel would take by itself from a width
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def errors(found: Callable[..., Tensor], wanted: Callable[..., Tensor], values: list[Tensor]) -> list[float]:
    """Relative errors of an output and of its gradients."""
    outputs = [f(*values) for f in (found, wanted)]
    cotangent = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(0)).to(outputs[1])
    gradients = [torch.autograd.grad(out, values, cotangent) for out in outputs]
    return [relative_error(ours, theirs) for ours, theirs in [outputs, *zip(*gradients, strict=True)]]


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit(q, k, v, SCALE)


@pytest.fixture
def seems_cuda(monkeypatch) -> list[tuple[int, ...]]:
    """Have CPU tensors treated as a GPU's; the widths that torch's attention was called with."""
    seen: list[tuple[int, ...]] = []
    right = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest, **settings) -> Tensor:
        seen.append(tuple(x.shape[-1] for x in (q, k, v)))
        return right(q, k, v, *rest, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    return seen


@widths
def test_padded_heads_match_explicit_softmax(d: int, dv: int) -> None:
    values = inputs(9, 14, d, dv)

    def found(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        more = padded(q, k, v)
        assert all(new.shape[-1] % 8 == 0 and new.shape[-1] - old.shape[-1] < 8 for new, old in zip(more, (q, k, v)))
        out = whole(*more)
        assert not out[..., dv:].any()
        return out[..., :dv]

    assert max(errors(found, whole, values)) < 1e-12


def test_heads_that_fit_are_not_copied() -> None:
    x, y = torch.zeros(2, 64), torch.zeros(2, 72)
    assert padded(x, y) == (x, y) and padded(x, y)[1] is y
    assert [z.shape[-1] for z in padded(x, y, multiple=16)] == [64, 80]


@widths
@pytest.mark.parametrize("masked", [False, True])
def test_attention_pads_before_torch_chooses(d: int, dv: int, masked: bool, seems_cuda: list[tuple[int, ...]]) -> None:
    values = inputs(9, 14, d, dv)
    mask = torch.ones(9, 14, dtype=torch.bool).tril(5) if masked else None
    with override("attention", "math"):
        found = errors(lambda q, k, v: attention(q, k, v, SCALE, mask=mask), whole, values)
    assert max(found) < 1e-10 and all(width % 8 == 0 for width in seems_cuda[0])


@widths
@pytest.mark.parametrize("backend", ["cudnn", "flash", "math"])
@pytest.mark.usefixtures("seems_cuda")
@torch.no_grad()
def test_blocks_are_padded_for_operators_that_do_not(d: int, dv: int, backend: str, monkeypatch) -> None:
    """In the place of aten's operators a softmax in plain torch, which asserts what they do."""
    calls = []

    def operator(causal_at: int, q: Tensor, k: Tensor, v: Tensor, *rest, scale: float) -> tuple[Tensor, Tensor, None]:
        sizes = {x.shape[-1] for x in (q, k, v)}
        assert not any(size % 8 for size in sizes) and (backend == "cudnn" or len(sizes) == 1)
        calls.append(sizes)
        return *blockwise._plain(q, k, v, scale, rest[causal_at]), None

    operators = {
        "_scaled_dot_product_cudnn_attention": lambda *given, scale: operator(3, *given, scale=scale),
        "_scaled_dot_product_flash_attention": lambda *given, scale: operator(1, *given, scale=scale),
    }
    monkeypatch.setattr(blockwise, "aten", SimpleNamespace(**operators))
    q, k, v = inputs(6, 30, d, dv)
    with override("attention", backend):
        found = in_blocks(q, k, v, [0, 11, 24])
    assert found.shape == (2, 6, 6, dv) and relative_error(found, whole(q, k, v)) < 1e-10
    assert len(calls) == (0 if backend == "math" else 3)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, edges: list[int]) -> Tensor:
    """Blockwise attention with blocks between these edges; own keys behind the last one."""
    blocks = ((k[:, start:stop], v[:, start:stop]) for start, stop in zip(edges, edges[1:]))
    return blockwise.blockwise_attention(q, blocks, (k[:, edges[-1] :], v[:, edges[-1] :]), SCALE)


@pytest.mark.gpu
@needs_gpu
@widths
@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "efficient"])
@pytest.mark.parametrize(("t", "s"), [(192, 192), (33, 200)])
def test_padded_heads_match_explicit_softmax_on_gpu(backend: str | None, t: int, s: int, d: int, dv: int) -> None:
    values = inputs(t, s, d, dv, dtype=torch.bfloat16, device="cuda")
    with override("attention", backend) if backend else torch.enable_grad():
        error = worst_error(values, causal=True)
    print(backend, t, s, d, dv, in_use()["attention"], f"{error:.1e}")
    assert error < 1e-2 and in_use()["attention"] == (backend or in_use()["attention"]) != "math"


@pytest.mark.gpu
@needs_gpu
@widths
def test_masked_padded_heads_match_explicit_softmax_on_gpu(d: int, dv: int) -> None:
    values = inputs(192, 192, d, dv, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(192, 192, dtype=torch.bool, device="cuda").tril()
    assert max(errors(lambda q, k, v: attention(q, k, v, SCALE, mask=mask), whole, values)) < 1e-2


@pytest.mark.gpu
@needs_gpu
@widths
@pytest.mark.parametrize("backend", [None, "cudnn", "flash"])
@torch.no_grad()
def test_blocks_of_padded_heads_match_explicit_softmax_on_gpu(backend: str | None, d: int, dv: int) -> None:
    q, k, v = inputs(64, 364, d, dv, dtype=torch.bfloat16, device="cuda")
    with override("attention", backend) if backend else torch.no_grad():
        found = in_blocks(q, k, v, [0, 140, 300])
    assert relative_error(found, whole(q.float(), k.float(), v.float())) < 1e-2
