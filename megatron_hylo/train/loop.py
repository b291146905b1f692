"""The training loop: set up, resume, step, report, save, stop well.

Read `train` from top to bottom: it is the whole flow of a run, on one CPU process or on many GPUs.
"""

import logging
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig
from megatron_hylo.config.layouts import BASES, LAYOUTS, parameter_count, pipeline_layers
from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.data.packed import PackedDataset, heldout_windows
from megatron_hylo.eval.perplexity import Quality, evaluate
from megatron_hylo.io import output_lock, read_json, write_json
from megatron_hylo.io.provenance import made_by
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.checkpoint import load_chunks, read_description, save_model
from megatron_hylo.models.fp8 import check_fp8
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import HyloModel, build_chunks
from megatron_hylo.plan.flops import forward_flops_per_token
from megatron_hylo.plan.memory import predict_memory
from megatron_hylo.platform.distributed import is_main, is_timeout, session
from megatron_hylo.teachers.remote import RemoteTeacher
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.teachers.store import StoredTeacher, TeacherStore
from megatron_hylo.train.checkpoint import (
    CheckpointSaver,
    latest_checkpoint,
    load_checkpoint,
    set_unfinished_aside,
)
from megatron_hylo.train.cuda_graph import Captured, CapturedStage, capturing
from megatron_hylo.train.data_loader import rank_batches
from megatron_hylo.train.determinism import determinism
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.optimizer import TrainingState, build_training_state, choose_trainable
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.resume_check import check_resume
from megatron_hylo.train.run_folder import check_run_folder
from megatron_hylo.train.stages import Stage, get_stage
from megatron_hylo.train.startup_check import check_run_kernels
from megatron_hylo.train.token_check import check_run_tokens, check_teacher_tokens, remote_description

logger = logging.getLogger("megatron_hylo.train")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Training was asked to stop before its end and has saved; the message says how to resume."""


def train(config: TrainConfig) -> Quality | None:
    """Run one stage to its end, from where an earlier start of the same run left off.

    Args:
        config: the run. RUN/model is the result (with `second_model` RUN/second_model too); a run that has it already
            is not repeated.

    Returns:
        Held-out quality of RUN/model at the end.

    Raises:
        ConfigError: anything that cannot work, before training starts.
        Stopped: a signal came; a checkpoint was saved.
    """
    run = Path(config.output)
    with (
        determinism(config.deterministic),
        session(config.parallel, config.seed) as device,
        capturing(config.cuda_graphs, device),
        output_lock(run),
    ):
        check_run_folder(config, run)
        if "fp8" in (config.linear_precision, config.teacher_precision):
            check_fp8(config.backend)  # before the run folder keeps the setting
        resume = check_resume(config, run)
        newest = latest_checkpoint(run)
        if not resume.goes_on(config, newest):
            if not resume.changes:
                resume.record(config.train_steps)
            logger.info("%s is already trained; remove it to train again, or raise train_tokens to train on", run)
            return _read_quality(run)
        micro_batches = config.micro_batches(parallel_state.get_data_parallel_world_size())
        check_run_kernels(_architectures(config), _dtype(config), device, config.parallel.context_parallel_size > 1)
        check_run_tokens(config, _architectures(config)[0].vocab_size)
        dataset = PackedDataset(f"{config.data}/train", config.sequence_length, config.seed)
        windows = _heldout(config)
        teacher_signal = open_teacher_signal(config)
        if teacher_signal is not None:
            about = remote_description(teacher_signal) if isinstance(teacher_signal, RemoteTeacher) else None
            check_teacher_tokens(config, teacher_signal.config.hylo.vocab_size, about)
            resume.check_remote((about or {}).get("identity"))
        students, teacher = _build_models(config)
        stage = get_stage(config, teacher, teacher_signal)
        for student in students:
            stage.check(student[0])
            choose_trainable(student, config)
        states = [build_training_state(student, config) for student in students]
        sources = (config.model or config.scratch, config.second_model)
        provenances = [
            made_by("train", {"model": m, "teacher": config.teacher or config.teacher_store or config.teacher_address,
                              "data": config.data}, stage=config.stage, train_steps=config.train_steps, seed=config.seed)
            for m in sources[: len(states)]
        ]  # fmt: skip
        tokenizer = Path(config.model or config.teacher or config.data) / "tokenizer"
        step = consumed = 0
        set_unfinished_aside(run)
        if newest is not None:
            step, consumed = load_checkpoint(states, newest)
        saved = step
        resume.record(step)
        reporter = Reporter(config, run, device, _flops_per_token(config, students, teacher), step)
        reporter.say(f"{config.stage}: {_describe(config, students)}" + (f"; resumed at step {step}" if step else ""))
        reporter.say(f"{config.data}: {dataset.describe(config.train_steps * config.global_batch_size)}")
        if device.type == "cuda":
            reporter.predict(predict_memory(config, students, teacher, teacher_signal, _optimizer_shards(config)))
        saver = CheckpointSaver(run, provenances, tokenizer, config.keep_checkpoints)
        stop = StopRequest()
        passes = CapturedStage(stage) if config.cuda_graphs else stage
        for state in (state for state in states if state.capturable):
            state.take_step = Captured(state.take_step, "update")
        reads = teacher_signal if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
        feed = rank_batches(config, dataset, consumed, device, reads)
        try:
            skipped = SkippedSteps(config.max_skipped_steps)
            while step < config.train_steps:
                # after a skipped step the layers are watched, which a recorded one does not know of
                metrics = training_step(states, stage if skipped.in_a_row else passes, feed, micro_batches, step, skipped)
                step, consumed = step + 1, consumed + config.global_batch_size
                if step == 1 or reporter.last[1] == 0:
                    logger.info("operations: %s", in_use())
                reporter.step(step, metrics)
                if skipped.in_a_row:
                    reporter.say(f"step {step} skipped: NaN or infinity in loss or gradients ({skipped.total} such steps)")
                stopping = stop.agreed(device)
                if step < config.train_steps and (stopping or (step % config.save_interval == 0 and not skipped.in_a_row)):
                    saver.start(states, step, consumed)
                if stopping or not config.async_save:
                    saver.finish()
                saver.finish_if_written(device)
                if stopping and step < config.train_steps:
                    raise Stopped(f"stopped at step {step} of {config.train_steps} and saved; run the same command to resume")
                if config.eval_interval and step % config.eval_interval == 0 and step < config.train_steps:
                    _evaluate(config, states, teacher, windows, reporter, step)
            saver.finish()
            if saved < step and not skipped.in_a_row:  # for whoever trains on, and if what follows fails
                saver.start(states, step, consumed)
                saver.finish()
            quality = _evaluate(config, states, teacher, windows, reporter, step)
            files = tokenizer if tokenizer.is_dir() else None
            # RUN/model last: where it is, the run is finished
            for student, prefix, provenance in reversed(list(zip(students, PREFIXES, provenances))):
                save_model(student, run / f"{prefix}model", files, provenance, overwrite=True)
        except RuntimeError as error:
            if not is_timeout(error):
                raise
            raise ConfigError(
                f"rank {torch.distributed.get_rank()}, step {step + 1}: another rank did not answer for "
                f"{config.parallel.distributed_timeout_minutes:g} minutes (parallel.distributed_timeout_minutes); see what it "
                f"printed last, and run the same command to go on from the newest checkpoint"
            ) from error
        finally:
            feed.close()
            stop.restore()
            reporter.close()
        return quality


class StopRequest:
    """Remembers a stop signal; ranks agree on it, so that all stop after the same step."""

    def __init__(self) -> None:
        self.seen: int | None = None
        self.previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        self.seen = number

    def agreed(self, device: torch.device) -> bool:
        """True on all ranks once any of them was signalled."""
        flag = torch.tensor([int(self.seen is not None)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def training_step(
    states: Sequence[TrainingState],
    stage: Stage | CapturedStage,
    feed: Any,
    micro_batches: int,
    step: int,
    skipped: SkippedSteps,
) -> dict[str, float]:
    """One step: gradients of `micro_batches` batches of this rank, and the optimizer's step unless there is NaN or infinity.

    Args:
        states: the students.
        stage: what a step's passes are.
        feed: micro-batches of this rank.
        micro_batches: of the step.
        step: steps before this one.
        skipped: counts the steps that are left out.

    Returns:
        Means over all ranks of losses, gradient norms, learning rates.
    """
    for state in states:
        for wrapper in state.wrapped:
            wrapper.zero_grad_buffer()
        state.optimizer.zero_grad()
    metrics = stage.forward_backward(states, feed, micro_batches)
    if skipped.must_skip(states, metrics, step + 1):
        values = {"skipped_steps": float(skipped.total)}
    else:
        # a norm, and clipping, of each student's own: two that share a run end as they would alone
        norms = {f"{prefix}gradient_norm": state.update() for prefix, state in zip(PREFIXES, states)}
        values = {name: float(value) for name, value in (_mean_over_ranks(metrics) | norms).items()}
    rates = {f"learning_rate_{name}": rate for name, rate in states[0].learning_rates().items()}
    for state in states:
        state.scheduler.step(1)
    return values | rates


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


def _build_models(config: TrainConfig) -> tuple[list[list[HyloModel]], list[HyloModel] | None]:
    """(the students, the teacher), each this rank's chunks of it; the teacher's layers are where the student's are."""
    architecture, dtype = _architectures(config)[0], _dtype(config)
    layers = pipeline_layers(architecture, config.parallel.pipeline_stages, config.parallel.pipeline_layers)
    shared = dict(parallel=replace(config.parallel, pipeline_layers=layers), params_dtype=dtype, backend=config.backend)
    how = dict(recompute=config.recompute, fp8=config.student_fp8)
    changes = {"mla_rope_scaling": config.mla_rope_scaling} if config.mla_rope_scaling else {}
    # what is saved says the longest sequence it was trained with
    trained = [max(c.max_position_embeddings, config.sequence_length) for c in _architectures(config)]
    if config.model:
        folders = [folder for folder in (config.model, config.second_model) if folder]
        students = [
            _load_chunks(folder, **how, **shared, **changes, max_position_embeddings=length)
            for folder, length in zip(folders, trained)
        ]
    else:
        students = [build_chunks(architecture.replace(**changes, max_position_embeddings=trained[0]), **how, **shared)]
    teacher = None
    if config.teacher:
        chunks = _load_chunks(config.teacher, fp8=config.teacher_fp8, **shared)
        teacher = freeze(chunks, config.teacher_offload)
    return [[chunk.train() for chunk in student] for student in students], teacher


def open_teacher_signal(config: TrainConfig) -> TeacherSignal | None:
    """The teacher of a run that has it on disk, or on the ranks of another job."""
    if config.teacher_store is not None:
        return StoredTeacher(TeacherStore(config.teacher_store, config.data, config.teacher), _dtype(config))
    if config.teacher_address is not None:
        minutes = config.parallel.distributed_timeout_minutes
        return RemoteTeacher(config.teacher_address, _dtype(config), timedelta(minutes=minutes))
    return None


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _architectures(config: TrainConfig) -> list[ModelConfig]:
    """Of the student, a second one, the teacher; those there are."""
    folders = [folder for folder in (config.model, config.second_model, config.teacher) if folder]
    scratch = [] if config.model else [_scratch_config(config.scratch)]
    return scratch + [read_description(folder)[0] for folder in folders]


def _load_chunks(folder: str, parallel: ParallelConfig, **settings: Any) -> list[HyloModel]:
    """Cut as `parallel` says; by the model's own weights where it has another depth (a teacher in `distil` may)."""
    if sum(parallel.pipeline_layers) != read_description(folder)[0].num_hidden_layers:
        parallel = replace(parallel, pipeline_layers=None)
    return load_chunks(folder, parallel, **settings)


def _scratch_config(name: str) -> Any:
    if name in LAYOUTS:
        return LAYOUTS[name].config
    if name in BASES:
        return BASES[name]
    if Path(name).is_dir():
        return read_description(name)[0]
    raise ConfigError(f"scratch {name!r} is no layout ({', '.join(LAYOUTS)}), no base ({', '.join(BASES)}) and no model folder")


def _optimizer_shards(config: TrainConfig) -> int:
    """Ranks that share the optimizer's state."""
    shared = config.optimizer.use_distributed_optimizer
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True) if shared else 1


def _heldout(config: TrainConfig) -> torch.Tensor:
    """Windows inside held-out documents; across them, and said so, where none is as long as the sequence."""
    where = f"{config.data}/heldout"
    try:
        return heldout_windows(where, config.sequence_length, config.eval_windows)
    except ConfigError as error:
        logger.warning("%s; evaluating on windows that cross documents", error)
        return heldout_windows(where, config.sequence_length, config.eval_windows, allow_crossing=True)


def _evaluate(
    config: TrainConfig, states: Sequence[TrainingState], teacher: Any, windows: Any, reporter: Reporter, step: int
) -> Quality:
    """Measure every student, record and show it; returns the first one's."""
    measured = [evaluate(s.chunks, windows, teacher, config.micro_batch_size, config.loss_chunk_tokens) for s in states]
    for prefix, quality in zip(PREFIXES, measured):
        reporter.record(step, {f"{prefix}heldout_{name}": value for name, value in quality.to_dict().items()})
        which = f"{prefix}model: " if len(states) > 1 else ""
        kl = f", KL {quality.kl:.3f}" if quality.kl is not None else ""
        reporter.say(f"{which}held-out perplexity {quality.perplexity:.2f}{kl}")
        if is_main() and step == config.train_steps:
            write_json(Path(config.output) / f"{prefix}quality.json", quality.to_dict())
    return measured[0]


def _read_quality(run: Path) -> Quality | None:
    file = run / "quality.json"
    return Quality(**read_json(file)) if file.is_file() else None


def _flops_per_token(
    config: TrainConfig, students: Sequence[Sequence[HyloModel]], teacher: Sequence[HyloModel] | None
) -> float:
    head = config.stage != "align"
    shapes = [chunks[0].config.hylo for chunks in students]
    flops = sum(3 * forward_flops_per_token(c, config.sequence_length, head) for c in shapes)
    if config.stage == "align" and config.align_loss == "mse":  # runs no MLP of a student
        flops -= sum(3 * 6 * c.num_hidden_layers * c.hidden_size * c.ffn_hidden_size for c in shapes)
    online = teacher is not None and config.teacher_store is None and config.teacher_address is None
    return flops + (forward_flops_per_token(teacher[0].config.hylo, config.sequence_length, head) if online else 0.0)


def _describe(config: TrainConfig, students: Sequence[Sequence[HyloModel]]) -> str:
    ranks, configs = torch.distributed.get_world_size(), [chunks[0].config.hylo for chunks in students]
    shapes = [f"{c.mixers} ({parameter_count(c) / 1e6:,.0f} M parameters)" for c in configs]
    return (
        f"{' and '.join(shapes)}, {config.train_steps} steps of "
        f"{config.global_batch_size} x {config.sequence_length} tokens, {config.precision}, {ranks} ranks"
    )
