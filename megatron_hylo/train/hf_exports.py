"""Callback that writes checkpoints of a run as Hugging Face folders while it trains."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.io import has_manifest
from megatron_hylo.train.callback import Callback, Progress
from megatron_hylo.train.callbacks import Checkpoints
from megatron_hylo.train.checkpoint import checkpoint_path
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.setup import Run

T = TypeVar("T")
EXPORTS = "exports"


class HuggingFaceExports(Callback):
    """Writes RUN/exports/step_00000100 from every checkpoint whose step is a multiple of `checkpoint.export_every`.

    All ranks convert a part of the checkpoint's tensors from disk, so no rank holds the whole model; training waits meanwhile.
    The last step is exported too. With two students it is the first one's. Exports stay until they are removed by hand.

    Args:
        run: whose checkpoints are exported.
        folder: run folder.
        reporter: says where each export is.
        checkpoints: of the run; one that is being written is finished first.
    """

    def __init__(self, run: Run, folder: Path, reporter: Reporter, checkpoints: Checkpoints) -> None:
        self.run, self.folder, self.reporter, self.checkpoints = run, folder, reporter, checkpoints

    def after_step(self, progress: Progress) -> None:
        """Export the checkpoint of this step, where it has one and it is its turn."""
        config = self.run.config
        if progress.step % config.checkpoint.export_every == 0 and progress.step < config.train_steps:
            self._export(progress.step)

    def at_end(self, progress: Progress) -> None:
        """Export the last checkpoint."""
        self._export(progress.step)

    def _export(self, step: int) -> None:
        self.checkpoints.saver.finish()
        checkpoint = checkpoint_path(self.folder, step)
        output = self.folder / EXPORTS / checkpoint.name
        exported_before_a_stop = has_manifest(output)
        if exported_before_a_stop or not has_manifest(checkpoint):  # a skipped step has no checkpoint
            return
        convert_megatron_to_hf(checkpoint, output, track=self._track, verify=False)
        self.reporter.say(f"step {step}: exported to {output}")

    def _track(self, items: Iterable[T], _: str) -> Iterator[T]:
        """Tell the watch for hanging ranks, between two tensors, that this one works."""
        for item in items:
            self.checkpoints.stop.beat()
            yield item
