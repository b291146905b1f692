"""Progress of long-running functions on stderr: a bar on a terminal, else a plain line at most every ten seconds.

Functions take a `track` argument and call `track(items, description)`; `show_progress` displays it. A loop inside another one
refines the outer one's share and has no display of its own.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from megatron_hylo.io._ranks import is_launched_first

Track = Callable[[Iterable, str], Iterable]  # (items, description) -> the same items
LINE_SECONDS = 10.0


def no_progress(items: Iterable, description: str) -> Iterable:
    """Return the items unchanged: the default `track` argument, which shows no progress."""
    return items


def show_progress(items: Iterable, description: str) -> Iterator[Any]:
    """Yield the items and show on stderr which share is done and how long the rest takes; torchrun's main rank alone shows it.

    Args:
        items: without a length they are listed first.
        description: of the whole loop.
    """
    sized = items if isinstance(items, Collection) else list(items)
    loop = _Loop(description, len(sized))
    _loops.append(loop)
    try:
        if len(_loops) == 1 and is_launched_first():
            loop.display = _Bar(loop) if sys.stderr.isatty() else _Lines(loop)
        for item in sized:
            yield item
            loop.done += 1
            _update()
    finally:
        _loops.remove(loop)
        if loop.display is not None:
            loop.display.close()


class _Loop:
    """One loop whose progress is counted."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.done, self.total = description, 0, total
        self.shown = 0.0  # largest share so far: several inner loops of one step each start at 0
        self.display: _Bar | _Lines | None = None


_loops: list[_Loop] = []  # outermost first


def _update() -> None:
    share = 0.0
    for loop in reversed(_loops):
        share = (loop.done + share) / max(1, loop.total) if loop.done < loop.total else 1.0
    outermost = _loops[0]
    outermost.shown = max(outermost.shown, share)
    if outermost.display is not None:
        outermost.display.update(outermost.shown)


class _Bar:
    """A bar on a terminal, which goes when the loop ends."""

    def __init__(self, loop: _Loop) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(loop.description, total=1.0)
        self.progress.start()

    def update(self, share: float) -> None:
        """Set the share that is done."""
        self.progress.update(self.task, completed=share)

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()


class _Lines:
    """Plain lines for logs: one at the start, then one at most every LINE_SECONDS, and the duration of a long loop."""

    def __init__(self, loop: _Loop) -> None:
        self.loop, self.started = loop, time.monotonic()
        self.last = self.started
        self._print(f"{loop.description} ...")

    def update(self, share: float) -> None:
        """Print the share and the time left, if the last line is old enough."""
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS and 0 < share < 1:
            self.last = now
            self._print(f"{self.loop.description}: {share:.0%}, {_clock((now - self.started) * (1 - share) / share)} left")

    def close(self) -> None:
        """Print how long a loop took that had more than its first line."""
        if self.last > self.started and self.loop.done == self.loop.total:
            self._print(f"{self.loop.description}: done in {_clock(time.monotonic() - self.started)}")

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
