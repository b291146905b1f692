"""Best-fit packing against a plain oracle, and what becomes of every token."""

import time

import numpy as np
import pytest

from megatron_hylo.data.best_fit import _best_fit, pack_best_fit


def plain_best_fit(lengths, capacity, most):
    """Fill of each window: every document, longest first, goes where the least room is that is enough."""
    rooms: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room[0] >= length and room[1] < most]
        best = min(fitting, key=lambda room: room[0], default=None)
        if best is None:
            rooms.append(best := [capacity, 0])
        best[0] -= length
        best[1] += 1
    return sorted(capacity - room for room, _ in rooms)


def draws(seed, capacity, count):
    generator = np.random.default_rng(seed)
    lengths = np.minimum(np.exp(generator.normal(np.log(capacity) - 2, 1.5, count)).astype(np.int64), capacity)
    lengths[generator.random(count) < 0.3] = generator.integers(1, capacity)  # many alike
    return np.maximum(lengths, 1)


@pytest.mark.parametrize("seed", range(40))
def test_windows_fill_as_those_of_a_plain_best_fit(seed):
    """Without a cap the fills are equal, window by window; with one no window has more documents and none is lost."""
    capacity = 7 + 13 * seed
    lengths = -np.sort(-draws(seed, capacity, 300))
    window, filled = _best_fit(lengths, capacity, len(lengths))
    assert sorted(filled.tolist()) == plain_best_fit(lengths.tolist(), capacity, len(lengths))
    assert np.bincount(window, lengths).tolist() == filled.tolist()
    window, filled = _best_fit(lengths, capacity, 3)
    assert np.bincount(window).max() <= 3
    assert np.bincount(window, lengths).tolist() == filled.tolist()
    assert filled.max() <= capacity


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_predicted_once_and_windows_are_full(seed, most):
    """Also of documents longer than windows, of one token, and of none."""
    capacity = 2 + 5 * seed
    generator = np.random.default_rng(seed)
    lengths = np.concatenate([draws(seed, 3 * capacity, 200), [0, 0, 1, capacity, capacity + 1, 5 * capacity]])
    lengths = lengths[generator.permutation(len(lengths))]
    packing = pack_best_fit(lengths, capacity, most)
    sizes = np.add.reduceat(packing.length, packing.first[:-1])
    if most is None:
        assert sizes.tolist() == [capacity] * (len(packing.first) - 1) and packing.padding == 0
    else:
        assert np.diff(packing.first).max() <= most and packing.left_out == 0
        assert packing.padding == (capacity - sizes).sum() and (sizes <= capacity).all()
    assert packing.length.min() > 0
    seen = [np.zeros(max(length - 1, 0), int) for length in lengths]  # tokens behind a document's first
    for document, start, length in zip(packing.document, packing.start, packing.length):
        seen[document][start : start + length - 1] += 1
        assert start + length <= lengths[document]
    missing = sum(int((mine == 0).sum()) for mine in seen)
    assert max((mine.max(initial=0) for mine in seen), default=0) <= 1
    assert missing <= packing.left_out < capacity + 1
    whole = [d for d, start, n in zip(packing.document, packing.start, packing.length) if (start, n) == (0, lengths[d])]
    assert len(whole) == len(set(whole)) == len(packing.document) - packing.fragments


@pytest.mark.parametrize("most", [None, 2])
def test_documents_that_end_with_a_window_leave_nothing_over(most):
    """Windows overlap by one token, so 1 + 3 * 9 tokens are three windows of ten; their last token is in no other piece."""
    packing = pack_best_fit(np.full(5, 28), 10, most)
    assert packing.length.tolist() == [10] * 15 and sorted(packing.start.tolist()) == [0] * 5 + [9] * 5 + [18] * 5
    assert (packing.left_out, packing.padding) == (0, 0)


def test_a_million_documents_take_seconds_and_few_are_cut():
    """Stream packing cuts one document a window; measured: see docs/text.md."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(6.5, 1.4, 10**6)).astype(np.int64) + 1
    start = time.process_time()
    packing = pack_best_fit(lengths, 8193)
    seconds = time.process_time() - start
    windows = len(packing.first) - 1
    cut = packing.fragments / windows
    print(f"{seconds:.1f} s, {windows} windows, {packing.fragments} fragments, {packing.left_out} left out")
    long = int(((lengths - 1) // 8192)[lengths >= 8193].sum() + (lengths > 8193).sum())
    assert packing.fragments < long + 0.02 * windows, cut
    assert seconds < 20
