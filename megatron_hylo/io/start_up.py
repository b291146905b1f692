"""Shorter starts and ends of a process that imports PyTorch: the garbage collector leaves half a million objects alone."""

import contextlib
import gc
from collections.abc import Iterator


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


def quick_exit() -> None:
    """Take all objects out of the interpreter's last collections, which take a second of a process that is about to end."""
    gc.freeze()
