"""A model that reads overlapping windows gives what it gives when it is called on each of them by hand."""

import pytest
import torch

from megatron_hylo.config.teacher_window import windows_of
from megatron_hylo.models.frozen import FrozenModel, freeze
from megatron_hylo.parallel.documents import PackedDocuments
from tests.conftest import uneven_model


@pytest.mark.parametrize("window", [2, 5, 8, 64])
def test_every_token_has_half_a_window_before_it_and_is_taken_once(window):
    for length in (*range(1, 40), 200):
        found = windows_of(length, window)
        assert [w.first for w in found] == [0, *(w.end for w in found[:-1])] and found[-1].end == length
        assert all(w.begin >= 0 and w.end - w.begin == min(window, length) for w in found)
        assert all(2 * (w.first - w.begin) >= window for w in found[1:])
        assert len(found) == 1 + max(0, -(-(length - window) // (window // 2)))


def by_hand(model, ids: torch.Tensor, window: int) -> torch.Tensor:
    """[tokens, batch, hidden]: the first window whole, then of each later one what the ones before it have not."""
    states, begin = [model(ids[:, :window])], 0
    while begin + window < ids.shape[1]:
        done = begin + window
        begin = min(begin + window // 2, ids.shape[1] - window)
        states.append(model(ids[:, begin : begin + window])[done - begin :])
    return torch.cat(states)


@pytest.fixture
def model(one_rank):
    """Attention, whose every output depends on how much it reads and on where."""
    return uneven_model("*-*-").eval()


@pytest.mark.parametrize(("length", "window"), [(50, 16), (48, 16), (47, 15), (16, 16), (9, 16)])
@torch.no_grad()
def test_windows_match_calls_by_hand(model, length, window):
    ids = torch.randint(160, (3, length))
    found = FrozenModel([model], window)(ids)
    torch.testing.assert_close(found, by_hand(model, ids, window), rtol=0, atol=1e-12)
    whole = model(ids)
    assert torch.allclose(found, whole) == (length <= window)  # reading all of it is something else
    assert torch.equal(FrozenModel([model])(ids), whole)


@torch.no_grad()
def test_windows_of_packed_documents_match_calls_by_hand(model):
    starts = [0, 3, 4, 40, 56, 79]
    ids, edges = torch.randint(160, (1, 80)), [*starts, 80]
    documents = PackedDocuments(torch.tensor(starts), 80, slice(0, 80))
    found = FrozenModel([model], 16)(ids, documents)
    expected = [by_hand(model, ids[:, a:b], 16) for a, b in zip(edges, edges[1:])]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)


def test_a_frozen_model_has_no_gradient_and_its_own_head(model):
    frozen = freeze([model], window=8)
    assert not frozen(torch.randint(160, (1, 20))).requires_grad
    assert frozen.head_weight() is model.head_weight() and not frozen.config.sequence_parallel and len(frozen) == 1
