"""Callbacks of a run: checkpoints and stopping, held-out evaluation, the profiler, the finished models.

The loop calls them in the order of its list. A checkpoint is saved before a stop is obeyed, and evaluation comes after both, so
that a signal is not kept waiting for it.
"""

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config.train import PREFIXES
from megatron_hylo.eval.perplexity import HeldoutText, Quality, evaluate, evaluate_recall
from megatron_hylo.io import is_launched_first, write_json
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress, Stopped
from megatron_hylo.train.checkpoint import CheckpointSaver
from megatron_hylo.train.heldout import Heldout
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.setup import Run

logger = logging.getLogger("megatron_hylo.train")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a stop signal; ranks agree on it, so that all stop after the same step. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.seen: int | None = None
        self.what_follows = "stopping after this step, with a checkpoint"
        self.previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.seen == number:
            raise KeyboardInterrupt
        if self.seen is None and is_launched_first():  # not by print, which may be under way
            again = "; Ctrl-C once more ends at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: {self.what_follows}{again}\n".encode())
        self.seen = number

    def agreed(self, device: torch.device) -> bool:
        """Return True on all ranks once any of them was signalled."""
        flag = torch.tensor([int(self.seen is not None)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Checkpoints(Callback):
    """Saves checkpoints at intervals, at the end and on a stop signal, after which it raises `Stopped`.

    Args:
        run: whose states are saved.
        saver: writes them.
        saved: step of the checkpoint that the run goes on from; 0 without one.
    """

    def __init__(self, run: Run, saver: CheckpointSaver, saved: int) -> None:
        self.run, self.saver, self.saved = run, saver, saved
        self.stop = StopRequest()

    def after_step(self, progress: Progress) -> None:
        """Save, then obey a stop signal; the order is what makes a stopped run resumable."""
        config, step = self.run.config, progress.step
        unfinished, skipping = step < config.train_steps, progress.skipped.in_a_row
        stopping = self.stop.agreed(self.run.device)
        if unfinished and (stopping or (step % config.checkpoint.save_interval == 0 and not skipping)):
            self.saver.start(self.run.states, step, progress.consumed)
        if stopping or not config.checkpoint.async_save:
            self.saver.finish()
        self.saver.finish_if_written(self.run.device)
        if stopping and unfinished:
            raise Stopped(f"stopped at step {step} of {config.train_steps} and saved; run the same command to resume")

    def at_end(self, progress: Progress) -> None:
        """Save the last step: for a longer run later, and in case what follows fails."""
        self.stop.what_follows = "all steps are done; the last evaluation and the model are finished first"
        self.saver.finish()
        if self.saved < progress.step and not progress.skipped.in_a_row:
            self.saver.start(self.run.states, progress.step, progress.consumed)
            self.saver.finish()

    def close(self) -> None:
        """Put the earlier signal handlers back."""
        self.stop.restore()


class Evaluation(Callback):
    """Measures held-out quality of every student at intervals and at the end.

    Args:
        run: whose students are measured, against a teacher on the same ranks.
        heldout: texts and recall windows to measure on.
        reporter: records and shows what was measured.
        folder: run folder; quality.json, and second_quality.json, of the last step are written there.
    """

    def __init__(self, run: Run, heldout: Heldout, reporter: Reporter, folder: Path) -> None:
        self.run, self.heldout, self.reporter, self.folder = run, heldout, reporter, folder
        self.quality: Quality | None = None  # the first student's, at the end

    def after_step(self, progress: Progress) -> None:
        """Evaluate every `eval_interval` steps."""
        config, step = self.run.config, progress.step
        if config.eval_interval and step % config.eval_interval == 0 and step < config.train_steps:
            self._evaluate(step)

    def at_end(self, progress: Progress) -> None:
        """Evaluate the trained students and write their quality files."""
        measured = self._evaluate(progress.step)
        self.quality = measured[0]
        for prefix, quality in zip(PREFIXES, measured):
            if is_main():
                write_json(self.folder / f"{prefix}quality.json", quality.to_dict())

    def _evaluate(self, step: int) -> list[Quality]:
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
        quality = evaluate(chunks, text, self.run.teacher, config.micro_batch_size, config.loss_chunk_tokens)
        end = f"/{text.name}" if text.name else ""
        self.reporter.record(step, {f"{prefix}heldout_{name}{end}": value for name, value in quality.to_dict().items()})
        kl = f", KL {quality.kl:.3f}" if quality.kl is not None else ""
        where = f" of {text.name}" if text.name else ""
        self.reporter.say(f"step {step}: {which}held-out perplexity{where} {quality.perplexity:.2f}{kl}")
        return quality

    def _measure_recall(self, step: int, prefix: str, which: str, chunks: Sequence[HyloModel], text: HeldoutText) -> None:
        found = evaluate_recall(chunks, text, self.run.config.micro_batch_size, self.run.config.loss_chunk_tokens)
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
