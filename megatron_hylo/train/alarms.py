"""Alarms of a run: a loss or gradient norm far above those before it, kept with the text of that step.

A dataset keeps no names of documents, so an alarm keeps the numbers of its windows and how each begins.
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
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.callback import Callback, Progress
from megatron_hylo.train.reporting import Reporter

ALARMS = "alarms.jsonl"
LIMITS = {"loss": 1.5, "gradient_norm": 5.0}  # times the median of the steps before
REMEMBERED, NEEDED = 100, 20  # steps whose median is taken; fewer make no alarm
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
    """Records steps whose loss or gradient norm jumps up in RUN/alarms.jsonl, with the beginnings of their windows.

    Args:
        run: run folder.
        reporter: tells of an alarm.
        texts: how the windows [first, last) of the training text begin.
        batch: windows a step.
    """

    def __init__(self, run: Path, reporter: Reporter, texts: Callable[[int, int], list[str]], batch: int) -> None:
        self.file, self.reporter, self.texts, self.batch = run / ALARMS, reporter, texts, batch
        self.before: dict[str, deque[float]] = {name: deque(maxlen=REMEMBERED) for name in LIMITS}

    def after_step(self, progress: Progress) -> None:
        """Compare the step with those before it."""
        if not is_main():
            return
        for name, limit in LIMITS.items():
            value, before = progress.metrics.get(name), self.before[name]
            if value is None or value != value:  # a skipped step, which the NaN guard tells of
                continue
            if len(before) >= NEEDED and value > limit * (median := statistics.median(before)) > 0:
                self._tell(progress, name, value, median)
            before.append(value)

    def _tell(self, progress: Progress, name: str, value: float, median: float) -> None:
        first, last = progress.consumed - self.batch, progress.consumed
        found: dict[str, Any] = {
            "step": progress.step, "time": round(time.time(), 3), "metric": name, "value": value, "median": median,
            "windows": [first, last], "texts": self.texts(first, min(last, first + MOST_WINDOWS)),
        }  # fmt: skip
        with open(self.file, "a") as file:
            file.write(json.dumps(found) + "\n")
        self.reporter.say(
            f"step {progress.step}: {name.replace('_', ' ')} {value:.4g} is {value / median:.1f} times the median of the steps "
            f"before; its text is in {self.file}"
        )
