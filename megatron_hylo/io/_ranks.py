"""Collectives on small Python objects, so that all ranks of a run agree on the state of shared directories."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")


def is_launched_first() -> bool:
    """Return whether this process is torchrun's rank 0, or alone; known before a process group is initialised."""
    return os.environ.get("RANK", "0") == "0"


def launched_ranks() -> int:
    """Return how many ranks torchrun started, 1 without it; known before a process group is initialised."""
    return int(os.environ.get("WORLD_SIZE") or 1)  # empty: unset


def distributed() -> Any | None:
    """Return torch.distributed where a process group is initialised, else None; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def rank() -> int:
    """Return the rank in an initialised process group, else 0."""
    group = distributed()
    return group.get_rank() if group else 0


def world_size() -> int:
    """Return the size of an initialised process group, else 1."""
    group = distributed()
    return group.get_world_size() if group else 1


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    group = distributed()
    if group is not None and group.get_world_size() > 1:
        group.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Context that the other ranks enter once rank 0 has left it, and so find what it put into a shared cache."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def gather(value: T) -> list[T]:
    """Return every rank's `value`, in rank order; all ranks call it."""
    group = distributed()
    if group is None or group.get_world_size() == 1:
        return [value]
    found: list = [None] * group.get_world_size()
    group.all_gather_object(found, value)
    return found


def on_main(function: Callable[[], T]) -> T:
    """Run a function on rank 0; every rank returns its result or raises its error. All ranks call it."""
    group = distributed()
    if group is None or group.get_world_size() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    group.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all(function: Callable[[], T]) -> list[T]:
    """Run a function on every rank; each returns all results in rank order, or raises its own error or the first one's.

    All ranks call it, so that none waits in a later collective for one that failed.
    """
    value, error = None, None
    try:
        value = function()
    except Exception as caught:
        error = caught
    found = gather((value, error))
    if raised := next((e for _, e in found if e is not None), None):
        raise error or raised
    return [cast(T, v) for v, _ in found]
