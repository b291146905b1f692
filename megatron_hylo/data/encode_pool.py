"""Encoders on all cores: processes that each encode a batch at a time, results in the order of the batches.

The processes are started by name, so that neither a fork of a process with threads nor an import of the caller's script is
needed, and end when their standard input does, so with a killed parent.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import megatron_hylo
from megatron_hylo.data.encode import DocumentEncoder, Encoded, EncoderSettings, Spans

AHEAD = 2  # batches a process that are read before their results are asked for


class Batch(Protocol):
    """Texts to encode."""

    @property
    def texts(self) -> list[str]:
        """Texts, one a document."""

    @property
    def answers(self) -> list[Spans | None] | None:
        """Places of the answers in each text, in characters; None: all of it is learnt."""


B = TypeVar("B", bound=Batch)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_batches(batches: Iterable[B], settings: EncoderSettings, processes: int) -> Generator[tuple[B, Encoded]]:
    """Each batch with its ids, in order.

    Args:
        batches: read in this process, some ahead.
        settings: of the encoders.
        processes: 1 encodes in this one.
    """
    if processes <= 1:
        encoder = DocumentEncoder(settings)
        for batch in batches:
            yield batch, encoder.encode(batch.texts, batch.answers)
        return
    children: list[_Child] = []
    free: SimpleQueue[_Child] = SimpleQueue()
    try:
        for _ in range(processes):
            children.append(_Child(settings))
            free.put(children[-1])

        def encode(batch: B) -> Encoded:
            """Encode a batch in the next child process that is free."""
            child = free.get()
            try:
                return child.encode(batch)
            finally:
                free.put(child)

        with ThreadPoolExecutor(processes) as threads:
            waiting: deque = deque()
            try:
                for batch in batches:
                    waiting.append((batch, threads.submit(encode, batch)))
                    if len(waiting) >= AHEAD * processes:
                        first, result = waiting.popleft()
                        yield first, result.result()
                while waiting:
                    first, result = waiting.popleft()
                    yield first, result.result()
            finally:
                for _, result in waiting:
                    result.cancel()
    finally:
        for child in children:
            child.close()


class _Child:
    """A process that encodes."""

    def __init__(self, settings: EncoderSettings) -> None:
        root = str(Path(megatron_hylo.__path__[0]).parent)
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._send(settings)

    def encode(self, batch: Batch) -> Encoded:
        """Ids of a batch.

        Raises:
            RuntimeError: the process has ended, killed for its memory perhaps.
        """
        try:
            self._send((batch.texts, batch.answers))
            found = pickle.load(self.process.stdout)  # type: ignore[arg-type]  # a pipe was asked for
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a process that encodes text has ended with status {self.process.wait()}: it was killed, or memory is short; "
                f"run again, with fewer processes (--workers) where memory is short"
            ) from error
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]  # a pipe was asked for
            except OSError:
                pass
        self.process.kill()
        self.process.wait()

    def _send(self, value: Any) -> None:
        stream: Any = self.process.stdin
        pickle.dump(value, stream, protocol=5)
        stream.flush()


def main() -> None:
    """Encode what comes in until it ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    encoder = DocumentEncoder(pickle.load(source))
    while True:
        try:
            texts, answers = pickle.load(source)
        except EOFError:
            return
        try:
            found: Any = encoder.encode(texts, answers)
        except Exception as error:  # raised where the batch is waited for
            found = error
        pickle.dump(found, target, protocol=5)
        target.flush()


if __name__ == "__main__":
    main()
