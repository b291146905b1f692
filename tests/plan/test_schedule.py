"""Simulated pipeline schedules; tests/parity holds their order to ranks that ran under Megatron-Core."""

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.plan.schedule import ascii_chart, bubble, idle_seconds, order, simulate, step_seconds


def test_1f1b_as_drawn_in_its_paper():
    """PipeDream-Flush on three ranks and four micro-batches: Narayanan et al. (arXiv:2104.04473), figure 3."""
    words = [" ".join(f"{kind}{i}" for kind, _, i in order(rank, 3, 4)) for rank in range(3)]
    assert words == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(4, 8, 1), (4, 8, 2), (2, 6, 3), (8, 8, 2), (4, 1, 1)])
def test_every_pass_runs_once_and_after_what_it_needs(ranks, micro_batches, chunks):
    stages = ranks * chunks
    events = simulate(ranks, micro_batches, [1.0 + 0.1 * i for i in range(stages)], [2.0] * stages, chunks, transfer=0.25)
    ends = {(e.kind, e.chunk * ranks + e.rank, e.micro_batch): e for e in events}
    assert len(ends) == len(events) == 2 * stages * micro_batches
    for (kind, stage, i), event in ends.items():
        before = (kind, stage - 1, i) if kind == "F" else (kind, stage + 1, i)
        if before in ends:
            assert event.start >= ends[before].end + 0.25
        assert kind == "F" or event.start >= ends["F", stage, i].end
    for rank in range(ranks):
        mine = sorted((e.start, e.end) for e in events if e.rank == rank)
        assert all(end <= start for (_, end), (start, _) in zip(mine, mine[1:]))


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 2, 1), (4, 16, 1), (8, 8, 1), (4, 8, 2), (8, 32, 4)])
def test_bubble_of_even_stages_is_the_known_share(ranks, micro_batches, chunks):
    """(p - 1) / v of m micro-batches' time, without transfers: arXiv:2104.04473, section 2.2."""
    events = simulate(ranks, micro_batches, [1.0] * ranks * chunks, [2.0] * ranks * chunks, chunks)
    idle = (ranks - 1) / chunks / micro_batches
    assert bubble(events) == pytest.approx(idle / (1 + idle))
    assert step_seconds(events) == pytest.approx(3 * chunks * (micro_batches + (ranks - 1) / chunks))
    assert len(ascii_chart(events).splitlines()) == ranks
    even = [1.0] * ranks * chunks, [2.0] * ranks * chunks
    assert idle_seconds(ranks, micro_batches, *even, chunks=chunks) == pytest.approx(3 * (ranks - 1))


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (2, 1), (4, 1), (4, 2), (8, 3)])
def test_idle_time_of_uneven_stages_is_that_of_all_micro_batches(ranks, chunks):
    """A step of many micro-batches, of which a few are simulated, against all of them."""
    forward = [1.0 + 0.3 * ((7 * i) % 5) for i in range(ranks * chunks)]
    backward = [2.0 * seconds + 0.1 * i for i, seconds in enumerate(forward)]
    many = 32 * ranks
    busy = max(sum(forward[rank::ranks] + backward[rank::ranks]) for rank in range(ranks))
    whole = step_seconds(simulate(ranks, many, forward, backward, chunks)) - many * busy
    assert idle_seconds(ranks, many, forward, backward, chunks) == pytest.approx(whole, rel=0.02, abs=1e-9)


def test_what_the_schedule_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="3 micro-batches must be a multiple of 2 pipeline ranks"):
        order(0, 2, 3, 2)
    with pytest.raises(ConfigError, match="2 ranks of 2 chunks have 4 stages, got 2"):
        simulate(2, 2, [1, 1], [1, 1], 2)
