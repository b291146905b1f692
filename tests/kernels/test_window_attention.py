"""Windowed attention against an explicit softmax over an explicit mask: outputs and gradients."""

import pytest
import torch

from megatron_hylo.kernels.window_attention import BLOCK, window_attention
from tests.kernels.compare import relative_error
from tests.kernels.test_attention import inputs


def explicit(q, k, v, scale, window, real=None):
    """The formula: query i stands at key s - t + i; keys that are not real are seen by their own query alone."""
    (t, hq), (s, hkv) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(hq // hkv, 2) for x in (k, v))
    back = torch.arange(s - t, s)[:, None] - torch.arange(s)
    seen = ((back >= 0) & (back < window)).expand(len(q), t, s)
    if real is not None:
        seen = seen & (real[:, None] | (back == 0))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def worst_error(values, *settings):
    outputs = [f(*values, 0.1, *settings) for f in (window_attention, explicit)]
    cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(outputs[0])
    gradients = [torch.autograd.grad(out, values, cotangent) for out in outputs]
    return max(relative_error(ours, theirs) for ours, theirs in [outputs, *zip(*gradients, strict=True)])


@pytest.mark.parametrize("window", [2, BLOCK, BLOCK + 3, 500])
@pytest.mark.parametrize(("t", "s"), [(3 * BLOCK, 3 * BLOCK), (200, 200), (150, 260), (1, 90), (9, 9)])
def test_matches_explicit_softmax(t: int, s: int, window: int) -> None:
    assert worst_error(inputs(t, s, 16, 24), window) < 1e-10


@pytest.mark.parametrize("window", [5, BLOCK + 3])
@pytest.mark.parametrize(("t", "s"), [(200, 200), (150, 260), (1, 90), (1, 3)])
def test_keys_that_are_not_real_are_seen_by_no_other_query(t: int, s: int, window: int) -> None:
    real = torch.rand(2, s, generator=torch.Generator().manual_seed(s)) > 0.3
    assert worst_error(inputs(t, s, 16, 16), window, real) < 1e-10


def test_memory_grows_with_the_sequence_not_its_square(monkeypatch) -> None:
    """No mask of more numbers than two blocks squared, whatever the sequence."""
    largest = 0
    whole = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, mask=None, **settings):
        nonlocal largest
        largest = max(largest, 0 if mask is None else mask.numel())
        return whole(q, k, v, mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    window_attention(*inputs(2048, 2048, 8, 8), 0.1, BLOCK)
    assert 0 < largest <= 2 * BLOCK**2


def test_more_queries_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="no more queries than keys, got 5, 9 queries, 4 keys"):
        window_attention(*inputs(9, 4, 8, 8), 0.1, 5)
