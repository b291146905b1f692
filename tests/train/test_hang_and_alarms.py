"""A hang is named with the stack of the rank that the others wait for; a jump of the loss is kept with its text."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hylo.eval.runs import read_lines
from megatron_hylo.train import loop
from megatron_hylo.train.alarms import Alarms
from megatron_hylo.train.callback import Progress
from megatron_hylo.train.hang_watch import HangWatch, describe_hang
from megatron_hylo.train.loop import train
from megatron_hylo.train.nan_guard import SkippedSteps

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
    watch = HangWatch(tmp_path, 0.3, ["here"])

    def stuck_in_a_library():
        deadline = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)

    stuck_in_a_library()
    assert "no step for 0.005 minutes after step 0: all ranks are in stuck_in_a_library" in caplog.text
    watch.close()
    assert "stuck_in_a_library" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    watch = HangWatch(tmp_path, 60.0, ["here"])
    watch.after_step(Progress(1, 4, SkippedSteps(0)))
    watch.close()
    assert not (tmp_path / "stacks").exists() and threading.active_count() < 50


def test_a_jump_of_the_loss_is_kept_with_the_text_of_its_step(one_rank, settings, monkeypatch, tmp_path):
    config = settings("pretrain", steps=24)
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
    assert "loss 99 is" in (run / "log.txt").read_text()


@pytest.mark.parametrize(("values", "alarms"), [([1.0] * 40, 0), ([1.0] * 19 + [9.0], 0), ([1.0] * 20 + [9.0], 1)])
def test_an_alarm_needs_steps_to_compare_with(one_rank, tmp_path, values, alarms):
    said: list[str] = []
    watch = Alarms(tmp_path, SimpleNamespace(say=said.append), lambda first, last: [], 4)  # type: ignore[arg-type]
    for step, value in enumerate(values, 1):
        watch.after_step(Progress(step, 4 * step, SkippedSteps(0), {"loss": value}))
    assert len(said) == alarms
    kept = tmp_path / "alarms.jsonl"
    assert [json.loads(line)["step"] for line in kept.read_text().splitlines()] == [21] if alarms else not kept.exists()
