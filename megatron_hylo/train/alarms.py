"""Alarms of a run: a loss or gradient norm far above those before it, NaN or infinity, kept with the text of that step.

A dataset keeps no names of documents, so an alarm keeps the numbers of its windows and how each begins. The newest checkpoint
from before the first of some alarms is kept too, as RUN/last_good.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_hylo.data.windows import WindowSource
from megatron_hylo.eval.runs import read_lines
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress
from megatron_hylo.train.checkpoint import LAST_GOOD
from megatron_hylo.train.reporting import Reporter

ALARMS = "alarms.jsonl"
LIMITS = {"loss": 1.5, "gradient_norm": 5.0}  # times the median of the steps before
REMEMBERED, NEEDED = 100, 20  # steps whose median is taken; fewer make no alarm
QUIET = REMEMBERED  # steps without an alarm, after which checkpoints are taken for good again
MOST_WINDOWS, CHARACTERS = 64, 120


def window_texts(source: WindowSource, data: str, first: int, last: int) -> list[str]:
    """How the windows [first, last) begin; token numbers where the dataset has no tokenizer.

    Args:
        source: of the windows.
        data: dataset folder.
        first, last: numbers of windows.
    """
    file = Path(data) / "tokenizer" / "tokenizer.json"
    begins = [source.window(i).tokens[:CHARACTERS].tolist() for i in range(first, last)]
    if not file.is_file():
        return [" ".join(map(str, tokens[:20])) for tokens in begins]
    tokenizer = Tokenizer.from_file(str(file))
    return [tokenizer.decode(tokens, skip_special_tokens=False)[:CHARACTERS] for tokens in begins]


class Alarms(Callback):
    """Records steps whose loss or gradient norm jumps up, or that are skipped, in RUN/alarms.jsonl, with their text.

    Args:
        run: run folder.
        reporter: tells of an alarm.
        texts: how the windows [first, last) of the training text begin.
        batch: windows a step.
        set_apart: keeps the newest checkpoint from before a step; returns it.
    """

    def __init__(
        self,
        run: Path,
        reporter: Reporter,
        texts: Callable[[int, int], list[str]],
        batch: int,
        set_apart: Callable[[int], Path | None],
    ) -> None:
        self.file, self.reporter, self.texts, self.batch, self.set_apart = run / ALARMS, reporter, texts, batch, set_apart
        self.before: dict[str, deque[float]] = {name: deque(maxlen=REMEMBERED) for name in LIMITS}
        told = read_lines(self.file)
        self.newest: int | None = told[-1]["step"] if told else None  # step of the newest alarm

    def after_step(self, progress: Progress) -> None:
        """Compare the step with those before it."""
        if not is_main():
            return
        if progress.skipped.in_a_row == 1:
            self._tell(progress, "skipped_steps", float(progress.skipped.total), None)
        for name, limit in LIMITS.items():
            value, before = progress.metrics.get(name), self.before[name]
            if value is None or value != value:
                continue
            if len(before) >= NEEDED and value > limit * (median := statistics.median(before)) > 0:
                self._tell(progress, name, value, median)
            before.append(value)

    def _tell(self, progress: Progress, name: str, value: float, median: float | None) -> None:
        first, last = progress.consumed - self.batch, progress.consumed
        found: dict[str, Any] = {
            "step": progress.step, "time": round(time.time(), 3), "metric": name, "value": value, "median": median,
            "windows": [first, last], "texts": self.texts(first, min(last, first + MOST_WINDOWS)),
        }  # fmt: skip
        if self.newest is None or not 0 <= progress.step - self.newest <= QUIET:
            good = self.set_apart(progress.step)
            found["last_good"] = good and good.name
        self.newest = progress.step
        with open(self.file, "a") as file:
            file.write(json.dumps(found) + "\n")
        what = "NaN or infinity"
        if median:
            what = f"{name.replace('_', ' ')} {value:.4g} is {value / median:.1f} times the median of the steps before"
        kept = f"; {found['last_good']} is kept as {LAST_GOOD}" if found.get("last_good") else ""
        self.reporter.say(f"step {progress.step}: {what}; its text is in {self.file}{kept}")
