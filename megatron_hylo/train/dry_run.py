"""Dry run of a training run: everything that can be known before hours are spent, without a GPU and without starting ranks.

Memory and hours are estimates; what is checked is what the run itself checks when it starts, and the room on the disk.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import parameter_count, pipeline_layers
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.data.training_windows import training_windows, windows_identity
from megatron_hylo.eval.runs import read_run
from megatron_hylo.io import DamagedError
from megatron_hylo.models.transformer_config import check_tensor_parallel
from megatron_hylo.plan.flops import PEAK_FLOPS, forward_flops_per_token, teacher_flops_per_token
from megatron_hylo.plan.memory import GIB, MASTER, estimate_memory, moments
from megatron_hylo.plan.parameters import trained_parameters
from megatron_hylo.train.checkpoint import checkpoint_step, latest_checkpoint
from megatron_hylo.train.heldout import open_heldout
from megatron_hylo.train.kept_state import check_kept_state
from megatron_hylo.train.muon import check_muon
from megatron_hylo.train.reporting import check_wandb
from megatron_hylo.train.resume_check import check_resume
from megatron_hylo.train.run_folder import check_run_folder
from megatron_hylo.train.setup import architectures, check_experts
from megatron_hylo.train.teacher_check import check_teacher_window
from megatron_hylo.train.token_check import check_run_tokens

GPU, UTILISATION = "H100", 0.4  # of the hours: part of the peak that larger runs reach (benchmarks/results)


@dataclass
class DryRun:
    """Plan of a run, and what would end it.

    Args:
        settings: those that are not defaults, flat.
        plan: figures by name, with their unit in the name.
        checks: (what, what was found, whether it is well).
    """

    settings: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)
    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that would end the run."""
        return all(well for _, _, well in self.checks)


def dry_run(config: TrainConfig, ranks: int = 1) -> DryRun:
    """Check and plan a run; nothing is written.

    Args:
        config: settings of the run.
        ranks: processes that it will have, over all nodes.
    """
    defaults = flatten(asdict(TrainConfig(stage="pretrain", data="-", output="-", scratch="-")))
    given = flatten(asdict(config))
    found = DryRun({name: value for name, value in given.items() if defaults.get(name) != value})

    def check(what: str, function: Callable[[], str | None]) -> bool:
        """Note what a check says; False where it failed."""
        try:
            found.checks.append((what, function() or "", True))
        except (ConfigError, DamagedError, OSError) as error:
            found.checks.append((what, str(error), False))
        return found.checks[-1][2]

    folder = Path(config.output)
    models: list[ModelConfig] = []
    check("models", lambda: _read_models(config, models))
    check("ranks", lambda: _check_ranks(config, ranks, models))
    text = check("text", lambda: _check_text(config))
    if models and text:
        check("vocabulary", lambda: check_run_tokens(config, models[0].vocab_size))
    check("teacher", lambda: _check_teacher(config))
    check("run folder", lambda: _check_folder(config, folder))
    check("logging", lambda: check_wandb(config))
    if not models:
        return found
    found.plan = plan(config, ranks, models)
    check("disk", lambda: _check_disk(folder, found.plan["disk_gib"]))
    return found


def plan(config: TrainConfig, ranks: int, models: list[ModelConfig]) -> dict[str, Any]:
    """Amount of work, memory of a rank, size of checkpoints and hours of a run.

    Args:
        config: settings of the run.
        ranks: processes of the run.
        models: its students, then its teacher, where it is on the same ranks.
    """
    students, teachers = _students_and_teachers(config, models)
    memory = estimate_memory(config, ranks, students, teachers)
    number = 2 if config.precision == "bf16" else 4
    trained = sum(trained_parameters(config, c) for c in students)
    weights = number * sum(parameter_count(c) for c in students)
    checkpoint = weights + MASTER * trained + sum(moments(config, c) for c in students)
    made: dict[str, Any] = {
        "steps": config.train_steps,
        "tokens": config.train_steps * config.global_batch_size * config.sequence_length,
        "ranks": ranks,
        "parameters": sum(parameter_count(c) for c in students),
        "memory_gib": round(memory.total / GIB, 1),
        "memory": str(memory),
        "checkpoint_gib": round(checkpoint / GIB, 2),
        # a new one is whole before the oldest goes; beside them one from before an alarm, and the model of the end
        "disk_gib": round(((config.checkpoint.keep + 2) * checkpoint + weights) / GIB, 2),
    }
    rate, source = _tokens_per_second(config, ranks, students, teachers)
    left = made["tokens"] - checkpoint_step(latest_checkpoint(Path(config.output))) * (
        config.global_batch_size * config.sequence_length
    )
    return made | {"tokens_per_second": round(rate), "hours": round(left / rate / 3600, 2), "hours_from": source}


def _students_and_teachers(config: TrainConfig, models: list[ModelConfig]) -> tuple[list[ModelConfig], list[ModelConfig]]:
    count = 2 if config.second_model else 1
    elsewhere = config.teacher_store or config.teacher_address  # then `teacher` only evaluates, on the same ranks
    return models[:count], models[count:] if config.teacher or elsewhere else []


def _tokens_per_second(
    config: TrainConfig, ranks: int, students: list[ModelConfig], teachers: list[ModelConfig]
) -> tuple[float, str]:
    """Speed of a run and where it is from: its own last record, else the operations of a token on data-sheet GPUs."""
    folder = Path(config.output)
    if (folder / "config.json").is_file():
        rate = read_run(folder, folder.name).last("tokens_per_second")
        if rate:
            return rate, "the run's last record"
    head = config.stage != "align"
    flops = sum(3 * forward_flops_per_token(c, config.sequence_length, head) for c in students)
    length, window = config.sequence_length, config.teacher_window.window
    flops += sum(teacher_flops_per_token(c, length, window(c, length), head) for c in teachers)
    return ranks * PEAK_FLOPS[GPU] * UTILISATION / flops, f"estimate: {100 * UTILISATION:.0f}% of {ranks} x {GPU}"


def _read_models(config: TrainConfig, models: list[ModelConfig]) -> str:
    models += architectures(config)
    check_kept_state(config)
    return ", ".join(f"{c.mixers} ({parameter_count(c) / 1e6:,.0f} M)" for c in models)


def _check_ranks(config: TrainConfig, ranks: int, models: list[ModelConfig]) -> str:
    """Divide ranks, batch, layers and heads as the run will."""
    p = config.parallel
    if ranks % p.model_parallel_size:
        raise ConfigError(
            f"{ranks} ranks do not divide into groups of tensor {p.tensor_model_parallel_size} x pipeline "
            f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} = {p.model_parallel_size}; start a multiple "
            f"of {p.model_parallel_size} ranks"
        )
    config.check_graphs(ranks)
    data_parallel = ranks // p.model_parallel_size
    count = config.micro_batches(data_parallel)
    p.check_experts(ranks)
    for shape in models:
        check_tensor_parallel(shape, p.tensor_model_parallel_size)
        check_experts(config, shape)
    check_muon(config, models)
    if models:
        pipeline_layers(models[0], p.pipeline_stages, p.pipeline_layers)
    return f"{data_parallel} data-parallel x {p.model_parallel_size}, {count} micro-batches a step"


def _check_text(config: TrainConfig) -> str:
    windows = training_windows(config)
    open_heldout(config)
    return windows.describe(config.train_steps * config.global_batch_size)


def _check_teacher(config: TrainConfig) -> str:
    check_teacher_window(config)
    if config.teacher_store is not None:
        from megatron_hylo.teachers.store import TeacherStore

        TeacherStore(config.teacher_store, config.data, config.teacher)
        return f"store {config.teacher_store}"
    return f"at {config.teacher_address}, not asked" if config.teacher_address else (config.teacher or "none")


def _check_folder(config: TrainConfig, folder: Path) -> str:
    check_run_folder(config, folder)
    place = _existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{place} cannot be written, and {folder} is to be made there; choose another output")
    newest = latest_checkpoint(folder)
    resume = check_resume(config, folder)
    if not resume.goes_on(config, newest):
        return f"{folder} is already trained: nothing would be done"
    if resume.windows:
        resume.check_windows(windows_identity(training_windows(config)))
    return f"{folder}, {f'goes on from {newest.name}' if newest else 'from the beginning'}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _check_disk(folder: Path, needed_gib: float) -> str:
    """Compare the room for the run's checkpoints with what is free, counting those that are there already."""
    free = shutil.disk_usage(_existing(folder)).free / GIB
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file()) / GIB
    if free + there < needed_gib:
        raise ConfigError(
            f"{_existing(folder)} has {free:.1f} GiB free, checkpoints and model need {needed_gib:.1f}; make room, set "
            f"checkpoint.keep lower, or choose another output"
        )
    return f"{needed_gib:.1f} GiB for checkpoints and model, {free:.0f} free"
