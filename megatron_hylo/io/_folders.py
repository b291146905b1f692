"""Atomic directories: built under a temporary name, completed by a manifest, then renamed into place."""

import contextlib
import ctypes
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
SHARED_SECONDS = 60.0  # within these a network file system shows what another machine wrote
PARTIAL_MANIFEST = ".hashed_"  # prefix of files that hold manifest entries until the manifest is written


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False, sources: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """Yield a directory to write into; on success it appears at `path` with a manifest, on an error nothing does.

    Every rank of an initialised process group must enter and leave; rank 0 creates the directory, writes the manifest and
    renames, and all ranks share the hashing. Directories and files get the modes that the umask allows.

    Args:
        path: location of the finished directory.
        overwrite: replace an existing directory, which stays until the new one is complete.
        sources: files and folders that the content is made from; see `check_free`.

    Raises:
        ConfigError: as `check_free`; another process writes there; the disk is full or cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.parent / f".{path.name}.partial"

    def create() -> None:
        """Make the partial folder, empty."""
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    with output_lock(path):
        check_free(path, overwrite, sources)
        with plain_os_errors():
            on_main(create)
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
    """Raise a one-sentence ConfigError for known reasons why a directory was not written."""
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
    """Refuse an output that cannot be written or would destroy data, before any work is done; all ranks call it.

    Only an empty directory, or one with a manifest and no other files than that lists, is ever replaced. Links, files, other
    directories, and directories that are or contain one of the sources are not, and no output may lie inside a source.

    Args:
        path: the output.
        overwrite: replace an existing directory.
        sources: files and folders that are read; None and missing ones are ignored.

    Raises:
        ConfigError: names the obstacle and what to do.
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
            raise ConfigError(f"{path} already exists; choose another place, remove it, or replace it with --overwrite")
        check_place(path)
        if path.exists():
            _check_ours(path)
            check_apart(path, sources)
        for source in (Path(s) for s in sources if s is not None and Path(s).is_dir()):
            if any(_is_same(folder, os.stat(source)) for folder in path.resolve().parents):
                raise ConfigError(f"{path} lies in what is read ({source}); choose an output outside it")


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
    """Refuse to remove or replace a directory that is or contains one of the sources, links resolved.

    Args:
        path: an existing directory.
        sources: files and folders that are read; None and missing ones are ignored.

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


def remove_atomic_directory(path: Path) -> None:
    """Remove an atomic directory; one with files that its manifest does not list stays, with a warning."""
    stranger = unlisted(path)
    if stranger is not None:
        logger.warning("%s stays: %s was put there by somebody else", path, stranger)
        return
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)  # first, so that a half-removed directory is never taken for a complete one
    shutil.rmtree(old)


def staging_path(output: Path, parts: str) -> Path:
    """Return where `staging_directory` puts finished parts of that kind."""
    return output.parent / f".{output.name}.{parts}"


def staging_directory(output: Path, parts: str, key: str, description: dict[str, Any]) -> Path:
    """Return a directory beside an output for its finished parts, reused when the writer is restarted; all ranks call it.

    Args:
        output: the final directory, which does not exist yet.
        parts: kind of the parts, a suffix of the staging directory's name.
        key: name, without .json, of the file that stores `description`.
        description: JSON-serialisable settings of the output; parts of an output with other settings are removed.

    Raises:
        ConfigError: not all ranks see the directory.
    """
    work = staging_path(output, parts)
    file = work / f"{key}.json"

    def prepare() -> None:
        """Make the directory, and empty it where it was begun with another description."""
        work.mkdir(parents=True, exist_ok=True)
        if _former(file) != description:
            for old in work.iterdir():
                old.unlink()
            write_json(file, description)

    on_main(prepare)
    if unseen := [number for number, seen in enumerate(gather(_appears(file))) if not seen]:
        raise ConfigError(
            f"rank {unseen[0]} does not see {work}, which rank 0 has made; put the output on a disk that all ranks share"
        )
    return work


def _appears(file: Path) -> bool:
    """Wait for a file that another machine may have written: network file systems show it with some delay."""
    deadline = time.monotonic() + (SHARED_SECONDS if world_size() > 1 else 0)
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        os.listdir(file.parent.parent)  # makes NFS look again
        time.sleep(0.5)
    return True


def _former(file: Path) -> dict[str, Any] | None:
    """Read the description of the parts in a staging directory; None if it is unreadable, so that they are made again."""
    with contextlib.suppress(ConfigError, DamagedError):
        return read_json(file)
    return None


def hash_for_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Compute manifest entries of complete files while others are still being written; for any rank and thread.

    Args:
        folder: the directory that `atomic_directory` yielded.
        files: files inside it, which must not change any more.
    """
    record_for_manifest(folder, {str(file.relative_to(folder)): _entry(file) for file in files})


def record_for_manifest(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Record manifest entries by name of files that were hashed while they were written.

    Args:
        folder: the directory that `atomic_directory` yielded.
        entries: by path inside it; each thread of a rank may record once.
    """
    write_json(folder / f"{PARTIAL_MANIFEST}{rank()}_{threading.get_ident()}", entries)


def _write_manifest(folder: Path) -> None:
    known = {name: entry for part in folder.glob(f"{PARTIAL_MANIFEST}*") for name, entry in read_json(part).items()}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(PARTIAL_MANIFEST)]
    files = [p for p in files if str(p.relative_to(folder)) not in known]
    mine = (known if rank() == 0 else {}) | {str(p.relative_to(folder)): _entry(p) for p in files[rank() :: world_size()]}
    parts = gather(mine)
    if rank() == 0:
        merged = {name: entry for part in parts for name, entry in part.items()}
        for part in folder.glob(f"{PARTIAL_MANIFEST}*"):
            part.unlink()
        write_json(folder / MANIFEST, {"files": dict(sorted(merged.items()))})


def _entry(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _set_modes(folder: Path) -> None:
    """Apply the umask's modes in a new directory: temporary files, and copies of them, are readable by their owner only."""
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
    """Remove the replaced directory, now at `old`; if files were added since `check_free`, keep it beside the new one."""
    try:
        _check_ours(old)
    except ConfigError:
        kept = path.parent / f"{path.name}.replaced-{os.getpid()}"
        os.rename(old, kept)
        logger.warning("something was put into %s while it was made anew; the former folder is now %s", path, kept)
    else:
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically, so that both names always exist; False if the file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # Linux: AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in NO_SPACE or any(os.strerror(number) in str(error) for number in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_failed_writer(error: BaseException) -> bool:
    """Whether this is Megatron-Core's summary of write errors on all ranks; its message does not name the causes."""
    return type(error).__name__ == "CheckpointException"
