"""Manifests of finished folders, and the one way to open such a folder: sizes always, hashes once a file and machine.

DIR/manifest.json is {"files": {name: {"bytes", "sha256"}}}. A file whose hash was right is remembered in the cache folder, by
path, inode, size, times of change and the hash, so that the next process need not read it all again. Ranks that see the same
folder share the hashing.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io._files import DamagedError, cache_dir, parse_json, read_bytes, read_json, sha256
from megatron_hylo.io._ranks import gather, rank

logger = logging.getLogger("megatron_hylo.io")
MANIFEST = "manifest.json"
IGNORED = re.compile(r"(^|/)(__pycache__/|\.nfs)")  # made by Python and by NFS clients in a folder that is in use
WORTH_A_WORD = 2 * 10**9  # bytes whose hashing is announced
PROGRESS_SECONDS = 30.0
SETTLED_SECONDS = 2.0  # a file changed later than this ago may change again with the same times
REMEMBERED_DAYS = 90

Entry = dict[str, Any]  # {"bytes": int, "sha256": str}


def has_manifest(path: str | Path) -> bool:
    """True where a finished folder is (not whether its content is intact)."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, Entry]:
    """Entries of a finished folder's manifest, by the file's path inside the folder.

    Raises:
        ConfigError: there is no such folder, or it has no manifest.
        DamagedError: the manifest cannot be read, or is not of this project.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{path} is not a finished megatron_hylo folder: it has no {MANIFEST}")
    files = read_json(file, ("files",))["files"]
    if not _is_ours(files):
        raise DamagedError(f"{file} lists no sizes and hashes: it is damaged or another program's; make the folder again")
    return files


def _is_ours(files: Any) -> bool:
    entries = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str) for e in entries)


def unlisted(path: Path) -> Path | None:
    """A file or link in a finished folder that its manifest does not list, where there is one."""
    listed = read_manifest(path).keys() | {MANIFEST}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if (file.is_symlink() or not file.is_dir()) and name not in listed and not IGNORED.search(name):
            return file
    return None


def read_verified_json(folder: str | Path, name: str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object out of a finished folder, compared with the folder's manifest where that lists it.

    Args:
        folder: which may be without a manifest, being part of another folder or of another program.
        name: of the file.
        needs: keys that must be there.

    Raises:
        ConfigError: it is not there or cannot be read.
        DamagedError: it is not what was written; the message names the file.
    """
    file = Path(folder) / name
    content = read_bytes(file)
    value = parse_json(content, file, needs)
    entry = read_manifest(folder).get(name) if has_manifest(folder) else None
    if entry is not None and hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DamagedError(f"{file} does not have the sha256 of its manifest: {_ADVICE}")
    return value


def verify_manifest_if_any(path: str | Path, only: Sequence[str] = ()) -> None:
    """`verify_manifest` for what need not be ours, a Hugging Face folder or another program's dataset; all ranks call it."""
    file, ours, error = Path(path) / MANIFEST, False, None
    try:
        ours = file.is_file() and _is_ours(read_json(file).get("files"))
    except (DamagedError, OSError) as caught:
        error = caught
    found = gather((ours, error))
    _raise_first([e for _, e in found])
    if any(o for o, _ in found):
        verify_manifest(path, only)


def verify_manifest(path: str | Path, only: Sequence[str] = (), hashes: bool = True) -> None:
    """Check a finished folder against its manifest; whoever opens one does. All ranks call it and share the hashing.

    Args:
        path: the folder.
        only: names of files and folders in it that are wanted, by default all.
        hashes: also compare sha256, of files that were not found right before on this machine.

    Raises:
        ConfigError: there is no such folder, or it has no manifest.
        DamagedError: a file is missing, has another size, or other content; raised on all ranks.
    """
    path = Path(path)
    error, to_hash = None, []
    try:
        entries = read_manifest(path)
        entries = {n: e for n, e in entries.items() if not only or any(n == o or n.startswith(f"{o}/") for o in only)}
        identity = os.stat(path / MANIFEST)
        _check_sizes(path, entries)
    except (ConfigError, DamagedError, OSError) as caught:
        error = caught
    mine = None if error else (identity.st_ino, identity.st_size, identity.st_mtime_ns, identity.st_ctime_ns)
    found = gather((mine, error))
    _raise_first([e for _, e in found])
    if not hashes:
        return
    peers = [r for r, (seen, _) in enumerate(found) if seen == mine]  # a folder on each node's own disk is another one
    to_hash = [(path / name, entry["sha256"]) for name, entry in sorted(entries.items(), key=lambda item: -item[1]["bytes"])]
    _check_hashes(path, to_hash[peers.index(rank()) :: len(peers)])


_ADVICE = (
    "damaged, or changed since; make the folder again, take another checkpoint, or, where it was changed on purpose and is a "
    "Hugging Face folder, remove its manifest.json"
)


def _check_sizes(path: Path, entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing; the folder is damaged, make it again or take another checkpoint")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{file} has {size} bytes, its manifest says {entry['bytes']}: {_ADVICE}")


def _check_hashes(path: Path, files: list[tuple[Path, str]]) -> None:
    """Hash this rank's share; ranks tell each other every half minute that they are alive, whatever their share takes."""
    memory = _Memory()
    files = [(file, digest) for file, digest in files if not memory.has(file, digest)]
    total, done, started = sum(file.stat().st_size for file, _ in files), [0], time.monotonic()

    def check(file: Path, digest: str) -> Exception | None:
        try:
            before = os.stat(file)
            if sha256(file, count) != digest:
                return DamagedError(f"{file} does not have the sha256 of its manifest: {_ADVICE}")
            memory.keep(file, digest, before)
        except OSError as error:
            return error
        return None

    def count(read: int) -> None:
        done[0] += read  # of several threads; only shown

    if total > WORTH_A_WORD:
        logger.info("checking %s: %.1f GB to hash, once on this machine", path, total / 1e9)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(check, file, digest) for file, digest in files]
        while True:
            _, waiting = wait(checks, PROGRESS_SECONDS)
            if not any(gather(bool(waiting))):
                break
            if waiting:
                logger.info("checking %s: %.1f of %.1f GB", path, done[0] / 1e9, total / 1e9)
        errors = [task.result() for task in checks]
    if total > WORTH_A_WORD:
        logger.info("checked %s in %.0f s", path, time.monotonic() - started)
    memory.forget_old()
    _raise_first(gather(next((e for e in errors if e), None)))


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


class _Memory:
    """Which files had the right hash, an empty file each in the cache folder: no format to damage, safe among processes.

    A cache that cannot be read or written remembers nothing.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.kept = False
        with contextlib.suppress(OSError, ConfigError):
            self.folder = cache_dir() / "verified"
            self.folder.mkdir(exist_ok=True)

    def _marker(self, file: Path, digest: str, seen: os.stat_result) -> Path:
        about = [platform.node(), str(file.resolve()), seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, digest]
        return self.folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def has(self, file: Path, digest: str) -> bool:
        """Whether the file as it is now was found right before."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                marker = self._marker(file, digest, os.stat(file))
                os.utime(marker)
                return True
        return False

    def keep(self, file: Path, digest: str, before: os.stat_result) -> None:
        """Remember a file that was right, if it did not change since `before` and its times would show it if it did now."""
        with contextlib.suppress(OSError):
            marker = self.folder and self._marker(file, digest, before)
            settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS
            if marker and settled and marker == self._marker(file, digest, os.stat(file)):
                marker.touch()
                self.kept = True

    def forget_old(self) -> None:
        """Remove what no process asked for in a long time."""
        with contextlib.suppress(OSError):
            if self.kept:
                for marker in os.scandir(self.folder):
                    if time.time() - marker.stat().st_mtime > REMEMBERED_DAYS * 86_400:
                        os.unlink(marker)
