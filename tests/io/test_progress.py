"""Progress on stderr: lines of a log are few, and say which share is done and how long the rest takes."""

import contextlib
import io
from types import SimpleNamespace

import pytest

from megatron_hylo.io import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, and a stderr that is no terminal."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
    monkeypatch.delenv("RANK", raising=False)
    return now


def lines() -> list[str]:
    return progress.sys.stderr.getvalue().splitlines()


def test_log_has_first_line_at_once_and_then_one_every_ten_seconds(clock):
    seen = []
    for item in progress.show_progress(range(100), "evaluate"):
        seen.append(item)
        if item == 0:
            assert lines() == ["evaluate ..."]
        clock[0] += 1.0
    assert seen == list(range(100))
    assert len(lines()) == 11
    assert lines()[1] == "evaluate: 10%, 1:30 left"
    assert lines()[-1] == "evaluate: done in 1:40"


def test_inner_loop_refines_the_outer_one(clock):
    for _ in progress.show_progress(range(2), "shards"):
        for _ in progress.show_progress((i for i in range(50)), "batches"):
            clock[0] += 1.0
    assert lines()[:3] == ["shards ...", "shards: 10%, 1:30 left", "shards: 20%, 1:20 left"]
    assert not any("batches" in line for line in lines())


def test_other_ranks_are_silent_and_an_interrupted_loop_leaves_nothing_behind(clock, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        for _ in progress.show_progress(range(3), "shards"):
            raise KeyboardInterrupt
    assert lines() == ["shards ..."] and not progress._loops
    monkeypatch.setenv("RANK", "1")
    assert list(progress.show_progress([], "none")) == []
    assert list(progress.show_progress([5], "one")) == [5]
    assert lines() == ["shards ..."]


def test_terminal_gets_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with contextlib.redirect_stderr(terminal):  # where rich writes
        assert list(progress.show_progress(range(4), "tensors")) == [0, 1, 2, 3]
    assert "100%" in terminal.getvalue() and "tensors ..." not in terminal.getvalue()
