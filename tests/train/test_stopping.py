"""A stop signal in start-up, in an evaluation or while saving leaves the losses of an undisturbed run; the save switch."""

import os
import signal
from pathlib import Path

import pytest

from megatron_hylo.cli.runs import train as cli_train
from megatron_hylo.eval import perplexity
from megatron_hylo.eval.runs import read_lines
from megatron_hylo.train import loop
from megatron_hylo.train.checkpoint import CheckpointSaver, latest_checkpoint
from megatron_hylo.train.loop import Stopped, train

STEPS = 6


def records(run: Path, name: str) -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in read_lines(run / "metrics.jsonl") if name in r]


def config_of(settings, run: Path, **changes):
    given = dict(steps=STEPS, eval_interval=2, eval_windows=3, checkpoint=dict(save_interval=100, async_save=False))
    return settings("pretrain", output=run, **(given | changes))


def at_call(monkeypatch, where: object, function: str, number: int, act) -> None:
    """Act at the so-manieth call of a function, before it runs."""
    original, calls = getattr(where, function), []

    def watched(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*arguments, **named)

    monkeypatch.setattr(where, function, watched)


def test_a_stop_asked_for_while_the_process_starts_ends_it_before_it_writes(settings, tmp_path, monkeypatch):
    (tmp_path / "stop").touch()
    monkeypatch.setenv("HYLO_STOP_FILE", str(tmp_path / "stop"))
    with pytest.raises(Stopped, match="before the first step"):
        train(config_of(settings, tmp_path / "run"))
    assert cli_train(config_of(settings, tmp_path / "run")) == 3 and not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.fixture(scope="module")
def undisturbed() -> dict:
    """Losses and evaluations of the undisturbed run, once they are known."""
    return {}


@pytest.mark.parametrize(
    ("where", "function", "call", "step"),
    [
        (loop, "open_heldout", 1, None),  # start-up
        (loop, "training_step", 1, None),  # the first step, which tunes kernels
        (loop, "training_step", 3, 3),
        (perplexity, "model_token_losses", 1, 2),  # the first of two batches of the evaluation after step 2
        (perplexity, "model_token_losses", 5, STEPS),  # of the last evaluation: all steps are done
        (CheckpointSaver, "start", 1, 3),  # while saving at an interval
    ],
    ids=["start-up", "first step", "step", "evaluation", "last evaluation", "saving"],
)
def test_a_run_stopped_at_any_moment_ends_like_an_undisturbed_one(
    settings, tmp_path, monkeypatch, undisturbed, where, function, call, step
):
    if not undisturbed:
        train(config_of(settings, tmp_path / "undisturbed"))
        undisturbed |= {name: records(tmp_path / "undisturbed", name) for name in ("loss", "heldout_perplexity")}
        assert [s for s, _ in undisturbed["heldout_perplexity"]] == [2, 4, 6]
    saving = dict(save_interval=3, async_save=False) if where is CheckpointSaver else dict(save_interval=100)
    run = tmp_path / "run"
    config = config_of(settings, run, checkpoint=saving)
    with monkeypatch.context() as patch:
        at_call(patch, where, function, call, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stopped) as stopped:
            train(config)
    newest = latest_checkpoint(run)
    assert (newest and newest.name) == (step and f"step_{step:08d}")
    assert ("before the first step" in str(stopped.value)) == (step is None)
    train(config)
    assert {name: records(run, name) for name in undisturbed} == undisturbed


def test_the_save_switch_saves_once_and_training_goes_on(settings, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    original = CheckpointSaver.start
    monkeypatch.setattr(
        CheckpointSaver, "start", lambda self, states, step, used: seen.append(step) or original(self, states, step, used)
    )
    at_call(monkeypatch, loop, "training_step", 2, (run / "save_now").touch)
    train(config_of(settings, run, eval_interval=0))
    assert seen == [2, STEPS] and not (run / "save_now").exists() and (run / "model" / "manifest.json").is_file()
