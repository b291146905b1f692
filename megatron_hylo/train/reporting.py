"""Reporting of a run: progress bar with ETA, metrics.jsonl, TensorBoard, wandb on request."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.plan.flops import peak_flops
from megatron_hylo.plan.memory import GIB, Memory
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress

logger = logging.getLogger("megatron_hylo.train")


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Reporter(Callback):
    """Shows and records metrics on the main rank; silent on the others."""

    def __init__(self, config: TrainConfig, run: Path, device: torch.device, flops_per_token: float, start_step: int) -> None:
        self.config, self.run, self.device, self.flops_per_token = config, run, device, flops_per_token
        self.tokens_per_step = config.global_batch_size * config.sequence_length
        self.writer = self.wandb = self.progress = None
        self.memory: Memory | None = None
        self.last = (time.perf_counter(), start_step)
        self.stepped = False
        if not is_main():
            return
        run.mkdir(parents=True, exist_ok=True)
        self.peak, source = peak_flops(device)
        logger.info("peak of one %s for MFU: %.3g FLOP/s (%s)", device.type, self.peak, source)
        self.metrics_file = _open_metrics(run / "metrics.jsonl", start_step)
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        if config.logging.wandb != "disabled":
            self.wandb = _start_wandb(config, run)
        self.progress = ProgressBar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), refresh_per_second=2,
        )  # fmt: skip
        self.task = self.progress.add_task(config.stage, total=config.train_steps, completed=start_step, numbers="")
        self.progress.start()

    def predict(self, memory: Memory) -> None:
        """Show what a GPU will need, warn where it has less, and compare with its peak at the end."""
        self.memory = memory
        self.say(f"memory of a GPU, predicted: {memory}")
        if memory.total > (there := torch.cuda.get_device_properties(self.device).total_memory):
            logger.warning(
                "%.0f GiB will hardly fit into the %.0f of this GPU; less is needed with recompute, a smaller micro_batch_size "
                "or loss_chunk_tokens, a larger context_parallel_size, teacher_precision fp8, teacher_offload, or a teacher "
                "elsewhere",
                memory.total / GIB,
                there / GIB,
            )

    def after_step(self, progress: Progress) -> None:
        """Move the bar; every `log_interval` steps (and the first and last) record; say so where a step was skipped."""
        if not self.stepped:
            self.stepped = True
            logger.info("operations: %s", in_use())
        self._step(progress.step, progress.metrics)
        skipped = progress.skipped
        if skipped.in_a_row:
            self.say(f"step {progress.step} skipped: NaN or infinity in loss or gradients ({skipped.total} such steps)")

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        if self.progress is None:
            return
        self.progress.update(self.task, completed=step)
        if step % self.config.logging.log_interval and step not in (1, self.config.train_steps):
            return
        now, (then, previous) = time.perf_counter(), self.last
        self.last = (now, step)
        rate = (step - previous) * self.tokens_per_step / max(now - then, 1e-9)
        world = torch.distributed.get_world_size()
        record = metrics | {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / (self.peak * world),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.record(step, record)
        loss, mfu = record.get("loss", float("nan")), 100 * record["mfu"]
        self.progress.update(self.task, numbers=f"loss {loss:.4f}  {rate:,.0f} tokens/s  MFU {mfu:.1f}%")

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Write metrics of one step everywhere."""
        if self.progress is None:
            return
        self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            if self.writer is not None and value is not None:
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.progress is not None:
            self.progress.console.print(message)

    def close(self) -> None:
        """Flush and stop."""
        if self.progress is None:
            return
        if self.memory is not None:
            self.say(f"peak memory {peak_memory_gib(self.device):.1f} GiB, predicted {self.memory.total / GIB:.1f}")
        self.progress.stop()
        self.metrics_file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_metrics(file: Path, start_step: int) -> TextIO:
    """Open metrics.jsonl for appending, without the steps after the checkpoint that a run resumes from: they are done again."""
    if file.is_file():
        beside = file.with_name(f".{file.name}.partial")  # so that a kill now does not lose what was recorded
        lines = file.read_text(errors="replace").splitlines(True)
        beside.write_text("".join(line for line in lines if _is_before(line, start_step)))
        os.replace(beside, file)
    return open(file, "a", buffering=1)


def _is_before(line: str, step: int) -> bool:
    """Return whether a line of metrics.jsonl is whole and of a step up to `step`."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        logger.warning("metrics.jsonl has a line that cannot be read, which is left out: %.60s", line)
        return False


def _start_wandb(config: TrainConfig, run: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb is asked for but not installed; pip install wandb, or set logging.wandb disabled") from error
    from dataclasses import asdict

    return wandb.init(
        project=config.logging.wandb_project, dir=str(run), mode=config.logging.wandb, config=asdict(config), resume="allow"
    )
