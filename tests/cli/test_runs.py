"""`hylo runs` and `hylo watch` see of a run what is true, in every state, and write nothing."""

import fcntl
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hylo.cli import runs
from megatron_hylo.cli.main import QUICK
from megatron_hylo.cli.watch import LogTail, panel, sparkline, watch
from megatron_hylo.config import ConfigError
from megatron_hylo.eval.runs import read_run, run_state
from megatron_hylo.io import _locks, output_lock
from tests.cli.test_report import make_run
from tests.io.conftest import (
    another_process,  # noqa: F401  the fixture
    make,
)


def end(run: Path, ended: str, message: str = "") -> None:
    """Append the record with which a training process leaves a run."""
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"step": 4, "time": time.time(), "ended": ended, "message": message}) + "\n")


def start(run: Path, seconds_ago: float = 0.0) -> None:
    """Append the record of a start."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds_ago))
    with open(run / "starts.jsonl", "a") as file:
        file.write(json.dumps({"time": stamp, "devices": ["node7: GPU", "node8: GPU"], "commit": "0123456789ab-dirty"}) + "\n")


def state(run: Path) -> str:
    """State of a run folder, in a word."""
    return run_state(read_run(run, run.name))[0]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path) -> Path:
    made = make_run(tmp_path / "runs" / "first", "distil", 1e-3, {4: 40.0})
    start(made, seconds_ago=60)
    return made


def test_a_run_is_running_while_its_lock_is_held_and_killed_when_the_process_is_gone(run, another_process):  # noqa: F811
    process = another_process(run)
    assert state(run) == "running"
    process.kill()
    process.wait()
    assert state(run) == "killed"


def test_a_quickstarts_lock_is_that_of_the_folder_around_its_runs(run, another_process):  # noqa: F811
    process = another_process(run.parent)
    other = make_run(run.parent / "other", "align", 1e-3, {})
    end(other, "finished")
    assert (state(run), state(other)) == ("running", "finished")
    process.kill()
    process.wait()
    assert (state(run), state(other)) == ("killed", "finished")


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed"])
def test_a_run_says_how_it_ended_until_it_is_started_again(run, ended):
    end(run, ended, "a message")
    assert run_state(read_run(run, "run")) == (ended, "a message")
    time.sleep(0.01)
    start(run, seconds_ago=-2)
    (run.parent / f".{run.name}.lock").write_text(json.dumps({"pid": 1, "host": os.uname().nodename}))
    assert state(run) == "killed"  # after that start it wrote nothing more


def test_a_run_of_a_version_that_did_not_record_its_end(run):
    assert state(run) == "stopped"
    make(run / "model")
    assert state(run) == "finished"


@pytest.mark.parametrize("locks", ["of another machine", "none on this file system"])
def test_where_locks_do_not_tell_a_run_is_judged_by_its_last_word(run, locks, monkeypatch):
    about = {"pid": 1, "host": "another" if locks == "of another machine" else os.uname().nodename}
    (run.parent / f".{run.name}.lock").write_text(json.dumps(about))
    if locks != "of another machine":
        monkeypatch.setattr(_locks, "_is_held", lambda descriptor: None)
    assert state(run) == "running"
    long_ago = time.time() - 3600
    for file in run.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert state(run) == "killed"


def test_a_look_at_a_lock_keeps_nobody_from_it(run):
    """A look takes microseconds, on a busy machine now and then long; a process that wants the lock meanwhile gets it."""
    (run.parent / f".{run.name}.lock").write_text("")
    file = open(run.parent / f".{run.name}.lock")
    fcntl.flock(file, fcntl.LOCK_SH)
    threading.Timer(0.5, file.close).start()
    with output_lock(run):
        assert state(run) == "running"


def test_a_lock_file_of_another_program_is_none(run):
    (run.parent / ".lock").write_text("theirs")
    assert state(run) == "stopped"


def listed(capsys, *folders: Path, json: bool = False) -> str:
    """Output of `hylo runs` on a wide terminal."""
    output = io.StringIO()
    console, runs.results = runs.results, Console(file=output, width=180)
    try:
        runs.runs(tuple(folders), json)
    finally:
        runs.results = console
    return output.getvalue() + capsys.readouterr().out


def test_runs_are_listed_in_the_order_of_their_first_start(run, capsys, monkeypatch):
    start(make_run(run.parent / "deep" / "er" / "second", "align", 1e-3, {}), seconds_ago=600)
    before = contents(run.parent)
    monkeypatch.chdir(run.parent)
    head, *lines = listed(capsys).splitlines()
    assert [line.split()[0] for line in lines] == ["deep/er/second", "first", "deep/er/second:", "first:"]
    row = dict(zip(head.replace("held-out ppl", "ppl").split(), lines[1].replace(" x2", "x2").replace(" +1", "+1").split()))
    assert row | {"state": "stopped", "step": "4/4", "tokens": "512", "loss": "0.2500", "ppl": "40.00"} == row
    assert "node7 +1 x2" in lines[1] and "01234567-dirty" in lines[1]
    rows = json.loads(listed(capsys, json=True))
    assert [row["name"] for row in rows] == ["deep/er/second", "first"] and rows[1]["heldout_perplexity"] == 40.0
    assert contents(run.parent) == before


def test_two_runs_are_compared_by_settings_and_last_figures(run, capsys):
    other = make_run(run.parent / "other", "distil", 3e-3, {4: 35.0})
    shown = listed(capsys, run, other)
    assert [line.split() for line in shown.splitlines() if line.startswith(("optimizer.lr", "held-out"))] == [
        ["held-out", "ppl", "40.00", "35.00"],
        ["optimizer.lr", "0.001", "0.003"],
    ]
    assert "sequence_length" not in shown
    assert json.loads(listed(capsys, run, other, json=True))["settings"] == {"optimizer.lr": [1e-3, 3e-3]}


def test_columns_without_room_are_left_out_and_named(run, capsys, monkeypatch):
    monkeypatch.setattr(runs, "results", Console(width=60))
    runs.runs((run,))
    said = capsys.readouterr()
    assert "commit" not in said.out and "held-out ppl" in said.out and "commit" in said.err


@pytest.mark.parametrize("folder", ["nowhere", "file", "empty"])
def test_what_is_no_run_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for verb in (lambda path: runs.runs((path,)), watch):
        with pytest.raises(ConfigError, match=f"{folder}.*(no such folder|not a run folder|not the output of a training run)"):
            verb(tmp_path / folder)


def test_watching_prints_each_new_line_once_and_ends_with_the_run(run, capsys, monkeypatch):
    (run / "log.txt").write_text("".join(f"old {number}\n" for number in range(20)))

    def new_lines(tail: LogTail) -> list[str]:
        found = read(tail)
        looked.set()
        return found

    def train() -> None:
        with output_lock(run):
            ready.set()
            looked.wait(120)  # at the old lines
            for number in range(3):
                time.sleep(0.1)
                with open(run / "log.txt", "a") as file:
                    file.write(f"new {number}\nhalf")
                    file.flush()
                    time.sleep(0.05)
                    file.write(" a line\n")
            end(run, "failed", "the disk is full")

    ready, looked, read = threading.Event(), threading.Event(), LogTail.new_lines
    monkeypatch.setattr(LogTail, "new_lines", new_lines)
    thread = threading.Thread(target=train)
    thread.start()
    ready.wait()
    assert watch(run.parent, interval=0.02) == 1
    end(run, "stopped")
    assert watch(run) == 3
    end(run, "finished")
    assert watch(run) == 0
    thread.join()
    new = [line for number in range(3) for line in (f"new {number}", "half a line")]
    last = f"{run}: failed: the disk is full"
    out = capsys.readouterr().out
    assert out[: out.index(last) + len(last)].splitlines() == [f"old {n}" for n in range(10, 20)] + new + [last]


def test_a_log_that_is_made_anew_is_read_from_its_beginning(tmp_path):
    tail = LogTail(tmp_path / "log.txt")
    assert tail.new_lines() == []
    (tmp_path / "log.txt").write_text("one\ntwo\n")
    assert (tail.new_lines(), tail.new_lines()) == (["one", "two"], [])
    (tmp_path / "log.txt").write_text("other\n")
    assert tail.new_lines() == ["other"]


def test_the_panel_shows_step_loss_rate_time_left_evaluation_and_lines(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
        for step in (1, 2):  # 60 s a step, two of four done
            now = time.time() + 60 * step
            values = {"loss": 0.5, "tokens_per_second": 1234.0, "learning_rate_mixers": 1e-4, "peak_memory_gib": 3.2}
            file.write(json.dumps({"step": step, "time": now, "tokens": 128 * step} | values) + "\n")
    console = Console(file=io.StringIO(), width=120)
    read = read_run(run, "run")
    read.records = [record for record in read.records if "time" in record or "heldout_perplexity" in record]
    console.print(panel(read, "running", "", ["the last line"]))
    shown = console.file.getvalue()
    for text in ("step 2 of 4", "50%", "0:02:00 left", "loss 0.5000", "lr 0.0001", "1,234 tokens/s", "3.2 GiB", "40",
                 "the last line", "node7"):  # fmt: skip
        assert text in shown, text


def test_a_sparkline_goes_from_the_least_to_the_largest_value():
    assert sparkline([0.0, 7.0, 3.0], 10) == "▁█▄"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"


def test_verbs_about_runs_start_without_torch(run):
    """`report` needs matplotlib alone."""
    assert {verb.__name__ for verb in QUICK} >= {"runs", "watch", "report"}
    end(run, "finished")
    program = (
        "import sys\nfrom megatron_hylo.cli.main import main\n"
        "for line in (['runs', '--json'], ['watch'], ['report']):\n"
        "    try: main([*line, sys.argv[1]])\n"
        "    except SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, run], capture_output=True, text=True)
    assert done.returncode == 0 and (run / "report.html").is_file(), done.stderr
