"""Folders that are either whole or absent: built beside their place, checked against a manifest, renamed in."""

import contextlib
import ctypes
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io._files import (
    ADVICE,
    NO_SPACE,
    DamagedError,
    check_place,
    plain_os_errors,
    read_json,
    sha256,
    write_json,
)
from megatron_hylo.io._locks import output_lock
from megatron_hylo.io._manifests import MANIFEST, has_manifest, unlisted
from megatron_hylo.io._ranks import barrier, gather, on_main, rank, world_size

logger = logging.getLogger("megatron_hylo.io")
EARLY = ".hashed_"  # files with a part of the manifest to come


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False, sources: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """Yield a folder to write into; on success it appears at `path` complete with a manifest, else nothing does.

    Every rank of an initialised process group must enter and leave; rank 0 creates, seals and renames, and all
    ranks share the hashing. Folders and files get the modes that the umask says, whoever made them.

    Args:
        path: where the finished folder will be.
        overwrite: replace a folder that is already there (the old one stays until the new one is whole).
        sources: what is read for it; see `check_free`.

    Raises:
        ConfigError: as `check_free`; another process writes there; the disk is full or cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.parent / f".{path.name}.partial"
    with output_lock(path):
        check_free(path, overwrite, sources)
        with plain_os_errors():
            on_main(lambda: (shutil.rmtree(partial, ignore_errors=True), partial.mkdir(parents=True)))
        try:
            yield partial
            barrier()
            _write_manifest(partial)
            on_main(lambda: _replace(partial, path, overwrite))
        except BaseException as error:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            _explain(error, path)
            raise


def _explain(error: BaseException, path: Path) -> None:
    """Say in one sentence why a folder was not written, where that is known."""
    if _is_disk_full(error):
        raise ConfigError(f"the disk is full: {path} was not written; free space and run again") from error
    if _is_failed_writer(error):
        free = shutil.disk_usage(path.parent).free / 1e9
        raise ConfigError(
            f"{path} was not written: a process that writes checkpoints failed, its error is logged above; there are "
            f"{free:,.1f} GB free: make space, or look at your quota, and run again"
        ) from error
    if isinstance(error, OSError) and error.errno in ADVICE:
        raise ConfigError(f"{path} was not written: {error}; {ADVICE[error.errno]}") from error


def check_free(path: str | Path, overwrite: bool, sources: Sequence[str | Path | None] = ()) -> None:
    """Refuse an output that cannot be written or would destroy something, before the work; all ranks call it.

    What may be replaced is a folder that this project finished and that nothing was put into since, or an empty one. Not a
    link, a file, a folder of anything else, and none that is, holds or lies in something that is read.

    Args:
        path: of the output.
        overwrite: replace what is there.
        sources: files and folders that are read; None and what is not there are left out.

    Raises:
        ConfigError: what is in the way, and what to do.
    """
    on_main(lambda: _check_free(Path(os.path.abspath(path)), overwrite, sources))


def _check_free(path: Path, overwrite: bool, sources: Sequence[str | Path | None]) -> None:
    with plain_os_errors():
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a symbolic link to {os.readlink(path)}, which is not replaced; give the folder itself, or another"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file, and a folder is to be made there; choose another place, or remove it")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} already exists; choose another place, remove it, or ask to overwrite")
        check_place(path)
        if path.exists():
            _check_ours(path)
            check_apart(path, sources)
            for source in (Path(s) for s in sources if s is not None and Path(s).is_dir()):
                if any(_is_same(folder, os.stat(source)) for folder in path.resolve().parents):
                    raise ConfigError(f"{path} lies in what is read ({source}), so it is not replaced; choose another output")


def _check_ours(path: Path) -> None:
    if not any(path.iterdir()):
        return
    if not has_manifest(path):
        raise ConfigError(
            f"{path} was not made by megatron_hylo, or not finished (it has no {MANIFEST}), so it is not overwritten; choose "
            f"another place, or remove it yourself"
        )
    try:
        stranger = unlisted(path)
    except DamagedError as error:
        raise ConfigError(f"{path} is not overwritten: {error}; or remove the folder yourself") from error
    if stranger is not None:
        raise ConfigError(
            f"{path} is not overwritten: {stranger} was put there by somebody else (its {MANIFEST} does not list it); move "
            f"that away, or choose another place"
        )


def check_apart(path: str | Path, sources: Sequence[str | Path | None]) -> None:
    """Refuse to remove or replace a folder that is or holds something that is read, also by way of links.

    Args:
        path: of a folder that is there.
        sources: files and folders that are read; None and what is not there are left out.

    Raises:
        ConfigError: names both.
    """
    mine = os.stat(path)
    for source in (Path(s) for s in sources if s is not None and Path(s).exists()):
        real = source.resolve()
        links = [link.resolve() for link in source.rglob("*") if link.is_symlink()] if source.is_dir() else []
        for place in (real, *links):
            if any(_is_same(folder, mine) for folder in (place, *place.parents)):
                what = "is" if _is_same(real, mine) else "holds"
                raise ConfigError(f"{path} {what} what is read ({source}), so it is not replaced; choose another output")


def _is_same(place: Path, other: os.stat_result) -> bool:
    return place.exists() and os.path.samestat(os.stat(place), other)


def remove_finished(path: Path) -> None:
    """Remove a finished folder of ours; one that something was put into stays, with a warning."""
    stranger = unlisted(path)
    if stranger is not None:
        logger.warning("%s stays: %s was put there by somebody else", path, stranger)
        return
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)  # at once: what is half removed is no finished folder
    shutil.rmtree(old)


def work_folder(output: Path, pieces: str, key: str, description: dict[str, Any]) -> Path:
    """Where the finished pieces of a folder to come wait beside it, for a writer that is started again; all ranks call it.

    Args:
        output: the folder to come.
        pieces: what they are, for the folder's name.
        key: name of the file that keeps `description`.
        description: of the output; pieces of another are removed.
    """
    work = output.parent / f".{output.name}.{pieces}"
    if rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        file = work / f"{key}.json"
        if _former(file) != description:
            for old in work.iterdir():
                old.unlink()
            write_json(file, description)
    barrier()
    return work


def _former(file: Path) -> dict[str, Any] | None:
    """What pieces in a work folder are of; None where that cannot be read, so that they are made again."""
    with contextlib.suppress(ConfigError, DamagedError):
        return read_json(file)
    return None


def hash_early(folder: Path, files: Iterable[Path]) -> None:
    """Hash complete files of a folder that is still being written, for its manifest; any rank, any thread.

    Args:
        folder: what `atomic_directory` yielded.
        files: inside it; they must not change any more.
    """
    write_json(folder / f"{EARLY}{rank()}_{threading.get_ident()}", {str(f.relative_to(folder)): _entry(f) for f in files})


def _write_manifest(folder: Path) -> None:
    known = {name: entry for part in folder.glob(f"{EARLY}*") for name, entry in read_json(part).items()}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(EARLY)]
    files = [p for p in files if str(p.relative_to(folder)) not in known]
    mine = (known if rank() == 0 else {}) | {str(p.relative_to(folder)): _entry(p) for p in files[rank() :: world_size()]}
    parts = gather(mine)
    if rank() == 0:
        merged = {name: entry for part in parts for name, entry in part.items()}
        for part in folder.glob(f"{EARLY}*"):
            part.unlink()
        write_json(folder / MANIFEST, {"files": dict(sorted(merged.items()))})


def _entry(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _set_modes(folder: Path) -> None:
    """Set modes as the umask says in a new folder: temporary files, and copies of them, are readable by their owner alone."""
    allowed = folder.stat().st_mode & 0o777
    for entry in folder.rglob("*"):
        entry.chmod(entry.stat().st_mode & ~0o777 | (allowed if entry.is_dir() else allowed & 0o666))


def _replace(partial: Path, path: Path, overwrite: bool) -> None:
    _set_modes(partial)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
    if not (overwrite and path.exists()):
        os.rename(partial, path)
    elif _exchange(partial, path):
        _discard(partial, path)
    else:
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        _discard(old, path)


def _discard(old: Path, path: Path) -> None:
    """Remove the former folder, now at `old`; if it is not as `check_free` saw it, keep it beside the new one."""
    try:
        _check_ours(old)
    except ConfigError:
        kept = path.parent / f"{path.name}.replaced-{os.getpid()}"
        os.rename(old, kept)
        logger.warning("something was put into %s while it was made anew; the former folder is now %s", path, kept)
    else:
        shutil.rmtree(old)


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
