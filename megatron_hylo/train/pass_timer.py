"""Seconds of a rank's own forward and backward passes, until it waits for the other ranks to reduce gradients."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class PassTimer:
    """Adds up the time between `begin` and `end`, in a captured CUDA graph nothing.

    Args:
        device: of this rank; on a GPU events of its stream are timed, without waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.begun: Any = None
        self.spans: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        """Note the begin of passes."""
        self.begun = self._now()

    def end(self) -> None:
        """Note the end of passes that were begun."""
        begun, self.begun = self.begun, None
        if begun is not None and (now := self._now()) is not None:
            self.spans.append((begun, now))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Context of passes that end before gradients are reduced."""
        self.begin()
        yield
        self.end()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call."""
        spans, self.spans = self.spans, []
        if not self.on_gpu:
            return sum(end - begin for begin, end in spans)
        for _, end in spans[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
