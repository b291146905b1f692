"""The training loop: check, set up, resume, step, save, stop well.

Read `train` from top to bottom: it is the whole flow of a run, on one CPU process or on many GPUs. Callbacks (callbacks.py,
reporting.py, profiler.py) do what happens around its steps.
"""

import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.config import RunFailure
from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.config.paths import plain_path
from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.data.training_windows import training_windows, windows_identity
from megatron_hylo.eval.perplexity import Quality
from megatron_hylo.io import main_first, on_main, output_lock, read_json
from megatron_hylo.io.provenance import made_by
from megatron_hylo.models.fp8 import check_fp8
from megatron_hylo.platform.distributed import is_timeout, session
from megatron_hylo.teachers.remote import RemoteTeacher
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.train.alarms import Alarms, window_texts
from megatron_hylo.train.callback import Callback, Progress, Stopped
from megatron_hylo.train.callbacks import Checkpoints, Evaluation, Export
from megatron_hylo.train.checkpoint import (
    CheckpointSaver,
    latest_checkpoint,
    load_checkpoint,
    load_states,
    set_unfinished_aside,
)
from megatron_hylo.train.cuda_graph import Captured, CapturedObjective, capturing
from megatron_hylo.train.data_loader import TimedBatches
from megatron_hylo.train.determinism import determinism
from megatron_hylo.train.gradient_norms import gradient_norms
from megatron_hylo.train.hang_watch import HangWatch, hosts
from megatron_hylo.train.heldout import Heldout, open_heldout
from megatron_hylo.train.hf_exports import HuggingFaceExports
from megatron_hylo.train.kept_state import check_kept_state
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.objectives import Batches, Objective
from megatron_hylo.train.optimizer import TrainingState
from megatron_hylo.train.pass_timer import PassTimer
from megatron_hylo.train.positions import PositionLosses
from megatron_hylo.train.profiler import Profiler
from megatron_hylo.train.reporting import Reporter, check_wandb
from megatron_hylo.train.resume_check import Resume, check_resume
from megatron_hylo.train.run_folder import check_run_folder, keep_tokenizer, tokenizer_place
from megatron_hylo.train.run_record import record_start
from megatron_hylo.train.setup import Run, architectures, build_run, open_teacher_signal, params_dtype
from megatron_hylo.train.startup_check import check_run_kernels
from megatron_hylo.train.stopping import StopRequest, stop_request
from megatron_hylo.train.stragglers import Stragglers
from megatron_hylo.train.suite_evaluation import prepare_suites, suite_callbacks
from megatron_hylo.train.teacher_check import check_signal_window, check_teacher_window
from megatron_hylo.train.token_check import check_run_tokens, check_teacher_tokens, remote_description

__all__ = ["Stopped", "train", "training_step"]
logger = logging.getLogger("megatron_hylo.train")


def train(config: TrainConfig) -> Quality | None:
    """Run one stage to its end, from where an earlier start of the same run left off.

    Args:
        config: settings of the run. RUN/model is the result (with `second_model` RUN/second_model too); a run that has it
            already is not repeated.

    Returns:
        Held-out quality of RUN/model at the end.

    Raises:
        ConfigError: anything that cannot work, before training starts.
        Stopped: a signal came; a checkpoint was saved.
    """
    folder = Path(config.output)
    suites = prepare_suites(config)
    with (
        stop_request(folder) as stop,
        determinism(config.deterministic),
        session(config.parallel, config.seed) as device,
        capturing(config.cuda_graphs, device),
        output_lock(folder),
    ):
        config.check_graphs(torch.distributed.get_world_size())
        check_run_folder(config, folder)
        check_wandb(config)
        if "fp8" in (config.linear_precision, config.teacher_precision):
            check_fp8(config.backend)  # before the run folder keeps the setting
        resume = check_resume(config, folder)
        newest = latest_checkpoint(folder)
        if not resume.goes_on(config, newest):
            if not resume.changes:
                resume.record(config.train_steps)
            logger.info("%s is already trained; give --extend_tokens N to train on, or remove it to train again", folder)
            return _read_quality(folder)
        config.micro_batches(parallel_state.get_data_parallel_world_size())  # refused before anything is read
        if newest is None:
            check_kept_state(config)
        models = architectures(config)
        with main_first():  # compiles and tunes kernels into the cache, instead of all ranks at once
            check_run_kernels(models, params_dtype(config), device, config.parallel.context_parallel_size > 1)
        check_run_tokens(config, models[0].vocab_size)
        check_teacher_window(config)
        windows = training_windows(config)
        resume.check_windows(on_main(lambda: windows_identity(windows)))
        heldout = open_heldout(config)
        run = build_run(config, device, dataset=windows, teacher_signal=_checked_teacher_signal(config, resume))
        keep_tokenizer(config, folder)
        progress = Progress(0, 0, SkippedSteps(config.max_skipped_steps))
        set_unfinished_aside(folder)
        if newest is not None:
            progress.step, progress.consumed = load_checkpoint(run.states, newest)
        elif config.keep_optimizer_state and config.model:
            load_states(run.states, Path(config.model))
        resume.record(progress.step)
        record_start(config, folder, device, progress.step)
        provenances = _provenances(config)
        with contextlib.ExitStack() as closing:
            batches = run.batches(progress.consumed)
            closing.callback(batches.close)
            callbacks, evaluation = _callbacks(run, batches, folder, heldout, suites, progress, provenances, stop, closing)
            _train(run, batches, progress, callbacks)
        return evaluation.quality


def _provenances(config: TrainConfig) -> list[dict[str, Any]]:
    """Describe what each student is made of, for its hylo.json; the main rank alone hashes the inputs."""
    sources = [config.model or config.scratch] + ([config.second_model] if config.second_model else [])
    teacher = config.teacher or config.teacher_store or config.teacher_address
    about: dict[str, Any] = dict(
        stage=config.stage, train_steps=config.train_steps, seed=config.seed, sequence_length=config.sequence_length,
        tokens=config.train_steps * config.global_batch_size * config.sequence_length, recipe=config.changed_settings(),
    )  # fmt: skip
    teacher = teacher and plain_path(teacher)
    inputs = [{"model": model and plain_path(model), "teacher": teacher, "data": config.data} for model in sources]
    return on_main(lambda: [made_by("train", named, **about) for named in inputs])


def _checked_teacher_signal(config: TrainConfig, resume: Resume) -> TeacherSignal | None:
    """Open a stored or remote teacher and compare it with the text, and with the one the run learnt from so far."""
    teacher_signal = open_teacher_signal(config)
    if teacher_signal is not None:
        about = remote_description(teacher_signal) if isinstance(teacher_signal, RemoteTeacher) else None
        check_teacher_tokens(config, teacher_signal.config.hylo.vocab_size, about)
        check_signal_window(config, teacher_signal, about)
        resume.check_remote((about or {}).get("identity"))
    return teacher_signal


def _callbacks(
    run: Run,
    batches: TimedBatches,
    folder: Path,
    heldout: Heldout,
    suites: SuiteSettings | None,
    progress: Progress,
    provenances: list[dict[str, Any]],
    stop: StopRequest,
    closing: contextlib.ExitStack,
) -> tuple[list[Callback], Evaluation]:
    """Make the callbacks of a run in the order in which they act, each closed by `closing`; the evaluation also by itself."""
    config, step = run.config, progress.step
    tokenizer = tokenizer_place(config.model or config.teacher or config.data, folder)
    reporter = Reporter(config, folder, run.device, run.flops_per_token, step, batches)
    closing.push(lambda kind, error, trace: reporter.close(stop.reason(error)))
    reporter.say(f"{config.stage}: {run.describe()}" + (f"; resumed at step {step}" if step else ""))
    reporter.say(f"loss: {config.loss_in_words}")
    assert run.dataset is not None
    reporter.say(f"{config.data}: {run.dataset.describe(config.train_steps * config.global_batch_size)}")
    if run.device.type == "cuda":
        reporter.predict(run.predict_memory())
    saver = CheckpointSaver(folder, provenances, tokenizer, config.checkpoint.keep, config.checkpoint.async_save)
    checkpoints = Checkpoints(run, saver, step, stop)
    names = hosts()
    hang_watch = HangWatch(folder, 30 * config.parallel.distributed_timeout_minutes, names)
    closing.callback(hang_watch.close)
    stop.beat = hang_watch.beat
    run.objective.timer = PassTimer(run.device) if len(names) > 1 else None
    stragglers = Stragglers(run.objective.timer, reporter, names) if run.objective.timer else None
    texts = partial(window_texts, run.dataset, config.data)
    alarms = Alarms(folder, reporter, texts, config.global_batch_size, saver.set_apart)
    evaluation = Evaluation(run, heldout, reporter, folder, checkpoints)
    profiler = Profiler(config.profile, folder)
    closing.callback(profiler.close)
    export = Export(run, folder, provenances, tokenizer if tokenizer.is_dir() else None)
    measured = suite_callbacks(run, suites, reporter, folder, provenances)
    before = [profiler, stragglers] if stragglers else [profiler]  # whose metrics the reporter records
    exports = [HuggingFaceExports(run, folder, reporter, checkpoints)] if config.checkpoint.export_every else []
    return [*before, reporter, hang_watch, alarms, checkpoints, evaluation, *measured, *exports, export], evaluation


def _train(run: Run, batches: Batches, progress: Progress, callbacks: Sequence[Callback]) -> None:
    """Take all remaining steps of a run.

    Raises:
        Stopped: a signal came; a checkpoint was saved.
        ConfigError: too many steps without an update, or a full disk.
        RunFailure: a rank did not answer.
    """
    config = run.config
    captured = CapturedObjective(run.objective) if config.cuda_graphs else run.objective
    for state in (state for state in run.states if state.capturable):
        state.take_step = Captured(state.take_step, "update")
    try:
        while progress.step < config.train_steps:
            for callback in callbacks:
                callback.before_step(progress)
            # after a skipped step the layers are watched by hooks, which a captured step does not run
            objective = run.objective if progress.skipped.in_a_row else captured
            logged = config.is_logged(progress.step + 1)
            if logged and config.stage != "align" and not config.cuda_graphs:  # a captured step takes no other turn
                run.objective.positions = PositionLosses(config, run.micro_batches, run.device)
            progress.metrics = training_step(
                run.states, objective, batches, run.micro_batches, progress.step, progress.skipped, norms_by_kind=logged
            )
            if (measured := run.objective.positions) is not None:
                run.objective.positions, progress.metrics = None, progress.metrics | measured.means()
            progress.step, progress.consumed = progress.step + 1, progress.consumed + config.global_batch_size
            for callback in callbacks:
                callback.after_step(progress)
        for callback in callbacks:
            callback.at_end(progress)
    except RuntimeError as error:
        if not is_timeout(error):
            raise
        raise RunFailure(
            f"rank {torch.distributed.get_rank()}, step {progress.step + 1}: another rank did not answer for "
            f"{config.parallel.distributed_timeout_minutes:g} minutes (parallel.distributed_timeout_minutes); see what it "
            f"printed last, and run the same command to go on from the newest checkpoint"
        ) from error


def training_step(
    states: Sequence[TrainingState],
    objective: Objective | CapturedObjective,
    batches: Batches,
    micro_batches: int,
    step: int,
    skipped: SkippedSteps,
    norms_by_kind: bool = False,
) -> dict[str, float]:
    """Take one step: gradients of `micro_batches` batches of this rank, and an update unless there is NaN or infinity.

    Args:
        states: the students' models, optimizers and schedules.
        objective: makes losses and gradients.
        batches: micro-batches of this rank.
        micro_batches: how many of them the step has.
        step: steps before this one.
        skipped: counts the steps without an update.
        norms_by_kind: also return the gradient norm of each kind of layer.

    Returns:
        Means over all ranks of losses, gradient norms, learning rates.
    """
    for state in states:
        for wrapper in state.wrapped:
            wrapper.zero_grad_buffer()
        state.optimizer.zero_grad()
    metrics = objective.forward_backward(states, batches, micro_batches)
    found: dict[str, Any]
    if skipped.must_skip(states, metrics, step + 1):
        found = {"skipped_steps": skipped.total}
    else:
        kinds: dict[str, Any] = {}
        for prefix, state in zip(PREFIXES, states if norms_by_kind else ()):
            kinds |= {f"{prefix}gradient_norm/{kind}": norm for kind, norm in gradient_norms(state).items()}
        # each student has a gradient norm and clipping of its own, so two that share a run end as they would alone
        norms = {f"{prefix}gradient_norm": state.update() for prefix, state in zip(PREFIXES, states)}
        found = _mean_over_ranks(metrics) | norms | kinds
    rates = {f"learning_rate_{name}": rate for name, rate in states[0].learning_rates().items()}
    for state in states:
        state.scheduler.step(1)  # while the GPU updates, which reading a number waits for
    return {name: float(value) for name, value in found.items()} | rates


def _mean_over_ranks(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over the data- and context-parallel ranks of the last pipeline stage, known to all ranks."""
    names = metrics if parallel_state.is_pipeline_last_stage() else {}
    if names:
        stacked = torch.stack([metrics[n].float() for n in names])
        torch.distributed.all_reduce(stacked, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        stacked /= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        metrics = dict(zip(names, stacked))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        shared = [{n: float(v) for n, v in metrics.items()}]
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast_object_list(shared, src=source, group=parallel_state.get_pipeline_model_parallel_group())
        metrics = {n: torch.tensor(v) for n, v in shared[0].items()}
    return metrics


def _read_quality(folder: Path) -> Quality | None:
    file = folder / "quality.json"
    return Quality.from_dict(read_json(file)) if file.is_file() else None
