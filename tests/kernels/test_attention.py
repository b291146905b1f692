"""Attention against an explicit softmax over an explicit, end-aligned causal mask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hylo.kernels import attention_after_prefix as after_prefix
from megatron_hylo.kernels.attention import attention, readable
from megatron_hylo.kernels.registry import in_use, override
from tests.kernels.compare import relative_error


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = True) -> torch.Tensor:
    """The formula, in float32 or wider, with K and V repeated and query i seeing keys 0 .. s - t + i."""
    (t, hq), (s, hkv) = q.shape[1:3], k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(hq // hkv, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k) * scale
    if causal:
        keys, queries = torch.arange(s, device=q.device), torch.arange(t, device=q.device)
        scores = scores.masked_fill(keys > queries[:, None] + s - t, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).to(q.dtype)


def inputs(
    t: int, s: int, d: int, dv: int, hkv: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t + s)
    shapes = ((2, t, 6, d), (2, s, hkv, d), (2, s, hkv, dv))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.to(device).requires_grad_() for x in values]


def worst_error(values: list[torch.Tensor], causal: bool) -> float:
    scale = 0.3 * values[0].shape[-1] ** -0.5  # not the default, which must not be used instead
    cotangent = torch.randn(explicit(*values, scale, causal).shape, generator=torch.Generator().manual_seed(0)).to(values[0])
    outputs = [f(*values, scale, causal) for f in (attention, explicit)]
    gradients = [torch.autograd.grad(out, values, cotangent) for out in outputs]
    pairs = [outputs, *zip(*gradients, strict=True)]
    return max(relative_error(value, truth) for value, truth in pairs)


@pytest.mark.parametrize("hkv", [1, 2, 6])
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (16, 24), (24, 16)])
@pytest.mark.parametrize(("t", "s"), [(9, 9), (4, 11), (1, 7)])
def test_causal_matches_explicit_softmax(t: int, s: int, d: int, dv: int, hkv: int) -> None:
    assert worst_error(inputs(t, s, d, dv, hkv), causal=True) < 1e-10


def test_a_single_token_reads_its_own_value() -> None:
    q, k, v = inputs(1, 1, 16, 24)
    torch.testing.assert_close(attention(q, k, v, 1.0), v.repeat_interleave(3, 2), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("t", "s"), [(5, 9), (9, 5)])
def test_full_matches_explicit_softmax(t: int, s: int) -> None:
    assert worst_error(inputs(t, s, 16, 16), causal=False) < 1e-10


@pytest.mark.parametrize(("t", "s"), [(9, 10), (4, 33)])
def test_a_prefix_and_own_keys_merge_to_the_whole(t: int, s: int, monkeypatch) -> None:
    """On a CPU with torch's flash kernels in the place of cuDNN's: what blocks are merged by."""
    aten = torch.ops.aten
    flash, differentiate = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    monkeypatch.setattr(after_prefix, "_block", lambda q, k, v, causal, scale: flash(q, k, v, 0.0, causal, scale=scale))
    monkeypatch.setattr(
        after_prefix, "_block_gradients", lambda *given: differentiate(*given[:6], 0.0, given[7], scale=given[8])
    )
    q, k, v = (x[..., :2, :] for x in inputs(t, s, 16, 16))

    def merged(q, k, v, scale, causal):
        return after_prefix.attention_after_prefix(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)

    cotangent = torch.randn(q.shape, dtype=q.dtype)
    outputs = [f(q, k, v, 0.2, True) for f in (merged, explicit)]
    gradients = [torch.autograd.grad(out, (q, k, v), cotangent) for out in outputs]
    assert max(relative_error(ours, theirs) for ours, theirs in [outputs, *zip(*gradients)]) < 1e-6


@pytest.mark.parametrize("t", [9, 1])
def test_a_mask_matches_explicit_softmax_over_each_sequences_own_keys(t: int) -> None:
    q, k, v = inputs(t, 12, 8, 10)
    padding = (3, 0)  # keys that no query of the sequence sees
    seen = torch.arange(12) >= torch.tensor(padding)[:, None]
    mask = (torch.arange(12) <= torch.arange(12)[12 - t :, None]) & seen[:, None, None]
    mask |= torch.arange(12) == torch.arange(12)[12 - t :, None]
    out = attention(q, k, v, 0.3, mask=mask)
    for row, missing in enumerate(padding):
        first = max(missing - (12 - t), 0)  # the first query that is no padding itself
        own = [x[row : row + 1, start:] for x, start in ((q, first), (k, missing), (v, missing))]
        torch.testing.assert_close(out[row : row + 1, first:], explicit(*own, 0.3), rtol=0, atol=1e-12)


def test_float32_matches_explicit_softmax() -> None:
    assert worst_error(inputs(40, 70, 32, 32, dtype=torch.float32), causal=True) < 1e-5


def test_math_backend_by_override_matches_explicit_softmax() -> None:
    with override("attention", "math"):
        assert worst_error(inputs(9, 9, 16, 24), causal=True) < 1e-10
    assert in_use()["attention"] == "math"


def test_more_queries_than_keys_and_wrong_heads_are_refused() -> None:
    q, k, v = inputs(5, 3, 8, 8)
    with pytest.raises(ValueError, match="3 keys and 5 queries"):
        attention(q, k, v, 1.0)
    with pytest.raises(ValueError, match="hkv dividing hq"):
        attention(q[:, :, :5], k, v, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "efficient"])
@pytest.mark.parametrize(("t", "s", "dv"), [(192, 192, 64), (192, 192, 128), (33, 200, 64), (1, 200, 64)])
def test_cuda_backends_match_explicit_softmax(backend: str | None, t: int, s: int, dv: int) -> None:
    values = inputs(t, s, 64, dv, dtype=torch.bfloat16, device="cuda")
    if backend is None:
        error = worst_error(values, causal=True)
        assert in_use()["attention"] in ("cudnn", "flash", "efficient")
    else:
        with override("attention", backend):
            error = worst_error(values, causal=True)
    assert error < 1e-2


def test_only_what_does_not_lie_on_16_bytes_is_copied() -> None:
    """An allocation begins on 16 bytes; a section of it may not, nor its rows."""
    whole = torch.zeros(2, 4, 3, 40, dtype=torch.bfloat16)
    for x, copied in ((whole, False), (whole[..., 8:24], False), (whole[..., 10:26], True), (whole[..., :26], False)):
        found = readable(x.transpose(1, 2))
        assert (found.data_ptr() != x.data_ptr()) == copied and torch.equal(found, x.transpose(1, 2))
    rows = torch.zeros(2, 4, 3, 26, dtype=torch.bfloat16)[..., :16]
    assert readable(rows).is_contiguous() and not rows.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_sections_of_odd_width_on_gpu(backend: str) -> None:
    """As MLA's values are, beside keys of ten channels."""
    q, k, v = inputs(40, 40, 16, 26, dtype=torch.bfloat16, device="cuda")
    with override("attention", backend):
        found = attention(q, k, v[..., 10:], 0.25)
    assert relative_error(found, explicit(q.float(), k.float(), v[..., 10:].float(), 0.25)) < 1e-2


@pytest.fixture
def switch():
    """Turn torch's deterministic algorithms on as a deterministic run has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Modes(TorchDispatchMode):
    """Notes for each operation that runs whether torch's deterministic algorithms were strict."""

    def __init__(self) -> None:
        super().__init__()
        self.strict: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.are_deterministic_algorithms_enabled()
        self.strict[func.overloadpacket.__name__] = not torch.is_deterministic_algorithms_warn_only_enabled()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_backward_pass_of_attention_is_strict(switch, masked: bool) -> None:
    """With a warning alone torch's fused kernels add up atomically: dq by blocks of keys, in another order each time."""
    values, mask = inputs(9, 9, 16, 16), torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    with Modes() as modes:
        attention(*values, 0.25, mask=mask).square().sum().backward()
    fused = [name for name in modes.strict if name.startswith("_scaled_dot_product_")]
    assert [name for name, strict in modes.strict.items() if strict] == [name for name in fused if name.endswith("_backward")]
    assert len(fused) == 2 and torch.is_deterministic_algorithms_warn_only_enabled()


def test_cudnn_is_refused_where_runs_are_to_be_deterministic(switch) -> None:
    with override("attention", "cudnn"), pytest.raises(RuntimeError, match="`deterministic` is on; use flash or efficient"):
        attention(*inputs(9, 9, 16, 16), 0.25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)])
def test_gradients_are_the_same_each_time_on_gpu(switch, dtype: torch.dtype, masked: bool) -> None:
    """Sums over 16 blocks of keys; MLA's heads, whose values are narrower than their keys."""
    q, k, v = inputs(2048, 2048, 96, 64, dtype=dtype, device="cuda")
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").tril() if masked else None
    cotangent = torch.randn_like(q[..., :64])
    first = None
    for _ in range(20):
        found = torch.autograd.grad(attention(q, k, v, 0.1, mask=mask), (q, k, v), cotangent)
        first = first or found
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))
