"""Training checkpoints: a model folder that also holds optimizer, schedule and position.

RUN/checkpoints/step_00000100/ is an atomic directory (written beside its place, checked, renamed) and is written while training
goes on; the newest one is whole, and the last K are kept, with the one before the newest alarm. Any parallelism can load it.
The position is the number of consumed samples, of which the data order is a pure function; training draws no random numbers (no
dropout). A second student's hylo.json and weights/ are in second_model/ of the same folder, so that both are there or neither.
"""

import contextlib
import functools
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_hylo.config.train import PREFIXES
from megatron_hylo.io import (
    atomic_directory,
    barrier,
    has_manifest,
    read_verified_json,
    remove_atomic_directory,
    verify_manifest,
    write_json,
)
from megatron_hylo.models.checkpoint import (
    BackgroundWrite,
    describe,
    load_weights,
    put_chunks,
    sharded_chunks,
    sharding_metadata,
)
from megatron_hylo.models.description import read_description
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.optimizer import (
    TrainingState,
    allocate_optimizer_state,
    counts_on_cpu,
    load_optimizer_state,
    load_schedule,
    number_copies,
)

logger = logging.getLogger("megatron_hylo.train")
POSITION = "train_state.json"  # file of a checkpoint that a model folder does not have
LAST_GOOD = "last_good"  # link of a run to the checkpoint before its newest alarm, which stays


def checkpoint_path(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step_{step:08d}"


def latest_checkpoint(run: Path) -> Path | None:
    """The newest finished checkpoint of a run, or None."""
    return next((p for p in sorted((run / "checkpoints").glob("step_*"), reverse=True) if has_manifest(p)), None)


def checkpoint_step(path: Path | None) -> int:
    """Steps done at a checkpoint; 0 without one."""
    return int(path.name.removeprefix("step_")) if path else 0


def set_unfinished_aside(run: Path) -> None:
    """Rename checkpoints without a manifest out of the way of new ones, with a warning; training does not resume from them.

    A copy that did not end leaves one, or removed files; saving itself does not. All ranks call it.
    """
    if is_main():
        newest = latest_checkpoint(run)
        for path in sorted(p for p in (run / "checkpoints").glob("step_*") if p.is_dir() and not has_manifest(p)):
            aside = path.with_name(f"unfinished_{path.name}_{time.time_ns()}")
            path.rename(aside)
            if path.name > (newest.name if newest else ""):
                logger.warning(
                    "checkpoint %s has no manifest.json, so it is not whole (a copy that did not end?): this start goes on at "
                    "step %d, not %d; what is there of it is now %s",
                    path, checkpoint_step(newest), checkpoint_step(path), aside,
                )  # fmt: skip
            else:
                logger.warning("checkpoint %s has no manifest.json, so it is not whole; it is now %s", path, aside)
    barrier()


def _folders(states: Sequence[TrainingState], checkpoint: Path) -> list[tuple[TrainingState, Path]]:
    """Pair each student with its folder of a checkpoint: the checkpoint itself, then second_model/ in it."""
    return [(state, checkpoint / f"{prefix}model" if prefix else checkpoint) for state, prefix in zip(states, PREFIXES)]


def _sharded_state(state: TrainingState, loading: bool) -> dict[str, Any]:
    model = sharded_chunks(state.chunks)
    with contextlib.nullcontext() if loading else _without_gathering(state.optimizer):
        optimizer = state.optimizer.sharded_state_dict(
            model if len(model) > 1 else model["model"], is_loading=loading, metadata=sharding_metadata()
        )
    number_copies(optimizer)
    counts_on_cpu(optimizer)
    return model | {"optimizer": optimizer, "scheduler": state.scheduler.state_dict()}


@contextlib.contextmanager
def _without_gathering(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Context in which the state of a rank without data-parallel peers is handed on as it is; Megatron-Core copies it twice.

    Its `get_parameter_state_dp_zero` gathers all ranks' parts of each buffer into one tensor, of which it then takes the slice
    of every parameter; here the slices are the parameter's own tensors.
    """
    alone = [
        part
        for part in optimizer.chained_optimizers
        if isinstance(part, DistributedOptimizer) and part.data_parallel_group.size() == 1
    ]
    for part in alone:
        part.get_parameter_state_dp_zero = functools.partial(_own_state, part)
    try:
        yield
    finally:
        for part in alone:
            del part.get_parameter_state_dp_zero


def _own_state(part: DistributedOptimizer, **options: Any) -> dict[int, dict[torch.dtype, dict[str, "_Slices"]]]:
    """Weights and state of an optimizer's parameters by buffer, in the form of `get_parameter_state_dp_zero`."""
    found = {}
    for number, ranges in enumerate(part.gbuf_ranges):
        (kind,) = ranges
        slices = {key: _Slices() for key in ("param", *part.optimizer_state_keys)}
        for parameter, (start, *_) in part.buffers[number].param_index_map.items():
            tensors = part._get_main_param_and_optimizer_states(parameter)
            for key in slices:
                slices[key][start] = tensors[key].detach().flatten().float()
        found[number] = {kind: slices}
    return found


class _Slices(dict[int, Tensor]):
    """Tensors by the place in a buffer where they begin, reached by slices of the buffer."""

    def __getitem__(self, place: slice) -> Tensor:  # type: ignore[override]
        return super().__getitem__(place.start)


class CheckpointSaver:
    """Writes a run's checkpoints, one at a time, and removes all but the newest and the last good one; all ranks call it.

    Args:
        run: run folder.
        provenances: what each student was made of, for its hylo.json.
        tokenizer: folder whose files are copied, where there is one.
        keep: newest checkpoints that stay.
        background: training goes on between `start` and `finish`, which takes memory for copies.
    """

    def __init__(
        self, run: Path, provenances: Sequence[dict[str, Any]], tokenizer: Path | None, keep: int, background: bool = True
    ) -> None:
        self.run, self.provenances, self.tokenizer, self.keep, self.background = run, provenances, tokenizer, keep, background
        self.writes: list[BackgroundWrite] = []
        self.directory = contextlib.ExitStack()

    def start(self, states: Sequence[TrainingState], step: int, consumed_samples: int) -> None:
        """Begin to write the checkpoint after `step` steps with the present values; an earlier one is finished first.

        Args:
            states: the run's students, one or two.
            step, consumed_samples: the position.

        Raises:
            ConfigError: the disk is full; nothing is left and older checkpoints stay.
        """
        self.finish()
        with contextlib.ExitStack() as directory:
            folder = directory.enter_context(atomic_directory(checkpoint_path(self.run, step), overwrite=True))
            writes = []
            for (state, part), provenance in zip(_folders(states, folder), self.provenances):
                with state.portable():
                    writes.append(
                        BackgroundWrite(_sharded_state(state, loading=False), part / "weights", folder, not self.background)
                    )
                if is_main():
                    write_json(part / "hylo.json", describe(state.config.hylo, state.config.params_dtype, provenance))
            if is_main():
                write_json(folder / POSITION, {"step": step, "consumed_samples": consumed_samples})
                if self.tokenizer is not None and self.tokenizer.is_dir():
                    shutil.copytree(self.tokenizer, folder / "tokenizer")
            self.writes, self.directory = writes, directory.pop_all()

    def finish_if_written(self, device: torch.device) -> None:
        """Complete the checkpoint that `start` began, once every rank has written its part."""
        if self.writes:
            written = torch.tensor([int(all(write.done() for write in self.writes))], device=device)
            torch.distributed.all_reduce(written, op=torch.distributed.ReduceOp.MIN)
            if written.item():
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that `start` began, complete it and remove old ones; raises as `start` does."""
        if not self.writes:
            return
        writes, self.writes = self.writes, []
        with self.directory:
            for write in writes:
                write.finish()
        if is_main():
            good = (self.run / LAST_GOOD).resolve()
            for old in self._finished()[: -self.keep]:
                if old.resolve() != good:
                    remove_atomic_directory(old)

    def _finished(self) -> list[Path]:
        return [p for p in sorted((self.run / "checkpoints").glob("step_*")) if has_manifest(p)]

    def set_apart(self, step: int) -> Path | None:
        """Keep the newest checkpoint from before a step as RUN/last_good, in place of an earlier one; rank 0 calls it.

        Args:
            step: whose loss, gradients or update may be bad.

        Returns:
            The checkpoint, None where there is none so early.
        """
        before = [path for path in self._finished() if checkpoint_step(path) < step]
        if not before:
            return None
        link = self.run / f".{LAST_GOOD}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(before[-1].relative_to(self.run))
        os.replace(link, self.run / LAST_GOOD)
        return before[-1]


def load_checkpoint(states: Sequence[TrainingState], path: Path) -> tuple[int, int]:
    """Restore weights, optimizer and schedule of every student.

    Args:
        states: freshly built for the same architectures, under any parallelism.
        path: a checkpoint folder.

    Returns:
        (steps done, samples consumed).

    Raises:
        DamagedError: the files are not what the manifest says.
    """
    for state, schedule in zip(states, load_states(states, path)):
        load_schedule(state.scheduler, schedule)
    position = read_verified_json(path, POSITION, ("step", "consumed_samples"))
    return position["step"], position["consumed_samples"]


def load_states(states: Sequence[TrainingState], path: Path) -> list[dict[str, Any]]:
    """Restore weights and optimizer of every student; returns their schedules, which stay as they are.

    Args:
        states, path: see `load_checkpoint`.

    Raises:
        DamagedError: the files are not what the manifest says.
    """
    verify_manifest(path)
    schedules = []
    for state, part in _folders(states, path):
        read_description(part)
        with state.portable():
            allocate_optimizer_state(state.optimizer)
            loaded = load_weights(_sharded_state(state, loading=True), part / "weights")
            put_chunks(state.chunks, loaded)
            load_optimizer_state(state.optimizer, loaded["optimizer"])
        schedules.append(loaded["scheduler"])
    return schedules
