"""Shorter starts and ends of a process that imports PyTorch, and a look at whether it should start at all."""

import contextlib
import ctypes
import functools
import gc
import os
import types
from collections.abc import Iterator
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
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


@contextlib.contextmanager
def model_imports() -> Iterator[None]:
    """`quick_imports` for modules that import Megatron-Core: its decorators torch.compile compile when a function is called.

    Each would import torch's compiler at once, which takes a third of the time; most verbs call none of these functions.
    """
    with quick_imports():
        import torch

    module: Any = torch
    compile_now = module.compile

    def when_called(model: Any = None, **settings: Any) -> Any:
        """Stand in for torch.compile: a function is compiled at its first call, anything else at once."""
        if model is None:
            return functools.partial(when_called, **settings)
        if not isinstance(model, types.FunctionType):
            return compile_now(model, **settings)
        compiled = functools.cache(lambda: compile_now(model, **settings))
        return functools.wraps(model)(lambda *given, **named: compiled()(*given, **named))

    module.compile = when_called
    try:
        with quick_imports():
            yield
    finally:
        module.compile = compile_now


def reuse_memory() -> None:
    """Let large CPU tensors be filled quickly: in huge pages, and in the memory of former ones; before PyTorch's import.

    For verbs that read and write each weight once. The C library would give the memory of a freed tensor back, and the kernel
    would clear it for the next one: that took as long as all else that the reading thread does.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if set_option is not None:
        set_option(M_MMAP_MAX, 0)  # no mapping of its own for a large block
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def quick_exit() -> None:
    """Take all objects out of the interpreter's last collections, which walk half a million for a second."""
    gc.freeze()
