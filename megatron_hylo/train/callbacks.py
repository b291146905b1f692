"""Callbacks of a run: checkpoints and stopping, held-out evaluation, the profiler, the finished models.

The loop calls them in the order of its list. A checkpoint is saved before a stop is obeyed, and evaluation comes after both, so
that a signal is not kept waiting for it.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_hylo.config.train import PREFIXES
from megatron_hylo.eval.perplexity import HeldoutText, Quality, evaluate, evaluate_recall
from megatron_hylo.io import on_main, write_json
from megatron_hylo.io.progress import Track
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress, Stopped
from megatron_hylo.train.checkpoint import CheckpointSaver
from megatron_hylo.train.heldout import Heldout
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.setup import Run
from megatron_hylo.train.stopping import STOP, EvaluationStopped, StopRequest, stopping_track

logger = logging.getLogger("megatron_hylo.train")


class Checkpoints(Callback):
    """Saves checkpoints at intervals, at the end, on request and on a stop signal, after which it raises `Stopped`.

    Args:
        run: whose states are saved.
        saver: writes them.
        saved: step of the checkpoint that the run goes on from; 0 without one.
        stop: stop signals and save switch of the run.
    """

    def __init__(self, run: Run, saver: CheckpointSaver, saved: int, stop: StopRequest) -> None:
        self.run, self.saver, self.saved, self.stop = run, saver, saved, stop

    def after_step(self, progress: Progress) -> None:
        """Save, then obey a stop signal; the order is what makes a stopped run resumable.

        Raises:
            Stopped: a stop was asked for, and the checkpoint of this step is saved.
        """
        config, step = self.run.config, progress.step
        self.stop.starting = False  # from the first step on there is something to save
        unfinished, skipping = step < config.train_steps, progress.skipped.in_a_row
        asked = self.stop.agreed(self.run.device)
        if unfinished and (asked or (step % config.checkpoint.save_interval == 0 and not skipping)):
            self._save(progress)
            if not asked and not config.checkpoint.async_save:
                self.saver.finish()
                asked = self.stop.agreed(self.run.device)  # in the time that saving took
        if asked or not config.checkpoint.async_save:
            self.saver.finish()
        if asked:
            self.stop.saved()
        self.saver.finish_if_written(self.run.device)
        if asked == STOP and unfinished:
            raise self._stopped(progress)

    def stop_now(self, progress: Progress) -> Stopped:
        """Save what is not saved yet, between two steps; returns the exception that ends the run. All ranks call it."""
        if self.saved < progress.step:
            self._save(progress)
        self.saver.finish()
        return self._stopped(progress)

    def _stopped(self, progress: Progress) -> Stopped:
        return Stopped(
            f"stopped at step {progress.step} of {self.run.config.train_steps} and saved; run the same command to resume"
        )

    def _save(self, progress: Progress) -> None:
        self.saver.start(self.run.states, progress.step, progress.consumed)
        self.saved = progress.step

    def at_end(self, progress: Progress) -> None:
        """Save the last step: for a longer run later, and in case what follows fails."""
        self.stop.starting = False
        self.stop.what_follows = "all steps are done and saved; the evaluation and the model are made when it resumes"
        self.saver.finish()
        if self.saved < progress.step and not progress.skipped.in_a_row:
            self._save(progress)
            self.saver.finish()


class Evaluation(Callback):
    """Measures held-out quality of every student at intervals and at the end.

    Args:
        run: whose students are measured, against a teacher on the same ranks.
        heldout: texts and recall windows to measure on.
        reporter: records and shows what was measured.
        folder: run folder; quality.json, and second_quality.json, of the last step are written there.
        checkpoints: saves where a stop signal ends an evaluation.
    """

    def __init__(self, run: Run, heldout: Heldout, reporter: Reporter, folder: Path, checkpoints: Checkpoints) -> None:
        self.run, self.heldout, self.reporter, self.folder, self.checkpoints = run, heldout, reporter, folder, checkpoints
        self.quality: Quality | None = None  # the first student's, at the end
        self.interrupted = checkpoints.saved  # step whose evaluation an earlier start may have left undone

    def before_step(self, progress: Progress) -> None:
        """Make up for the evaluation that a stop signal ended, before the first step of a start."""
        step, self.interrupted = self.interrupted, 0
        interval = self.run.config.eval_interval
        if step and interval and step % interval == 0 and not on_main(lambda: self._recorded(step)):
            self._evaluate(progress)

    def after_step(self, progress: Progress) -> None:
        """Evaluate every `eval_interval` steps."""
        config, step = self.run.config, progress.step
        if config.eval_interval and step % config.eval_interval == 0 and step < config.train_steps:
            self._evaluate(progress)

    def at_end(self, progress: Progress) -> None:
        """Evaluate the trained students and write their quality files."""
        measured = self._evaluate(progress)
        self.quality = measured[0]
        for prefix, quality in zip(PREFIXES, measured):
            if is_main():
                write_json(self.folder / f"{prefix}quality.json", quality.to_dict())

    def _recorded(self, step: int) -> bool:
        """Whether metrics.jsonl has the last figures of an evaluation."""
        last = f"{PREFIXES[len(self.run.states) - 1]}heldout_"
        last += "recall_" if self.heldout.recall is not None else "perplexity"
        if self.heldout.recall is None and self.heldout.texts[-1].name:
            last += f"/{self.heldout.texts[-1].name}"
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        return any(f'"{last}' in line and json.loads(line)["step"] == step for line in lines)

    def _evaluate(self, progress: Progress) -> list[Quality]:
        """Evaluate all students; on a stop signal save and raise `Stopped` instead."""
        try:
            return self._measure(progress.step)
        except EvaluationStopped:
            raise self.checkpoints.stop_now(progress) from None

    def _track(self, text: HeldoutText) -> Track:
        """Look for a stop signal between the batches that every data-parallel rank has."""
        ranks = parallel_state.get_data_parallel_world_size()
        shared = -(-(len(text.windows) // ranks) // self.run.config.micro_batch_size)
        return stopping_track(self.checkpoints.stop, self.run.device, shared)

    def _measure(self, step: int) -> list[Quality]:
        """Quality of each student on the run's own held-out text; the other texts' and recall are recorded alone."""
        measured = []
        size = " and ".join(f"{n:,} windows" + (f" of {name}" if name else "") for n, name in self._sizes())
        self.reporter.say(f"step {step}: measuring held-out quality on {size} of {self.run.config.sequence_length:,} tokens")
        for prefix, state in zip(PREFIXES, self.run.states):
            which = f"{prefix}model: " if len(self.run.states) > 1 else ""
            own, *_ = [self._measure_text(step, prefix, which, state.chunks, text) for text in self.heldout.texts]
            measured.append(own)
            if self.heldout.recall is not None:
                self._measure_recall(step, prefix, which, state.chunks, self.heldout.recall)
        return measured

    def _sizes(self) -> list[tuple[int, str]]:
        """Number of windows and name of each held-out text."""
        recall = [(len(self.heldout.recall.windows), "recall")] if self.heldout.recall is not None else []
        return [(len(text.windows), text.name) for text in self.heldout.texts] + recall

    def _measure_text(self, step: int, prefix: str, which: str, chunks: Sequence[HyloModel], text: HeldoutText) -> Quality:
        config = self.run.config
        size = config.micro_batch_size
        quality = evaluate(chunks, text, self.run.teacher, size, config.loss_chunk_tokens, self._track(text))
        end = f"/{text.name}" if text.name else ""
        self.reporter.record(step, {f"{prefix}heldout_{name}{end}": value for name, value in quality.to_dict().items()})
        kl = f", KL {quality.kl:.3f}" if quality.kl is not None else ""
        where = f" of {text.name}" if text.name else ""
        self.reporter.say(f"step {step}: {which}held-out perplexity{where} {quality.perplexity:.2f}{kl}")
        return quality

    def _measure_recall(self, step: int, prefix: str, which: str, chunks: Sequence[HyloModel], text: HeldoutText) -> None:
        config = self.run.config
        found = evaluate_recall(chunks, text, config.micro_batch_size, config.loss_chunk_tokens, track=self._track(text))
        self.reporter.record(step, {f"{prefix}heldout_recall_{name}": value for name, value in found.items()})
        if found:
            self.reporter.say(
                f"step {step}: {which}held-out recall: {100 * found['accuracy']:.1f}% of {found['tokens']:,.0f} answer tokens, "
                f"cross-entropy {found['cross_entropy']:.3f}"
            )


class Export(Callback):
    """Writes the trained models, RUN/model last: a run that has it is finished.

    Args:
        run: whose students are written.
        folder: run folder.
        provenances: of each student, for its hylo.json.
        tokenizer: folder whose files are copied, where there is one.
    """

    def __init__(self, run: Run, folder: Path, provenances: Sequence[dict[str, Any]], tokenizer: Path | None) -> None:
        self.run, self.folder, self.provenances, self.tokenizer = run, folder, provenances, tokenizer

    def at_end(self, progress: Progress) -> None:
        """Write RUN/second_model, then RUN/model."""
        for student, prefix, provenance in reversed(list(zip(self.run.students, PREFIXES, self.provenances))):
            save_model(student, self.folder / f"{prefix}model", self.tokenizer, provenance, overwrite=True)
