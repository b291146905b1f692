"""Processes of a sweep: what each sees of the GPUs, and what becomes of those that are stopped or killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_hylo.io import read_lock
from megatron_hylo.plan.sweep import read_sweep
from megatron_hylo.platform.distributed import gpu_names
from tests.forked import running
from tests.plan.conftest import run


@pytest.mark.parametrize(
    "variable, there, names",
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("4, GPU-5a,6", 3, ["4", "GPU-5a", "6"]),
        ("1,-1,2", 1, ["1"]),  # CUDA reads no further than -1
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_gpus_have_the_names_of_cuda_visible_devices(variable, there, names, monkeypatch):
    """The numbers of devices are CUDA's own rule for the variable, stated here, as there may be no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpu_names() == names


@pytest.mark.parametrize("gpus, seen", [(None, ["4", "4", "GPU-5a"]), (2, ["4", "4", "GPU-5a"]), (1, ["4"] * 3)])
def test_cells_side_by_side_are_spread_over_visible_gpus(gpus, seen, spec, tmp_path, monkeypatch):
    """Three real processes in three slots, which write down what they see in place of training."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES >> {tmp_path}/seen\nsleep 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a")
    run(spec(at_once=3, **({} if gpus is None else dict(gpus=gpus))))
    assert sorted((tmp_path / "seen").read_text().split()) == seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has GPUs")
def test_more_gpus_than_there_are_are_refused_before_a_cell_starts(spec, capsys):
    file = spec(gpus=3)
    assert run(file) == 2 and "gpus is 3, but 0 are visible here" in capsys.readouterr().err
    assert not any(cell.attempts() for cell in read_sweep(file).cells)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_bad_input_is_not_tried_again(spec, material, tmp_path, capsys):
    """Two real cells side by side, killed in the middle; they save, and resume. A third cell has no text.

    On a loaded machine one cell may start many seconds after the other, which would be through by then. So each is halted once
    it trains, until the sweep is dead.
    """
    bad = {"student.mla": 1, "train.data": "/nowhere"}
    file = spec(grid={"student.mla": [1], "train.train_tokens": [12_800, 25_600]}, cells=[bad], at_once=3)
    command = [sys.executable, "-m", "megatron_hylo.cli", "sweep", str(file)]
    first, deadline = subprocess.Popen(command), time.monotonic() + 600
    *good, missing = read_sweep(file).cells
    halted: dict[int, int] = {}  # process by cell
    try:
        while len(halted) < len(good):
            assert first.poll() is None and time.monotonic() < deadline
            for cell in good:
                if cell.number not in halted and (cell.last.run / "metrics.jsonl").is_file():
                    halted[cell.number] = read_lock(cell.last.run).about["pid"]
                    os.kill(halted[cell.number], signal.SIGSTOP)
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()  # the cells have the signal of its death by now
        for process in halted.values():
            os.kill(process, signal.SIGCONT)
    while any(cell.state()[0] in ("waiting", "running") for cell in good):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [cell.state()[0] for cell in good] == ["stopped", "stopped"]
    assert subprocess.run(command).returncode == 1
    assert [cell.state()[0] for cell in (*good, missing)] == ["finished", "finished", "failed"]
    assert all(len((cell.last.run / "starts.jsonl").read_text().splitlines()) == 2 for cell in good)
    attempt = missing.attempts()[-1]
    assert attempt["code"] == 2 and "/nowhere" in attempt["message"] and len(missing.attempts()) <= 2


@pytest.mark.slow
def test_a_sweep_that_is_stopped_while_its_cells_start_has_none_that_failed(spec):
    file = spec(at_once=2)
    cell, deadline = read_sweep(file).cells[0], time.monotonic() + 120
    with running([sys.executable, "-m", "megatron_hylo.cli", "sweep", file]) as first:
        while not (cell.folder / "log.txt").is_file():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        first.terminate()
        assert first.wait(120) == 3
    assert [cell.state()[0] for cell in read_sweep(file).cells] == ["waiting"] * 3 and cell.attempts()[0]["code"] == 3
