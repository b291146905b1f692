"""Seconds of a rank's own work in a step, by phase, before it waits for the other ranks."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

DATA, PASSES = "data", "passes"  # reading batches; forward and backward passes until gradients are reduced


class Phases:
    """Seconds of a rank's own work by phase, since they were last taken.

    Args:
        device: of this rank; on a GPU the passes are timed by events of its stream, without waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.begun: dict[str, Any] = {}
        self.events: list[tuple[str, Any, Any]] = []

    def begin(self, phase: str) -> None:
        """Note the begin of a phase; one of the stream's in a captured CUDA graph is left out."""
        self.begun[phase] = self._now(phase)

    def end(self, phase: str) -> None:
        """Note the end of a phase that was begun."""
        begun, now = self.begun.pop(phase, None), self._now(phase)
        if begun is None or now is None:
            return
        if isinstance(begun, float):
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - begun
        else:
            self.events.append((phase, begun, now))

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Context that is a phase."""
        self.begin(phase)
        yield
        self.end(phase)

    def _now(self, phase: str) -> Any:
        if not self.on_gpu or phase == DATA:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        for phase, begun, ended in self.events:
            ended.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + begun.elapsed_time(ended) / 1e3
        taken, self.seconds, self.events = self.seconds, {}, []
        return taken
