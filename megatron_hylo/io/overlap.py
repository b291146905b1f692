"""Writing and hashing behind the thread that reads and computes, with a bound on the bytes that wait."""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Buffer, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

WAITING_BYTES = 2**28  # read but not yet written; a group of tensors larger than this waits alone
BLOCK_BYTES = 2**22  # written at a time
DIRECT = getattr(os, "O_DIRECT", 0)
LARGE_BYTES = 2**20  # hashed by another thread than writes it; less would take longer to hand over


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
            """Wait for the tasks before it, whose first error is raised, then run this one."""
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


class NewFile:
    """A new file: a stream with `write`, for one thread at a time.

    Its bytes go to the disk past the page cache where the file system allows it (O_DIRECT), in whole blocks: there they would
    take a copy and memory that others use, the source among them, and the kernel would write them later all the same.

    Args:
        path: of the file; a former one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.block, self.filled = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8), 0  # begins with a page, as O_DIRECT asks
        try:
            self.file = open(path, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags | DIRECT, 0o666))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.file = open(path, "wb", buffering=0)  # a file system without it

    def write(self, data: Buffer) -> int:
        """Write all bytes of a buffer.

        Raises:
            OSError: the disk is full, a quota or a limit is spent; it names the file.
        """
        values, done = np.asarray(memoryview(data).cast("B")), 0
        while done < len(values):
            count = min(len(values) - done, BLOCK_BYTES - self.filled)
            self.block[self.filled : self.filled + count] = values[done : done + count]
            done, self.filled = done + count, self.filled + count
            if self.filled == BLOCK_BYTES:
                self._write_block()
        self.bytes += done
        return done

    def _write_block(self) -> None:
        rest = memoryview(self.block)[: self.filled]
        try:
            while len(rest):
                try:
                    rest = rest[self.file.write(rest) :]
                except OSError as error:  # a file system that wants other sizes, or a limit in the middle of a block
                    if error.errno != errno.EINVAL or not self._use_page_cache():
                        raise
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.filled = 0

    def _use_page_cache(self) -> bool:
        """Write the rest as usual; False if that was so before."""
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL)
        fcntl.fcntl(self.file, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Do nothing: blocks are written when they are full."""

    def close(self) -> dict[str, Any]:
        """Close the file once its bytes are on the disk; returns its entry for a manifest.

        Raises:
            OSError: see `write`.
        """
        self._use_page_cache()
        self._write_block()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.bytes}


class HashedFile(NewFile):
    """A new file whose sha256 is taken while it is written; entry {"bytes", "sha256"}."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.digest = hashlib.sha256()
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def write(self, data: Buffer) -> int:
        """Write and hash all bytes of a buffer; see `NewFile`."""
        view = memoryview(data).cast("B")
        if len(view) < LARGE_BYTES:
            self.digest.update(view)
            return super().write(view)
        hashed = self.beside.submit(self.digest.update, view)
        try:
            return super().write(view)
        finally:
            hashed.result()  # the buffer is the caller's again

    def close(self) -> dict[str, Any]:
        """Close the file; see `NewFile`."""
        self.beside.shutdown()
        return super().close() | {"sha256": self.digest.hexdigest()}


class PartsFile(NewFile):
    """A new file whose large contents are hashed elsewhere; entry {"bytes", "parts", "sha256"} (see `io._manifests`)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parts: list[tuple[int, Callable[[], bytes]]] = []  # bytes of each finished part, its digest once it is known
        self.open = hashlib.sha256()  # of what was written behind them
        self.begun = 0  # where that begins
        self.known: tuple[int, Callable[[], bytes]] | None = None

    @contextlib.contextmanager
    def hashed_elsewhere(self, size: int, digest: Callable[[], bytes]) -> Iterator[None]:
        """Context in which one buffer of `size` bytes is written, which is not hashed here if it is large.

        Args:
            size: of the buffer.
            digest: gives its sha256; called when the file is closed.
        """
        self.known = (size, digest) if size >= LARGE_BYTES else None
        try:
            yield
        finally:
            self.known = None

    def write(self, data: Buffer) -> int:
        """Write all bytes of a buffer, and hash those of which no hash is known; see `NewFile`."""
        view = memoryview(data).cast("B")
        if self.known is None or self.known[0] != len(view):
            self.open.update(view)
            return super().write(view)
        self._end_part()
        written = super().write(view)
        self.parts.append(self.known)
        self.known, self.begun = None, self.bytes
        return written

    def _end_part(self) -> None:
        if self.bytes > self.begun:
            self.parts.append((self.bytes - self.begun, self.open.digest))
            self.open, self.begun = hashlib.sha256(), self.bytes

    def close(self) -> dict[str, Any]:
        """Close the file; see `NewFile`."""
        self._end_part()
        whole = hashlib.sha256(b"".join(digest() for _, digest in self.parts))
        return super().close() | {"parts": [size for size, _ in self.parts], "sha256": whole.hexdigest()}
