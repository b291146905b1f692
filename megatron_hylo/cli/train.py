"""`hylo train` and `hylo quickstart`: training, and all steps from a teacher to an evaluated hybrid in one go."""

import signal
from pathlib import Path
from typing import Literal

from megatron_hylo.cli.boundary import EXIT_STOPPED
from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.quickstart_folders import check_output, default_output
from megatron_hylo.cli.types import PositiveInt
from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import DamagedError, launched_ranks
from megatron_hylo.io.start_up import model_imports, stop_asked
from megatron_hylo.train.inputs import check_inputs
from megatron_hylo.train.run_folder import check_run_folder


def quickstart(
    linear: Literal["gdn", "mamba2"] = "gdn",
    init: Literal["calibrated", "paper"] = "calibrated",
    prompt: str | None = None,
    text: Path | None = None,
    output: Path | None = None,
    train_tokens: PositiveInt | None = None,
) -> int:
    """Real teacher to evaluated hybrid in one go: fetch, convert, verify, calibrate, upcycle, train, export, generate.

    Args:
        linear: what three quarters of the layers become.
        init: how the hybrid starts: calibrated on data, or paper (HyLo's own, in its own shapes) for contrast.
        prompt: text to continue at the end; a default otherwise.
        text: folder or .jsonl of own training text instead of Debian's documentation packages, or of manuals from PyPI
            where apt does not have these.
        output: run folder, runs/quickstart by default (with _mamba2, _paper for those); the same command goes on where it was.
        train_tokens: tokens of stage 2; by default about six minutes' worth of the device.
    """
    from megatron_hylo.data.inputs import read_documents
    from megatron_hylo.serve.requests import check_prompt

    if prompt:
        check_prompt(prompt)
    if text is not None:
        next(iter(read_documents(text)), None)  # refuses what holds no text
    check_output(output or default_output(linear, init), linear, init, None if text is None else str(text))
    from megatron_hylo.cli.quickstart import run_quickstart
    from megatron_hylo.train.callback import Stopped

    try:
        run_quickstart(linear, init, prompt, None if text is None else str(text), output, train_tokens, results, track=track)
    except Stopped as stopped:
        return _stopped(stopped)
    return 0


def train(config: TrainConfig, json: bool = False, dry_run: bool = False, ranks: int = 1) -> int:
    """Train: pretrain (cross-entropy), align (stage 1, layer by layer) or distil (stages 2 and 3, KL to the teacher).

    Give a recipe by --config and override any key, e.g. --optimizer.lr 1e-4; under torchrun for several ranks.
    Started again, the same command resumes from the newest checkpoint. Ctrl-C or SIGUSR1 saves and stops (exit 3).

    Args:
        config: settings of the run.
        json: print {model, perplexity, ...} at the end; of a dry run {settings, plan, checks}.
        dry_run: only check settings, paths, data, vocabulary, disk and parallel sizes, and print them with memory, steps and
            hours: no GPU is needed, no ranks are started and nothing is written. Exits 2 where the run would not start.
        ranks: processes that a dry run plans for, over all nodes.
    """
    if dry_run:
        _say_missing_inputs(config)
        from megatron_hylo.cli.dry_run import print_dry_run
        from megatron_hylo.train.dry_run import dry_run as check

        return print_dry_run(check(config, ranks), json)
    if stop_asked():
        return EXIT_STOPPED
    config.check_graphs(launched_ranks())
    _check_inputs(config)
    with model_imports():
        from megatron_hylo.platform.distributed import is_main
        from megatron_hylo.train.loop import Stopped
        from megatron_hylo.train.loop import train as run

    try:
        quality = run(config)
    except Stopped as stopped:
        return _stopped(stopped)
    if is_main():
        model = f"{config.output}/model"
        if json:
            print_json({"model": model} | (quality.to_dict() if quality else {}))
        else:
            results.print(f"model: {model}" + (f", held-out perplexity {quality.perplexity:.2f}" if quality else ""))
    return 0


def _check_inputs(config: TrainConfig) -> None:
    check_run_folder(config, Path(config.output))
    check_inputs(config)


def _say_missing_inputs(config: TrainConfig) -> None:
    """Say at once what a dry run will find wrong with paths; its other checks import PyTorch, which takes seconds."""
    try:
        _check_inputs(config)
    except (ConfigError, DamagedError, OSError) as error:
        console.print(f"{error}\nall checks follow", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _stopped(stopped: BaseException) -> int:
    """Say where training stopped, on the main rank; returns the exit code."""
    from megatron_hylo.platform.distributed import is_main

    # all is saved: another Ctrl-C would only break into what Python clears up at its end
    signal.signal(signal.SIGINT, lambda number, frame: None)
    if is_main():
        console.print(str(stopped))
    return EXIT_STOPPED
