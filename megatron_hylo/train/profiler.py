"""A torch.profiler trace of some steps of a run, one file a rank in RUN/profile."""

import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_hylo.config.train import ProfileSettings
from megatron_hylo.platform.distributed import rank
from megatron_hylo.train.callback import Callback, Progress

logger = logging.getLogger("megatron_hylo.train")


class Profiler(Callback):
    """Traces `settings.steps` steps from `settings.start_step` on; of a run that ends or stops earlier, those it took.

    Args:
        settings: which steps.
        folder: run folder; traces are RUN/profile/steps_FIRST-LAST_rank_R.json.gz, for Perfetto (ui.perfetto.dev).
    """

    def __init__(self, settings: ProfileSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.trace: profile | None = None
        self.last = 0  # step

    def before_step(self, progress: Progress) -> None:
        """Start the trace before step `start_step`."""
        if self.settings.steps and progress.step + 1 == self.settings.start_step:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.trace = profile(activities=activities)
            self.trace.start()

    def after_step(self, progress: Progress) -> None:
        """Write the trace after its last step."""
        self.last = progress.step
        if self.trace is not None and progress.step == self.settings.start_step + self.settings.steps - 1:
            self.close()

    def close(self) -> None:
        """Write a trace that has begun."""
        if self.trace is None:
            return
        trace, self.trace = self.trace, None
        trace.stop()
        folder = self.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"steps_{self.settings.start_step}-{self.last}_rank_{rank()}.json.gz"
        unfinished = file.with_name(f"unfinished_{file.name}")
        trace.export_chrome_trace(str(unfinished))
        os.replace(unfinished, file)
        logger.info("trace of steps %d to %d: %s", self.settings.start_step, self.last, file)
