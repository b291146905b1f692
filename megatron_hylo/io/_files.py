"""Operations on single files: JSON with clear errors, sha256, checks of writable paths, and messages for OS errors."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home

READ_BYTES = 2**20  # bytes hashed at a time: as many as stay in a core's cache
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a spent quota, a file-size limit
ADVICE = {
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of that path is a file: choose another place",
    errno.EISDIR: "a file is wanted there: give another path",
    errno.EEXIST: "something else is there: remove it, or choose another place",
    errno.ENOTEMPTY: "something else is there: remove it, or choose another place",
    errno.ENOENT: "look at the path",
    errno.ELOOP: "its symbolic links lead in a circle: give another path",
    errno.ESTALE: "the file system changed underneath: run again",
    errno.EIO: "the disk or the network file system fails: look at the system's log",
    errno.EMFILE: "allow more open files (ulimit -n)",
} | dict.fromkeys(NO_SPACE, "make space, or look at your quota, and run again")


class DamagedError(RuntimeError):
    """A file or directory does not have the content that was written; the message names the file."""


@contextlib.contextmanager
def plain_os_errors() -> Iterator[None]:
    """Turn an operating system's refusal (permission denied, read-only, name too long, ...) into a one-sentence ConfigError."""
    try:
        yield
    except Exception as error:
        number = _os_error_number(error)
        if number not in ADVICE:
            raise
        name = getattr(error, "filename", None)
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
        raise ConfigError(f"{where}{os.strerror(number).lower()}; {ADVICE[number]}") from error


def _os_error_number(error: Exception) -> int | None:
    """The errno of an OSError, or of safetensors' error about one, which has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def cache_dir() -> Path:
    """Return the cache directory, $MEGATRON_HYLO_CACHE or ~/.cache/megatron_hylo, and create it if it is missing.

    Raises:
        ConfigError: the directory cannot be created.
    """
    path = expand_home(os.environ.get("MEGATRON_HYLO_CACHE") or "~/.cache/megatron_hylo")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the cache folder {path} ({error}); set MEGATRON_HYLO_CACHE to another place") from error
    return path


def can_write(folder: Path) -> bool:
    """Whether this process may create files in a directory."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def check_place(path: Path) -> None:
    """Refuse a path at which no directory can be created, before any work is done for it.

    Args:
        path: absolute; may exist.

    Raises:
        ConfigError: a part of the path is a file, its parent cannot be written, or a name is too long.
    """
    if not path.name:
        raise ConfigError(f"{path} cannot be an output; name a folder in it")
    parent = next(p for p in path.parents if os.path.lexists(p))
    if not parent.is_dir():
        raise ConfigError(f"{parent} is a file, so {path} cannot be made; choose another place")
    if not can_write(parent):
        raise ConfigError(f"{path} cannot be made: {parent} cannot be written; change its permissions, or choose another place")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    for part in (*path.relative_to(parent).parts[:-1], f".{path.name}.partial"):
        if len(os.fsencode(part)) > longest:
            raise ConfigError(f"{part[:40]}... is longer than the {longest} bytes that a name may have; choose a shorter name")


def parse_json(content: bytes, file: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Parse the content of a JSON file as an object; see `read_json`.

    Args:
        content: bytes of the file.
        file: for messages.
        needs: keys that must be there.

    Raises:
        DamagedError: it is no JSON, no object, or lacks a key.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{file} is not readable JSON ({error}): it is damaged or cut short; make it again, or restore it from a copy"
        ) from error
    missing = [name for name in needs if not isinstance(value, dict) or name not in value]
    if missing or not isinstance(value, dict):
        what = f"has no {missing[0]!r}" if missing else "is no JSON object"
        raise DamagedError(f"{file} {what}: it is damaged or another program's; make it again, or restore it from a copy")
    return value


def read_json(file: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object from a file that this project wrote.

    Args:
        file: its path.
        needs: required keys.

    Raises:
        ConfigError: the file is missing or cannot be read.
        DamagedError: not JSON, not an object, or a key is missing; the message names the file and says what to do.
    """
    return parse_json(read_bytes(file), file, needs)


def read_bytes(file: Path) -> bytes:
    """Read a small file; an OS error becomes a ConfigError."""
    with plain_os_errors():
        return file.read_bytes()


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically: to a temporary file beside the target, then by rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may write the same file
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)


def sha256(file: Path, count: Callable[[int], None] = lambda _: None, parts: Sequence[int] | None = None) -> str:
    """Return the hexadecimal sha256 of a file, or of the sha256 of its parts.

    Args:
        file: its path.
        count: progress callback, called with the number of bytes read since its last call.
        parts: bytes of each part; the result is the sha256 of their binary sha256, one behind the other.
    """
    buffer = memoryview(bytearray(min(READ_BYTES, file.stat().st_size + 1)))
    with open(file, "rb", buffering=0) as f:

        def hashed(size: float) -> "hashlib._Hash":
            """Hash the next `size` bytes of the file, or what is left of it."""
            digest = hashlib.sha256()
            while size and (read := f.readinto(buffer[: int(min(size, len(buffer)))])):
                digest.update(buffer[:read])
                count(read)
                size -= read
            return digest

        if parts is None:
            return hashed(math.inf).hexdigest()
        return hashlib.sha256(b"".join(hashed(size).digest() for size in parts)).hexdigest()


def place_file(file: Path, target: Path) -> Path:
    """Give a finished file its name in a new directory on the same disk; the former name stays where links are possible."""
    try:
        os.link(file, target)
    except OSError:
        file.rename(target)
    return target
