"""Forked processes end, fail and print as fresh ones do."""

import contextlib
import signal
import subprocess
import time

import psutil
import pytest

from tests import forked
from tests.forked import Program, end_programs, run_ranks, running

SERVE = ["0", "--bind", "127.0.0.1"]  # of http.server, which runs until it is stopped


def test_a_module_runs_as_from_the_command_line_and_its_rank_is_its_own(tmp_path):
    (tmp_path / "some.json").write_text('{"a": 1}')
    assert run_ranks("json.tool", ["--compact", tmp_path / "some.json"], 2, tmp_path) == '{"a":1}\n' * 2
    program = Program("json.tool", ["--frobnicate"], tmp_path / "log")
    assert "unrecognized arguments: --frobnicate" in program.communicate(timeout=60)[0] and program.returncode == 2


def test_a_rank_that_fails_or_hangs_ends_all_and_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)2 ranks of json.tool failed.*rank 0, status 2.*error: .*nothing"):
        run_ranks("json.tool", [tmp_path / "nothing"], 2, tmp_path)
    with pytest.raises(RuntimeError, match="(?s)took more than 1 s.*rank 1, status None"):
        run_ranks("http.server", SERVE, 2, tmp_path, timeout=1)
    program = Program("http.server", SERVE, tmp_path / "slow")
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(timeout=0.1)
    assert program.wait(timeout=60) == -signal.SIGKILL
    program = Program("http.server", SERVE, tmp_path / "log")
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == -signal.SIGTERM


def test_a_program_is_killed_that_has_not_begun_its_session(tmp_path, monkeypatch):
    program = Program("http.server", SERVE, tmp_path / "log")
    monkeypatch.setattr(forked.os, "killpg", lambda *_: (_ for _ in ()).throw(ProcessLookupError))
    program.kill()
    assert program.wait(timeout=60) == -signal.SIGKILL


def test_what_a_failed_test_leaves_running_is_killed(tmp_path):
    kept, left = (Program("http.server", SERVE, tmp_path / "log") for _ in range(2))
    end_programs([program for program in Program.started if program is not left])
    assert (kept.poll(), left.poll()) == (None, -signal.SIGKILL) and left not in Program.started
    kept.kill()
    script = "trap '' TERM; setsid sleep 1000 & echo $!; wait"
    with pytest.raises(KeyError), running(["bash", "-c", script], stdout=subprocess.PIPE) as process:
        other = int(process.stdout.readline())  # of another session
        raise KeyError
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(other).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_ranks_that_end_between_two_looks_at_them_are_not_waited_for(tmp_path, monkeypatch):
    looks = []

    def statuses(ranks):
        """Say at the first look that they run, and from then on what is so, which is that all have ended."""
        looks.append(ranks)
        if len(looks) > 1:
            return [program.poll() for program in ranks.programs]
        for program in ranks.programs:
            program.wait(timeout=60)
        return [None] * len(ranks.programs)

    monkeypatch.setattr(forked.Ranks, "statuses", statuses)
    monkeypatch.setattr(forked, "wait", lambda running, timeout: pytest.fail(f"waited {timeout} s for {running}"))
    (tmp_path / "some.json").write_text("1")
    assert run_ranks("json.tool", [tmp_path / "some.json"], 2, tmp_path) == "1\n" * 2
