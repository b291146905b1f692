"""A hang and a slow rank are named; a jump of the loss is kept with its text, and the checkpoint before it."""

import json
import shutil
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hylo.eval.runs import read_lines
from megatron_hylo.io import verify_manifest
from megatron_hylo.train import loop
from megatron_hylo.train.alarms import Alarms
from megatron_hylo.train.callback import Progress
from megatron_hylo.train.hang_watch import HangWatch, describe_hang
from megatron_hylo.train.loop import train
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.stragglers import slow_rank
from tests.forked import run_ranks

STACK = (
    'Timeout (0:05:00)!\nThread 0x01 (most recent call first):\n  File "/x/threading.py", line 1 in wait\n\n'
    'Thread 0x02 (most recent call first):\n  File "/lib/torch/distributed.py", line 9 in all_reduce\n'
    '  File "/src/megatron_hylo/train/%s.py", line 12 in %s\n'
)


def test_a_rank_that_is_somewhere_else_than_the_others_is_named(tmp_path):
    for rank in range(4):
        place = ("data_loader", "rank_batches") if rank == 2 else ("loop", "training_step")
        (tmp_path / f"rank_{rank:05d}.txt").write_text(STACK % place)
    said = describe_hang(tmp_path, ["a", "a", "b", "b"], 31, 300.0)
    assert "no step for 5 minutes after step 31: rank 2 on b is in rank_batches (data_loader.py:12)" in said
    assert "the other 3 are in training_step (loop.py:12)" in said
    (tmp_path / "rank_00001.txt").write_text("")
    said = describe_hang(tmp_path, ["a", "a", "b", "b"], 31, 300.0)
    assert "rank 1 on a wrote no stack, so the process has stopped or is gone" in said and "rank 2" not in said


def test_a_step_that_does_not_end_leaves_the_stack_and_a_warning(one_rank, tmp_path, caplog):
    def stuck_in_a_library() -> HangWatch:
        watch, deadline = HangWatch(tmp_path, 0.6, ["here"]), time.monotonic() + 120
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
        return watch

    watch = stuck_in_a_library()
    assert "no step for 0.01 minutes after step 0: all ranks are in stuck_in_a_library" in caplog.text
    watch.close()
    assert "stuck_in_a_library" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    watch = HangWatch(tmp_path, 60.0, ["here"])
    watch.after_step(Progress(1, 4, SkippedSteps(0)))
    watch.close()
    assert not (tmp_path / "stacks").exists() and threading.active_count() < 50


def test_a_jump_of_the_loss_is_kept_with_the_text_of_its_step(one_rank, settings, monkeypatch, tmp_path):
    config = settings("pretrain", steps=24, checkpoint=dict(save_interval=4, keep=1, async_save=False))
    original = loop.training_step

    def jumping(states, objective, batches, micro_batches, step, *rest, **named):
        found = original(states, objective, batches, micro_batches, step, *rest, **named)
        return found | ({"loss": 99.0} if step == 21 else {})

    monkeypatch.setattr(loop, "training_step", jumping)
    train(config)
    run = Path(config.output)
    (alarm,) = read_lines(run / "alarms.jsonl")
    assert (alarm["step"], alarm["metric"], alarm["value"], alarm["windows"]) == (22, "loss", 99.0, [84, 88])
    assert len(alarm["texts"]) == 4 and all(alarm["texts"])
    assert "loss 99 is" in (log := (run / "log.txt").read_text()) and "step_00000020 is kept as last_good" in log
    assert (run / "last_good").resolve() == (run / "checkpoints" / "step_00000020").resolve()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000020", "step_00000024"]
    verify_manifest(run / "last_good")
    for newer in (run / "model", run / "checkpoints" / "step_00000024"):
        shutil.rmtree(newer)
    monkeypatch.setattr(loop, "training_step", original)
    train(config)  # goes back to the last good one
    assert "resumed at step 20" in (run / "log.txt").read_text()
    losses = [(r["step"], r["loss"]) for r in read_lines(run / "metrics.jsonl") if "loss" in r]
    assert [step for step, _ in losses] == list(range(1, 25)) and all(loss < 99 for _, loss in losses)


NORMAL = [1.0] * 20


@pytest.mark.parametrize(
    ("values", "alarms", "kept"),
    [
        ([1.0] * 40, [], []),
        ([1.0] * 19 + [9.0], [], []),  # too few to compare with
        ([*NORMAL, 9.0], [21], [21]),
        ([*NORMAL, 9.0, 9.0, *NORMAL, 9.0], [21, 22, 43], [21]),  # a checkpoint between them may be bad too
        ([*NORMAL, 9.0, *NORMAL * 5, 9.0], [21, 122], [21, 122]),
        ([1.0, None, None, 1.0], [2], [2]),  # skipped steps: no other to compare with is needed
    ],
)
def test_the_first_of_some_alarms_keeps_the_checkpoint_before_it(one_rank, tmp_path, values, alarms, kept):
    said: list[str] = []
    asked: list[int] = []
    skipped = SkippedSteps(9)
    reporter: Any = SimpleNamespace(say=said.append)
    watch = Alarms(tmp_path, reporter, lambda first, last: [], 4, lambda step: asked.append(step))
    for step, value in enumerate(values, 1):
        skipped.in_a_row = skipped.in_a_row + 1 if value is None else 0
        watch.after_step(Progress(step, 4 * step, skipped, {"loss": value} if value else {}))
    assert ([line["step"] for line in read_lines(tmp_path / "alarms.jsonl")], asked, len(said)) == (alarms, kept, len(alarms))
    if alarms:  # a later start knows of them
        assert Alarms(tmp_path, reporter, lambda first, last: [], 4, lambda step: None).newest == alarms[-1]


@pytest.mark.multirank
@pytest.mark.parametrize(("phase", "words"), [("data", "reading batches"), ("passes", "forward and backward passes")])
def test_the_slowest_rank_of_a_phase_is_recorded_and_named(settings, tmp_path, phase, words):
    config = settings("pretrain", steps=9, logging=dict(log_interval=2))
    (tmp_path / "settings.json").write_text(json.dumps(asdict(config)))
    run_ranks("tests.train.straggler_ranks", [tmp_path / "settings.json", phase], 2, tmp_path)
    records = [r for r in read_lines(Path(config.output) / "metrics.jsonl") if f"slowest/{phase}_rank" in r]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 9]
    assert all(r[f"slowest/{phase}_rank"] == 1 and r[f"slowest/{phase}_seconds"] > 0.5 for r in records)
    log = (Path(config.output) / "log.txt").read_text()
    assert log.count(f"step 6: rank 1 on {socket.gethostname()} is slow in {words}") == log.count(f"is slow in {words}") == 1


@pytest.mark.parametrize(
    ("phase", "seconds", "device", "slow"),
    [
        ("passes", [0.50, 0.51, 0.50, 0.70], "cuda", 3),
        ("passes", [0.50, 0.51, 0.50, 0.60], "cuda", None),  # less than 1.3 times
        ("data", [0.001, 0.001, 0.004, 0.001], "cuda", None),  # nothing of a step
        ("data", [0.001, 0.001, 0.4, 0.001], "cuda", 2),
        ("product", [1e-4, 1e-4, 2e-4, 1e-4], "cuda", 2),
        ("product", [1e-4, 2e-4], "cpu", None),  # shared cores
    ],
)
def test_a_rank_is_slow_where_it_holds_up_the_others(phase, seconds, device, slow):
    assert slow_rank(phase, seconds, 1.0, device) == slow
