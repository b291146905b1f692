"""Output locks: a lock file beside each output, released by the kernel when the process that holds it ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io._files import can_write, check_place, plain_os_errors
from megatron_hylo.io._ranks import distributed, is_launched_first, on_main

logger = logging.getLogger("megatron_hylo.io")
HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # from file systems without locks
GLANCE_SECONDS = 10.0  # for how long `read_lock` of other processes may be in the way: microseconds, unless they have to wait
_held: set[Path] = set()  # outputs locked by this process or, with several ranks, by rank 0


@contextlib.contextmanager
def output_lock(path: str | Path | None) -> Iterator[None]:
    """Context that holds an exclusive lock on an output and everything inside it.

    With several ranks, rank 0 holds the lock. Nothing is done where this process already holds a lock on the path or one of its
    parents. Locks work between machines if the file system supports flock, as NFS and Lustre (mounted with -o flock) do; a
    warning is logged where it does not.

    Args:
        path: the output, which need not exist; None locks nothing.

    Raises:
        ConfigError: another process, which the message names, holds the lock; or the path cannot be written.
    """
    place = None if path is None else Path(os.path.realpath(path))
    if place is None or not _held.isdisjoint((place, *place.parents)):
        yield
        return
    with contextlib.ExitStack() as held:
        alone = distributed() is None
        if alone and is_launched_first():  # before the process group is initialised
            held.enter_context(_locked(place))
        elif not alone:
            on_main(lambda: held.enter_context(_locked(place)) and None)
        _held.add(place)
        held.callback(_held.discard, place)
        yield


@dataclass(frozen=True)
class LockState:
    """Lock of an output as another process sees it.

    Args:
        held: whether a process holds it; None where the file system cannot tell. A lock that is not held, but whose file is
            there, was left by a process that was killed.
        own: whether it is of the output itself; otherwise of a folder that holds it.
        about: {"host", "pid", "since", "command"} of the process that wrote the file.
    """

    held: bool | None
    own: bool
    about: dict[str, Any]


def read_lock(path: str | Path) -> LockState | None:
    """Look whether a process writes an output or a folder that holds it; nothing is written.

    Args:
        path: the output.

    Returns:
        State of the lock; None where there is no lock file.
    """
    place = Path(os.path.realpath(path))
    for output in (place, *place.parents[:-1]):
        for file in (output.parent / f".{output.name}.lock", output / ".lock"):
            with contextlib.suppress(OSError):
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if "pid" in (about := _about(descriptor)):  # else it is another program's
                        return LockState(_is_held(descriptor), output == place, about)
                finally:
                    os.close(descriptor)
    return None


def _is_held(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD_ELSEWHERE else None
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Context in which the lock file exists and is locked; created parent directories are removed again if empty."""
    if os.path.isdir(place) and not can_write(place.parent):  # the user may own a run's folder but not its parent
        file, made = place / ".lock", []
    else:
        check_place(place)
        file, made = place.parent / f".{place.name}.lock", [p for p in place.parents if not p.exists()]
    try:
        with plain_os_errors():
            file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = None
        try:
            with plain_os_errors():
                descriptor = _acquire(file, place)
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.unlink(file)  # before unlocking, so that no process locks a file whose name is gone
                os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _acquire(file: Path, place: Path) -> int | None:
    """Lock a file and return its descriptor; None where the file system does not support locks."""
    patience = time.monotonic() + GLANCE_SECONDS
    while True:
        descriptor, writable = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder, shared = _holder(descriptor), _is_held(descriptor) is False
            os.close(descriptor)
            if error.errno in HELD_ELSEWHERE:
                if shared and time.monotonic() < patience:  # by others in `read_lock`; who writes holds it alone
                    time.sleep(0.01)
                    continue
                raise ConfigError(
                    f"{place} is being written by {holder}; wait for it or stop it, or choose another output"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: no locks on this file system; see to it that no other process writes %s", file.parent, place)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):  # else its former holder has just removed it
                if writable:
                    break
                os.unlink(file)  # left behind by another user's killed process
        os.close(descriptor)
    about = {"host": platform.node(), "pid": os.getpid(), "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
             "command": " ".join(sys.argv)}  # fmt: skip
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
        os.fsync(descriptor)
    except BaseException:  # an interrupt: nobody else would remove the file
        with contextlib.suppress(OSError):
            os.unlink(file)
        os.close(descriptor)
        raise
    return descriptor


def _open(file: Path) -> tuple[int, bool]:
    """Open the lock file; return the descriptor and whether it is writable (a file left by another user may be read-only)."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(file, flags | os.O_RDWR | os.O_CREAT, 0o666), True
    except PermissionError:
        return os.open(file, flags | os.O_RDONLY), False


def _about(descriptor: int) -> dict[str, Any]:
    try:
        about = json.loads(os.pread(descriptor, 2**16, 0))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _holder(descriptor: int) -> str:
    about = _about(descriptor)
    try:
        return f"process {about['pid']} on {about['host']} since {about['since']} ({about['command']})"
    except KeyError:
        return "another process"
