"""Reporting of a run: progress bar or lines with ETA, log.txt, metrics.jsonl, TensorBoard, wandb on request."""

import importlib.util
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.eval.runs import learning_rates
from megatron_hylo.kernels.registry import in_words
from megatron_hylo.plan.flops import peak_flops
from megatron_hylo.plan.memory import GIB, Memory
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress, Stopped
from megatron_hylo.train.cuda_graph import WARM_UP
from megatron_hylo.train.data_loader import TimedBatches

logger = logging.getLogger("megatron_hylo.train")
SHOWN_WAIT = 0.01  # share of the time that is waited for input, from which on the log says it
MESSAGE_LENGTH = 1000  # of an error in metrics.jsonl, in characters


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU since the run began, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Reporter(Callback):
    """Shows and records metrics on the main rank; silent on the others.

    On a terminal a progress bar moves; elsewhere (Slurm, a pipe) each record is a line. Both are on stderr; lines are in
    RUN/log.txt too.

    Args:
        config: settings of the run.
        run: run folder.
        device: device of this rank.
        flops_per_token: model FLOPs a token, for MFU.
        start_step: steps done before this start.
        batches: whose waits are recorded, if any.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        device: torch.device,
        flops_per_token: float,
        start_step: int,
        batches: TimedBatches | None = None,
    ) -> None:
        self.config, self.run, self.device, self.flops_per_token = config, run, device, flops_per_token
        self.tokens_per_step = config.global_batch_size * config.sequence_length
        self.writer = self.wandb = self.bar = None
        self.memory: Memory | None = None
        self.batches = batches
        self.waited = 0.0  # until the last record
        self.first = self.last = (time.perf_counter(), start_step)
        self.step = start_step
        self.timed = 1 + (WARM_UP + 1 if config.cuda_graphs else 0)  # steps behind the first one when the estimate is made
        self.stepped, self.enabled = False, is_main()
        if not self.enabled:
            return
        if device.type == "cuda":  # `hylo sweep` trains several runs in one process
            torch.cuda.reset_peak_memory_stats(device)
        run.mkdir(parents=True, exist_ok=True)
        self.log_file = open(run / "log.txt", "a", buffering=1)
        self.log_handler = logging.StreamHandler(self.log_file)
        self.log_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger("megatron_hylo").addHandler(self.log_handler)
        self.peak: float | None = None
        if device.type == "cuda":  # a CPU has no peak that anybody compares with
            self.peak, source = peak_flops(device)
            logger.info("peak of one GPU for MFU: %.3g FLOP/s (%s)", self.peak, source)
        self.metrics_file = _open_metrics(run / "metrics.jsonl", start_step)
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        if config.logging.wandb != "disabled":
            self.wandb = _start_wandb(config, run)
        if sys.stderr.isatty():
            self.bar = ProgressBar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"), refresh_per_second=2, console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task(config.stage, total=config.train_steps, completed=start_step, numbers="")
            self.bar.start()

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
        self.step = progress.step
        if not self.stepped:
            self.stepped, self.first = True, (time.perf_counter(), progress.step)
            self.say(f"kernels by library: {in_words()} (reasons with -v)")
        elif progress.step == self.first[1] + self.timed:
            self._estimate(progress.step)
        if self.enabled:
            self._step(progress.step, progress.metrics)
        skipped = progress.skipped
        if skipped.in_a_row:
            self.say(f"step {progress.step} skipped: NaN or infinity in loss or gradients ({skipped.total} such steps)")

    def _estimate(self, step: int) -> None:
        """Say how long all steps of this start will take, once the first ones that are not slowed by compiling are timed."""
        now, left = time.perf_counter(), self.config.train_steps - step
        if left > 0:
            seconds = self._seconds(step, now)
            ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
            self.say(
                f"about {seconds / left:.2g} s a step: {self._remaining(step, now)} for the {left:,} steps left, until {ends}; "
                f"evaluations and checkpoints come on top"
            )

    def _seconds(self, step: int, now: float) -> float:
        """Seconds to the last step at the mean speed of this start since its first step, which compiles kernels."""
        then, first = self.first
        return (now - then) / (step - first) * (self.config.train_steps - step)

    def _remaining(self, step: int, now: float) -> str:
        """Time to the last step, H:MM:SS."""
        return "-" if step == self.first[1] else str(timedelta(seconds=round(self._seconds(step, now))))

    def _step(self, step: int, metrics: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        if not self.config.is_logged(step):
            return
        now, (then, previous) = time.perf_counter(), self.last
        self.last = (now, step)
        rate = (step - previous) * self.tokens_per_step / max(now - then, 1e-9)
        world = torch.distributed.get_world_size()
        record = metrics | {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        speed = f"{rate:,.0f} tokens/s"
        if self.batches is not None:
            before, self.waited = self.waited, self.batches.waited
            record["input_wait_share"] = (self.waited - before) / max(now - then, 1e-9)
            speed += f"  input wait {record['input_wait_share']:.1%}" if record["input_wait_share"] >= SHOWN_WAIT else ""
        if self.peak is not None:
            record["mfu"] = rate * self.flops_per_token / (self.peak * world)
            speed += f"  MFU {100 * record['mfu']:.1f}%"
        self.record(step, record)
        loss = f"loss {record.get('loss', float('nan')):.4f}"
        if "loss_per_layer" in record:
            loss += f" ({record['loss_per_layer']:.3f} a layer)"
        if self.bar is not None:
            self.bar.update(self.task, numbers=f"{loss}  {speed}")
        line = (
            f"step {step}/{self.config.train_steps}  {loss}  {learning_rates(metrics)}  {speed}  "
            f"peak memory {record['peak_memory_gib']:.1f} GiB  ETA {self._remaining(step, now)}"
        )
        self._write(line, shown=self.bar is None)

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Write metrics of one step everywhere; in metrics.jsonl with "time", seconds since 1970."""
        if not self.enabled:
            return
        self._append(step, metrics)
        for name, value in metrics.items():
            if self.writer is not None and value is not None:
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def _append(self, step: int, values: dict[str, Any]) -> None:
        self.metrics_file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def say(self, message: str) -> None:
        """Print a line on stderr, above a progress bar, and into RUN/log.txt."""
        if self.enabled:
            self._write(message, shown=True)

    def _write(self, message: str, shown: bool) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}"
        self.log_file.write(line + "\n")
        if self.bar is not None and shown:
            self.bar.console.print(message, markup=False, highlight=False)
        elif shown:
            print(line, file=sys.stderr, flush=True)

    def close(self, error: BaseException | None = None) -> None:
        """Record how this start ended (finished, stopped or failed), flush and stop.

        Args:
            error: what the training loop was left with; None at the run's end.
        """
        if not self.enabled:
            return
        ended = "finished" if error is None else "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
        message = "" if error is None else " ".join(str(error).split())[:MESSAGE_LENGTH] or type(error).__name__
        self._append(self.step, {"ended": ended, "message": message})
        if self.memory is not None:
            self.say(f"peak memory {peak_memory_gib(self.device):.1f} GiB, predicted {self.memory.allocated / GIB:.1f}")
        if self.bar is not None:
            self.bar.stop()
        self._write(f"failed: {message}" if ended == "failed" else message or ended, shown=False)
        self.metrics_file.close()
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()
        logging.getLogger("megatron_hylo").removeHandler(self.log_handler)
        self.log_file.close()


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


def check_wandb(config: TrainConfig) -> None:
    """Refuse a run that logs to Weights & Biases where it is not installed, before the run folder has anything.

    Raises:
        ConfigError: wandb is not installed.
    """
    if config.logging.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is asked for but not installed; pip install wandb, or set logging.wandb disabled")


def _start_wandb(config: TrainConfig, run: Path) -> Any:
    import wandb

    settings = config.logging
    return wandb.init(
        project=settings.wandb_project, dir=str(run), mode=settings.wandb, config=asdict(config), resume="allow"
    )  # fmt: skip
