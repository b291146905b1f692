"""Folders that are either whole or absent: built beside their place, checked against a manifest, renamed in.

Everything this project writes for later use (converted models, checkpoints, datasets, exports) goes through here.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config import ConfigError

MANIFEST = "manifest.json"
EARLY = ".hashed_"  # files with a part of the manifest to come
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a spent quota, a file-size limit


class DamagedError(RuntimeError):
    """A sealed folder whose content is not what its manifest says; the message names the file."""


@contextlib.contextmanager
def sealed_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; on success it appears at `path` complete with a manifest, else nothing does.

    Every rank of an initialised process group must enter and leave; rank 0 creates, seals and renames, and all
    ranks share the hashing.

    Args:
        path: where the finished folder will be.
        overwrite: replace a folder that is already there (the old one stays until the new one is whole).

    Raises:
        ConfigError: `path` exists and `overwrite` is false, or the disk is full or cannot be written.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.partial"
    check_free(path, overwrite)
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        barrier()
        _write_manifest(partial)
        if _rank() == 0:
            _replace(partial, path)
        barrier()
    except BaseException as error:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise ConfigError(f"the disk is full: {path} was not written; free space and run again") from error
        if _is_failed_writer(error):
            free = shutil.disk_usage(path.parent).free / 1e9
            raise ConfigError(
                f"{path} was not written: a process that writes checkpoints failed, its error is logged above; there are "
                f"{free:,.1f} GB free: make space, or look at your quota, and run again"
            ) from error
        raise


def check_free(path: str | Path, overwrite: bool) -> None:
    """Refuse to replace what is at `path` unasked; `sealed_directory` does, and long work asks before it starts.

    Raises:
        ConfigError: something is there and `overwrite` is false.
    """
    if Path(path).exists() and not overwrite:
        raise ConfigError(f"{path} already exists; choose another place, remove it, or ask to overwrite")


def work_folder(output: Path, pieces: str, key: str, description: dict[str, Any]) -> Path:
    """Where the finished pieces of a folder to come wait beside it, for a writer that is started again; all ranks call it.

    Args:
        output: the folder to come.
        pieces: what they are, for the folder's name.
        key: name of the file that keeps `description`.
        description: of the output; pieces of another are removed.
    """
    work = output.parent / f".{output.name}.{pieces}"
    if _rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        file = work / f"{key}.json"
        if not file.is_file() or json.loads(file.read_text()) != description:
            for old in work.iterdir():
                old.unlink()
            write_json(file, description)
    barrier()
    return work


def hash_early(folder: Path, files: Iterable[Path]) -> None:
    """Hash complete files of a folder that is still being written, for its manifest; any rank, any thread.

    Args:
        folder: what `sealed_directory` yielded.
        files: inside it; they must not change any more.
    """
    write_json(folder / f"{EARLY}{_rank()}_{threading.get_ident()}", {str(f.relative_to(folder)): _entry(f) for f in files})


def verify_sealed(path: str | Path, hashes: bool = True) -> None:
    """Check a sealed folder against its manifest.

    Args:
        path: the folder.
        hashes: also compare every file's sha256, not only its size.

    Raises:
        ConfigError: there is no such folder, or it has no manifest.
        DamagedError: a file is missing, has another size, or other content.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise ConfigError(f"{path} is not a finished megatron_hylo folder: it has no {MANIFEST}")
    for name, entry in json.loads((path / MANIFEST).read_text())["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing; the folder is damaged, make it again or take another checkpoint")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{file} has {size} bytes, its manifest says {entry['bytes']}: damaged")
        if hashes and sha256(file) != entry["sha256"]:
            raise DamagedError(f"{file} does not have the sha256 of its manifest: damaged")


def is_sealed(path: str | Path) -> bool:
    """True where a finished folder is (not whether its content is intact)."""
    return (Path(path) / MANIFEST).is_file()


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, through a file beside it so that readers never see half."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)


def _write_manifest(folder: Path) -> None:
    known = {name: entry for part in folder.glob(f"{EARLY}*") for name, entry in json.loads(part.read_text()).items()}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(EARLY)]
    files = [p for p in files if str(p.relative_to(folder)) not in known]
    mine = (known if _rank() == 0 else {}) | {str(p.relative_to(folder)): _entry(p) for p in files[_rank() :: _world_size()]}
    parts = [mine]
    if _world_size() > 1:
        parts = [None] * _world_size()
        torch.distributed.all_gather_object(parts, mine)
    if _rank() == 0:
        merged = {name: entry for part in parts for name, entry in part.items()}
        for part in folder.glob(f"{EARLY}*"):
            part.unlink()
        write_json(folder / MANIFEST, {"files": dict(sorted(merged.items()))})


def _entry(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _replace(partial: Path, path: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    if path.exists() and _exchange(partial, path):
        shutil.rmtree(partial)  # the old one
    elif path.exists():
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that both names are there at any moment; False where the file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return swap is not None and swap(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in NO_SPACE or any(os.strerror(number) in str(error) for number in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_failed_writer(error: BaseException) -> bool:
    """Megatron-Core gathers what went wrong on all ranks and says no more of it than the class."""
    return type(error).__name__ == "CheckpointException"


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if _world_size() > 1:
        torch.distributed.barrier()
