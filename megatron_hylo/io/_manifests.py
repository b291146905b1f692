"""Manifests of atomic directories and their verification: sizes every time, hashes once for each file and machine.

DIR/manifest.json is {"files": {name: {"bytes", "sha256"}}}. An entry with "parts", a list of bytes that add up to the file's,
has the sha256 of the binary sha256 of those parts, one behind the other, in place of the file's own: such a file is written
without being hashed a second time where its tensors are hashed anyway. A file whose hash matched is recorded in the cache
directory by path, inode, size, change times and hash, so that the next process need not read it again. Ranks that see the same
directory share the hashing.
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
from megatron_hylo.io._ranks import gather, on_all, rank

logger = logging.getLogger("megatron_hylo.io")
MANIFEST = "manifest.json"
CARD = "README.md"  # a model card is for people, who edit it before they publish a model: it may change
IGNORED = re.compile(r"(^|/)(__pycache__/|\.nfs)")  # created by Python and by NFS clients in directories that are in use
ANNOUNCED_BYTES = 2 * 10**9  # hashing more than this is logged
PROGRESS_SECONDS = 30.0
SETTLED_SECONDS = 2.0  # a file changed more recently may change again without new timestamps
REMEMBERED_DAYS = 90  # unused records of verified files are removed after this

Entry = dict[str, Any]  # {"bytes": int, "sha256": str, "parts"?: list[int]}


def has_manifest(path: str | Path) -> bool:
    """Whether a directory has a manifest; its content is not checked."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path) -> dict[str, Entry]:
    """Read a manifest; its entries have paths inside the directory as keys.

    Raises:
        ConfigError: the directory or its manifest is missing.
        DamagedError: the manifest cannot be read, or was written by another program.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{path} is not a finished megatron_hylo folder: it has no {MANIFEST}")
    files = read_json(file, ("files",))["files"]
    if not _is_ours(files):
        raise DamagedError(f"{file} lists no sizes and hashes: it is damaged or another program's; make the folder again")
    return files


def listed_files(path: str | Path) -> dict[str, Entry]:
    """Read the manifest of a directory that others may have made: no entries without one, or with one of another format.

    Raises:
        DamagedError: it is not JSON.
    """
    file = Path(path) / MANIFEST
    files: dict[str, Entry] = read_json(file).get("files", {}) if file.is_file() else {}
    return files if _is_ours(files) else {}


def _is_ours(files: Any) -> bool:
    def is_entry(entry: Any) -> bool:
        """Whether it is {"bytes", "sha256"}, perhaps with "parts" that add up to the bytes."""
        if not (isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)):
            return False
        parts = entry.get("parts", [entry["bytes"]])
        return isinstance(parts, list) and all(isinstance(size, int) for size in parts) and sum(parts) == entry["bytes"]

    return isinstance(files, dict) and all(map(is_entry, files.values()))


def unlisted(path: Path) -> Path | None:
    """Return the first file or link that the manifest does not list, or None."""
    listed = read_manifest(path).keys() | {MANIFEST}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if (file.is_symlink() or not file.is_dir()) and name not in listed and not IGNORED.search(name):
            return file
    return None


def read_verified_json(folder: str | Path, name: str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object and compare its hash with the directory's manifest, where that lists the file.

    Args:
        folder: directory; it has no manifest if it is part of another one or written by another program.
        name: file name.
        needs: required keys.

    Raises:
        ConfigError: the file is missing or cannot be read.
        DamagedError: the content is not what was written; the message names the file.
    """
    file = Path(folder) / name
    content = read_bytes(file)
    value = parse_json(content, file, needs)
    entry = listed_files(folder).get(name)
    if entry is not None and hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise DamagedError(f"{file} does not have the sha256 of its manifest: {_ADVICE}")
    return value


def verify_manifest_if_any(path: str | Path, only: Sequence[str] = ()) -> None:
    """Run `verify_manifest` if the directory has a manifest of this project; all ranks call it.

    For Hugging Face folders and datasets, which other programs may have written.
    """
    if any(on_all(lambda: bool(listed_files(path)))):
        verify_manifest(path, only)


def verify_manifest(path: str | Path, only: Sequence[str] = (), hashes: bool = True) -> None:
    """Check a directory against its manifest before it is used, but for its card; all ranks call it and share the hashing.

    Args:
        path: the directory.
        only: names of files and directories in it to check, by default all.
        hashes: compare sha256 too, except of files that were already verified on this machine.

    Raises:
        ConfigError: the directory or its manifest is missing.
        DamagedError: a file is missing, or has another size or content; raised on all ranks.
    """
    path = Path(path)
    error: Exception | None = None
    try:
        entries = read_manifest(path)
        entries.pop(CARD, None)
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
    peers = [r for r, (seen, _) in enumerate(found) if seen == mine]  # directories on node-local disks have other inodes
    to_hash = [(path / name, entry) for name, entry in sorted(entries.items(), key=lambda item: -item[1]["bytes"])]
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


def _check_hashes(path: Path, files: list[tuple[Path, Entry]]) -> None:
    """Hash this rank's files; a collective every half minute keeps ranks whose share is large from timing out the others."""
    verified = _VerifiedFiles()
    files = [(file, entry) for file, entry in files if not verified.has(file, entry["sha256"])]
    total, done, started = sum(file.stat().st_size for file, _ in files), [0], time.monotonic()

    def check(file: Path, entry: Entry) -> Exception | None:
        """Return what is wrong with a file, or None; one that is right is not hashed again while it stays as it is."""
        try:
            before = os.stat(file)
            if sha256(file, count, entry.get("parts")) != entry["sha256"]:
                return DamagedError(f"{file} does not have the sha256 of its manifest: {_ADVICE}")
            verified.add(file, entry["sha256"], before)
        except OSError as error:
            return error
        return None

    def count(read: int) -> None:
        """Count bytes that were hashed; races between threads do not matter, since the sum is only displayed."""
        done[0] += read

    if total > ANNOUNCED_BYTES:
        logger.info("checking %s: %.1f GB to hash, once on this machine", path, total / 1e9)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(check, file, entry) for file, entry in files]
        while True:
            _, waiting = wait(checks, PROGRESS_SECONDS)
            if not any(gather(bool(waiting))):
                break
            if waiting:
                logger.info("checking %s: %.1f of %.1f GB", path, done[0] / 1e9, total / 1e9)
        errors = [task.result() for task in checks]
    if total > ANNOUNCED_BYTES:
        logger.info("checked %s in %.0f s", path, time.monotonic() - started)
    verified.remove_old()
    _raise_first(gather(next((e for e in errors if e), None)))


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


class _VerifiedFiles:
    """Record of files whose hash matched, kept as one empty marker file each in the cache directory.

    Marker files need no format and no locks between processes. Nothing is recorded where the cache cannot be read or written.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.added = False
        with contextlib.suppress(OSError, ConfigError):
            self.folder = cache_dir() / "verified"
            self.folder.mkdir(exist_ok=True)

    def _marker(self, folder: Path, file: Path, digest: str, seen: os.stat_result) -> Path:
        about = [platform.node(), str(file.resolve()), seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, digest]
        return folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def has(self, file: Path, digest: str) -> bool:
        """Whether the file was verified in its current state."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                marker = self._marker(self.folder, file, digest, os.stat(file))
                os.utime(marker)
                return True
        return False

    def add(self, file: Path, digest: str, before: os.stat_result) -> None:
        """Record a file, if it is unchanged since `before` and any later change would show in its timestamps."""
        with contextlib.suppress(OSError):
            if self.folder is None:
                return
            marker = self._marker(self.folder, file, digest, before)
            settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS
            if settled and marker == self._marker(self.folder, file, digest, os.stat(file)):
                marker.touch()
                self.added = True

    def remove_old(self) -> None:
        """Remove markers that no process has used for `REMEMBERED_DAYS`."""
        with contextlib.suppress(OSError):
            if self.added and self.folder is not None:
                for marker in os.scandir(self.folder):
                    if time.time() - marker.stat().st_mtime > REMEMBERED_DAYS * 86_400:
                        os.unlink(marker)
