"""One process a time for one output: a lock file beside it, which the kernel releases when its holder ends, however it does."""

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
from megatron_hylo.io._ranks import distributed, on_main

logger = logging.getLogger("megatron_hylo.io")
HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of a file system
_held: set[Path] = set()  # outputs that this process (or, of several ranks, their rank 0) has locked


@contextlib.contextmanager
def output_lock(path: str | Path | None) -> Iterator[None]:
    """Keep other processes away from an output, and from all in it, while this one works on it.

    Of several ranks rank 0 holds the lock. Where this process has locked the folder or one above it, nothing more is done.
    Locks work among machines where the file system passes flock on, as NFS and Lustre (mounted with -o flock) do; where it
    knows no locks a warning is logged.

    Args:
        path: of the output, which need not be there; None: nothing is locked.

    Raises:
        ConfigError: another process has it; says which. Or nothing can be written there.
    """
    place = None if path is None else Path(os.path.realpath(path))
    if place is None or not _held.isdisjoint((place, *place.parents)):
        yield
        return
    with contextlib.ExitStack() as held:
        alone = distributed() is None
        if alone and os.environ.get("RANK", "0") == "0":  # before ranks know one another
            held.enter_context(_locked(place))
        elif not alone:
            on_main(lambda: held.enter_context(_locked(place)) and None)
        _held.add(place)
        held.callback(_held.discard, place)
        yield


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Make the lock file, and the folders it is in, for as long as this takes."""
    if os.path.isdir(place) and not can_write(place.parent):  # a run's folder, which one may own where one cannot make others
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
                    os.unlink(file)  # while it is locked, so that nobody holds a lock on a name that is gone
                os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def _acquire(file: Path, place: Path) -> int | None:
    """Descriptor of the locked file; None where the file system knows no locks."""
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
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):  # else its former holder has removed it just now
                if writable:
                    break
                os.unlink(file)  # left by another user's process that was killed
        os.close(descriptor)
    about = {"host": platform.node(), "pid": os.getpid(), "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
             "command": " ".join(sys.argv)}  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode())
    os.fsync(descriptor)
    return descriptor


def _open(file: Path) -> tuple[int, bool]:
    """A descriptor, and whether it can be written: a lock file left by another user may only be read."""
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
