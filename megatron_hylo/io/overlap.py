"""Writing and hashing behind the thread that reads and computes, with a bound on the bytes that wait."""

import hashlib
import os
from collections import deque
from collections.abc import Buffer, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

WAITING_BYTES = 2**28  # read but not yet written; a group of tensors larger than this waits alone
LARGE_BYTES = 2**20  # hashed while it is written; less would take longer to hand over


class Overlap:
    """Lanes beside the calling thread that write, hash and finish files; each keeps the order of its tasks.

    Args:
        limit: bytes that may wait, by default WAITING_BYTES. `add` blocks above it until the oldest are done.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.waiting = WAITING_BYTES if limit is None else limit, 0
        self.lanes = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "hash", "finish")}
        self.tasks: deque[tuple[int, list[Future[Any]]]] = deque()

    def __enter__(self) -> "Overlap":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for lane in self.lanes.values():  # after an error or Ctrl-C too: files of which all was read are kept
            lane.shutdown(wait=True)

    def add(self, size: int, **tasks: Callable[[], Any]) -> list[Future[Any]]:
        """Queue tasks on the same `size` bytes: `write` and `hash`, either or both.

        Returns:
            Their futures, for `finish`.

        Raises:
            Exception: that of an earlier task.
        """
        while self.tasks and self.waiting + size > self.limit:
            self._finish_oldest()
        futures = [self.lanes[name].submit(task) for name, task in tasks.items()]
        self.tasks.append((size, futures))
        self.waiting += size
        return futures

    def finish(self, task: Callable[[], Any], after: Sequence[Future[Any]]) -> None:
        """Queue the end of a file, which waits for the disk, behind tasks on it; an error of theirs takes its place."""

        def run() -> None:
            for future in after:
                future.result()
            task()

        self.add(0, finish=run)

    def drain(self) -> None:
        """Wait for all tasks; raises the exception of the first that failed."""
        while self.tasks:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        size, futures = self.tasks.popleft()
        self.waiting -= size
        for future in futures:
            future.result()


class HashedFile:
    """A new file that is hashed while it is written: a stream with `write`, for one thread at a time.

    Args:
        path: of the file; a former one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.digest = path, 0, hashlib.sha256()
        self.file = open(path, "wb", buffering=0)
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def write(self, data: Buffer) -> int:
        """Write all bytes of a buffer.

        Raises:
            OSError: the disk is full, a quota or a limit is spent; it names the file.
        """
        view = memoryview(data).cast("B")
        size, done = len(view), 0
        hashed = self.beside.submit(self.digest.update, view) if size >= LARGE_BYTES else None
        try:
            while done < size:
                done += self.file.write(view[done:])
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            if hashed is not None:
                hashed.result()  # the buffer is the caller's again
        if hashed is None:
            self.digest.update(view)
        self.bytes += size
        return size

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def close(self) -> dict[str, int | str]:
        """Close the file once its bytes are on the disk; returns its entry for a manifest, {"bytes", "sha256"}."""
        self.beside.shutdown()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}
