"""Output locks: a lock file beside each output, released by the kernel when the process that holds it ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.io._files import can_write, check_place, plain_os_errors
from megatron_hylo.io._ranks import distributed, is_launched_first, on_main

logger = logging.getLogger("megatron_hylo.io")
HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # from file systems without locks
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
            descriptor = _acquire(file, place)
        try:
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
    while True:
        descriptor, writable = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in HELD_ELSEWHERE:
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
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode())
    os.fsync(descriptor)
    return descriptor


def _open(file: Path) -> tuple[int, bool]:
    """Open the lock file; return the descriptor and whether it is writable (a file left by another user may be read-only)."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(file, flags | os.O_RDWR | os.O_CREAT, 0o666), True
    except PermissionError:
        return os.open(file, flags | os.O_RDONLY), False


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 2**16, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']} ({about['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
