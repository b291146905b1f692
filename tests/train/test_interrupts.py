"""Ctrl-C in every phase of a verb, and a reader that goes away: one sentence, the exit code, and what can go on does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hylo.io import verify_manifest
from megatron_hylo.train.loop import train
from tests.forked import Program
from tests.held import HELD, folder, held_program, step
from tests.train.runs import metrics, start_train

ROOT = Path(__file__).parents[2]
STOPPED, INTERRUPTED = 3, 130


def wait_for(program: Program, condition) -> None:
    """Wait until something is so of a program that runs."""
    deadline, runs = time.monotonic() + 120, True
    while not condition():
        assert runs and time.monotonic() < deadline, printed(program)
        runs = program.poll() is None  # what it did last is looked at once more
        time.sleep(0.01)


def printed(program: Program) -> str:
    """The text that a program has printed so far."""
    return program.log.read_text() if program.log.is_file() else ""


def ended(program: Program, twice: bool = False) -> tuple[int, list[str]]:
    """Interrupt a program, once more when it has answered; its exit status and the lines it printed from the first time on."""
    before = len(printed(program))
    program.send_signal(signal.SIGINT)
    if twice:
        wait_for(program, lambda: "Ctrl-C once more" in printed(program))
        time.sleep(0.3)  # it may be through with saving by then
        program.send_signal(signal.SIGINT)
    code = program.wait(120)
    said = printed(program)
    assert "Traceback" not in said, said
    return code, [line for line in said[before:].splitlines() if line.strip() and line != HELD]


@pytest.mark.parametrize("verb", ["preprocess", "convert"])
def test_a_verb_that_is_interrupted_leaves_nothing_half_written_and_goes_on(material, tmp_path, verb):
    text, tokenizer = tmp_path / "text.txt", material.data / "tokenizer"
    text.write_text("some words of a text that is long enough to take a while\n" * 200_000)
    words = {
        "preprocess": ["preprocess", text, tmp_path / "new", "--tokenizer", tokenizer, "--heldout_fraction=0"],
        "convert": ["convert", material.teacher, tmp_path / "new", "--to", "hf"],
    }[verb]
    program = held_program(folder(1), words, tmp_path / "log")
    wait_for(program, lambda: HELD in printed(program))  # not before: libraries lose a Ctrl-C while they are imported
    code, said = ended(program)
    assert code == INTERRUPTED and len(said) == 1 and said[0].startswith("interrupted: ")
    kept = {".new.shards", ".new.parts"}  # from which the same command goes on, if it came so far
    assert {path.name for path in tmp_path.iterdir()} - kept == {"log", "text.txt"}
    assert Program("megatron_hylo.cli", words, tmp_path / "log").wait(120) == 0
    assert {path.name for path in tmp_path.iterdir()} - {".new.lock"} == {"log", "text.txt", "new"}


def test_a_run_is_interrupted_in_its_start(settings):
    config = settings("pretrain")
    program = start_train(config, step(1))
    wait_for(program, lambda: "hylo train" in printed(program))
    code, said = ended(program)
    said = [line for line in said if not line.startswith("hylo train")]  # which rich writes again if that was interrupted
    assert code == INTERRUPTED and len(said) == 1
    assert said[0].startswith("interrupted: finished checkpoints in ") and "the same command goes on" in said[0]


@pytest.mark.parametrize("phase", ["evaluation", "saving, twice"])
def test_a_run_is_interrupted_and_goes_on(settings, phase):
    """Once: the step is finished and saved. Twice: at once, from the newest checkpoint, if the step is not saved by then.

    It ends as if nothing had been.
    """
    evaluates = phase == "evaluation"
    config = settings("pretrain", steps=200, checkpoint=dict(save_interval=1), eval_interval=1 if evaluates else 0)
    run = Path(config.output)
    program = start_train(config, step(100) if evaluates else folder(3))  # checkpoints, of which old ones are removed
    if evaluates:
        wait_for(program, lambda: "step 2/" in printed(program))
    else:
        wait_for(program, lambda: len(list(run.glob("checkpoints/.*"))) > 0 and (run / "checkpoints/step_00000002").is_dir())
    code, said = ended(program, twice="twice" in phase)
    words = " ".join(said)
    assert "SIGINT: stopping after this step, with a checkpoint; Ctrl-C once more ends at once" in words
    if "twice" in phase and "and saved; run the same" not in words:
        assert code == INTERRUPTED and "interrupted: finished checkpoints in " in words
    else:
        assert code == STOPPED and "and saved; run the same command to resume" in words
    for checkpoint in run.glob("checkpoints/step_*"):
        verify_manifest(checkpoint)
    steps = len(metrics(run))
    train(settings("pretrain", steps=steps + 1, checkpoint=config.checkpoint.__dict__, eval_interval=config.eval_interval,
                   allow_change="train_tokens"))  # fmt: skip
    assert list(metrics(run)) == list(range(1, steps + 2))


def test_a_reader_that_goes_away_ends_a_verb_without_a_traceback():
    command = f"{sys.executable} -m megatron_hylo.cli layouts --json | head -1; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.stdout, done.stderr) == ("[\n", "") and done.returncode in (0, 1)
