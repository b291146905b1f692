"""Shorter starts and ends of a process that imports PyTorch, and a look at whether it should start at all."""

import contextlib
import gc
import os
from collections.abc import Iterator

STOP_FILE = "HYLO_STOP_FILE"  # environment variable of slurm/'s scripts: a file that is there once the run is to stop


def stop_asked() -> bool:
    """Whether the scripts that started this process have asked for its stop: before it could take a signal, perhaps."""
    return os.path.exists(os.environ.get(STOP_FILE, ""))


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Context without garbage collection, for imports alone: a fifth of their time goes into collections that find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def use_huge_pages() -> None:
    """Let PyTorch ask for huge pages for large CPU tensors, which are then filled three times as fast; before its import.

    For verbs that read and write each weight once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def quick_exit() -> None:
    """Take all objects out of the interpreter's last collections, which walk half a million for a second."""
    gc.freeze()
