"""Ranks of one run that share folders: what one of them finds, all of them must know."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def distributed() -> Any | None:
    """torch.distributed where a process group is initialised; a program that has not imported torch has none."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def rank() -> int:
    """Rank in an initialised process group, else 0."""
    group = distributed()
    return group.get_rank() if group else 0


def world_size() -> int:
    """Ranks of an initialised process group, else 1."""
    group = distributed()
    return group.get_world_size() if group else 1


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if world_size() > 1:
        distributed().barrier()


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank; all ranks call it."""
    if world_size() == 1:
        return [value]
    found: list = [None] * world_size()
    distributed().all_gather_object(found, value)
    return found


def on_main(function: Callable[[], T]) -> T:
    """Run a function on rank 0; every rank returns its result or raises its error. All ranks call it."""
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    distributed().broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
