"""A stop signal in start-up, in an evaluation or while saving leaves the losses of an undisturbed run; the save switch."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from megatron_hylo.cli.boundary import EXIT_INTERRUPTED, EXIT_STOPPED, plain_errors
from megatron_hylo.cli.main import main
from megatron_hylo.cli.train import train as cli_train
from megatron_hylo.eval import perplexity
from megatron_hylo.eval.runs import read_lines, read_run, run_state
from megatron_hylo.kernels import elementwise
from megatron_hylo.train import loop
from megatron_hylo.train.checkpoint import CheckpointSaver, latest_checkpoint
from megatron_hylo.train.loop import Stopped, train
from megatron_hylo.train.reporting import Reporter

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
    assert cli_train(config_of(settings, tmp_path / "run")) == EXIT_STOPPED and not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.fixture(scope="module")
def known() -> dict:
    """Losses and evaluations of the undisturbed run, once they are known."""
    return {}


@pytest.fixture
def undisturbed(known, settings, tmp_path) -> dict:
    if not known:
        train(config_of(settings, tmp_path / "undisturbed"))
        known |= {name: records(tmp_path / "undisturbed", name) for name in ("loss", "heldout_perplexity")}
        assert [s for s, _ in known["heldout_perplexity"]] == [2, 4, 6]
    return known


def signalled(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


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
    saving = dict(save_interval=3, async_save=False) if where is CheckpointSaver else dict(save_interval=100)
    run = tmp_path / "run"
    config = config_of(settings, run, checkpoint=saving)
    with monkeypatch.context() as patch:
        at_call(patch, where, function, call, lambda: signalled(signal.SIGUSR1))
        with pytest.raises(Stopped) as stopped:
            train(config)
    newest = latest_checkpoint(run)
    assert (newest and newest.name) == (step and f"step_{step:08d}")
    assert ("before the first step" in str(stopped.value)) == (step is None)
    train(config)
    assert {name: records(run, name) for name in undisturbed} == undisturbed


def ended(config, run: Path) -> tuple[int, str, str]:
    """Exit status of `hylo train`, state of the run in `hylo runs`, and its words."""
    with pytest.raises(SystemExit) as left, plain_errors("train", run):
        sys.exit(cli_train(config))
    return left.value.code, *run_state(read_run(run, "run"))


@pytest.mark.parametrize("phase", ["tracing", "lowering"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_stopped_while_torch_compiles_keeps_its_kind_and_goes_on(
    settings, tmp_path, monkeypatch, undisturbed, phase, number
):
    """torch.compile wraps any Exception that is raised while it traces; its backends pass over some and go on."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    def backend(graph, inputs):
        try:
            compiling.append(phase)
            signalled(number) if phase == "lowering" else None
        except Exception:  # as inductor does where it finds out what the compiler can do
            pass
        return graph.forward

    compiling, run = [], tmp_path / "run"
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "library_unsupported", lambda *_: None)
        patch.setattr(elementwise, "_compiled", lambda function, dynamic: torch.compile(function, backend=backend))
        if phase == "tracing":
            at_call(patch, InstructionTranslatorBase, "step", 5, lambda: signalled(number))
        code, state, words = ended(config_of(settings, run), run)
    assert compiling == (["lowering"] if phase == "lowering" else [])
    said = "interrupted by Ctrl-C; " if number == signal.SIGINT else "stopped before the first step; "
    assert (code, state) == (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED, "stopped")
    assert words.startswith(said) and words in (run / "log.txt").read_text() and "TORCHDYNAMO" not in words
    train(config_of(settings, run))
    assert {name: records(run, name) for name in undisturbed} == undisturbed


def test_a_run_that_fails_because_another_rank_has_stopped_is_recorded_as_stopped(settings, tmp_path, monkeypatch):
    def lost(*_, **__):
        try:
            signalled()
        except Stopped:
            raise RuntimeError("Connection closed by peer") from None

    monkeypatch.setattr(loop, "training_step", lost)
    code, state, words = ended(config_of(settings, tmp_path / "run"), tmp_path / "run")
    assert (code, state) == (EXIT_STOPPED, "stopped") and words.startswith("stopped before the first step; ")


def test_a_second_signal_does_not_break_into_the_end_of_a_run(settings, tmp_path, monkeypatch):
    at_call(monkeypatch, loop, "training_step", 1, signalled)
    at_call(monkeypatch, Reporter, "close", 1, lambda: signalled(signal.SIGUSR1))
    code, state, words = ended(config_of(settings, tmp_path / "run"), tmp_path / "run")
    assert (code, state) == (EXIT_STOPPED, "stopped") and words.startswith("stopped before the first step; ")


def test_quickstart_that_is_stopped_ends_like_training(settings, tmp_path, monkeypatch, capsys):
    config = config_of(settings, tmp_path / "run" / "distil")
    monkeypatch.setattr("megatron_hylo.cli.quickstart.run_quickstart", lambda *_, **__: train(config))
    at_call(monkeypatch, loop, "training_step", 2, signalled)
    with pytest.raises(SystemExit) as left:
        main(["quickstart", "--output", str(tmp_path / "run")])
    said = " ".join(capsys.readouterr().err.split())
    assert left.value.code == EXIT_STOPPED and "stopped at step 2 of 6 and saved; run the same command to resume" in said
    assert "Traceback" not in said


def test_the_save_switch_saves_once_and_training_goes_on(settings, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    original = CheckpointSaver.start
    monkeypatch.setattr(
        CheckpointSaver, "start", lambda self, states, step, used: seen.append(step) or original(self, states, step, used)
    )
    at_call(monkeypatch, loop, "training_step", 2, (run / "save_now").touch)
    train(config_of(settings, run, eval_interval=0))
    assert seen == [2, STEPS] and not (run / "save_now").exists() and (run / "model" / "manifest.json").is_file()
