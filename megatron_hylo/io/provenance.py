"""Provenance of a model folder: verb, settings and inputs, each input with its hashes and its own provenance embedded.

So a folder names the Hugging Face model that it goes back to even where the folders in between are gone or moved. The record
is kept in hylo.json under "provenance", and by an export in hylo_provenance.json:

{"verb", "version", the verb's settings ...,
 "inputs": {name: {"path", "manifest_sha256", "content_sha256", "provenance"}     a folder of this project
                | {"path", ..., "documents", "tokens"}                            a dataset folder, its training text
                | {"path", "files": {name: sha256}, "provenance"?}                a Hugging Face folder or GGUF file
                | {"path"}}}                                                     anything else, e.g. a teacher's address
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import megatron_hylo
from megatron_hylo.config import ConfigError
from megatron_hylo.io import MANIFEST, has_manifest, listed_files, read_json, sha256
from megatron_hylo.io.identity import content_identity
from megatron_hylo.io.progress import Track, no_progress

EXPORTED = "hylo_provenance.json"
SOURCE_FILES = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json")


def made_by(verb: str, inputs: Mapping[str, str | Path | None], track: Track = no_progress, **settings: Any) -> dict[str, Any]:
    """Describe how a folder was made.

    Args:
        verb: the `hylo` verb.
        inputs: name -> folder, file or address that was read; None is left out.
        track: progress display over files that have to be hashed (of folders without a manifest).
        settings: other settings that decide the result, as JSON values.
    """
    described = {name: describe_input(path, track) for name, path in inputs.items() if path is not None}
    return {"verb": verb, "version": megatron_hylo.__version__} | settings | {"inputs": described}


def describe_input(path: str | Path, track: Track = no_progress) -> dict[str, Any]:
    """Describe one input: its absolute path, hashes, and its own provenance where it has one."""
    folder = Path(path)
    if not folder.exists():
        return {"path": str(path)}  # an address, say
    found: dict[str, Any] = {"path": os.path.abspath(folder)}
    if not (folder / "config.json").is_file() and has_manifest(folder):
        found["manifest_sha256"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        try:
            found["content_sha256"] = content_identity(folder)
        except ConfigError:  # a calibration folder has neither weights nor tokens
            pass
    elif files := _source_files(folder):
        listed = listed_files(folder)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            unlisted = {file.name: pool.submit(file_hash, file) for file in files if file.name not in listed}
            for name in track(list(unlisted), "hash the source"):
                unlisted[name].result()
        found["files"] = {
            file.name: listed[file.name]["sha256"] if file.name in listed else unlisted[file.name].result() for file in files
        }
    if (folder / "data.json").is_file():
        text = read_json(folder / "data.json")
        found |= {new: text[old] for new, old in (("documents", "train_documents"), ("tokens", "train_tokens")) if old in text}
    for name in ("hylo.json", EXPORTED):
        if (folder / name).is_file():
            content = read_json(folder / name)
            found["provenance"] = content.get("provenance", {}) if name == "hylo.json" else content
    return found
    return found


def hash_ahead(path: str | Path) -> None:
    """Begin to hash what a later `made_by` says of an input, in threads that neither delay the end of the process nor fail.

    For verbs that import libraries for seconds, with one core, before they open their input, which says what is wrong with it.
    """
    folder = Path(path)

    def run(mine: list[Path]) -> None:
        """Hash one thread's files for the cache of hashes; what fails is found again where it is needed."""
        with contextlib.suppress(Exception):
            for file in mine:
                file_hash(file)

    with contextlib.suppress(Exception):
        listed = listed_files(folder)
        files = [file for file in _source_files(folder) if file.name not in listed]
        threads = max(1, min(4, len(os.sched_getaffinity(0)) - 1))
        for number in range(min(threads, len(files))):
            threading.Thread(target=run, args=(files[number::threads],), daemon=True).start()


def file_hash(file: Path) -> str:
    """Return the sha256 of a file, which one thread reads once in a process as long as it does not change."""
    found = os.stat(file)
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    with _hashing:
        known, made = _hashes.get(state), Future[str]()
        if known is None:
            _hashes[state] = made
    if known is not None:
        return known.result()
    try:
        made.set_result(sha256(file))
    except BaseException as error:
        with _hashing:
            del _hashes[state]
        made.set_exception(error)
    return made.result()


_hashes: dict[tuple[int, ...], Future[str]] = {}  # by the state of a file
_hashing = threading.Lock()


def base_models(provenance: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the Hugging Face folders and GGUF files that a provenance goes back to, each once: {"path", "files"}."""
    seen: list[dict[str, str]] = []
    for about in provenance.get("inputs", {}).values():
        found = list(base_models(about.get("provenance", {})))
        if not found and "files" in about:
            found = [{"path": about["path"], "files": about["files"]}]
        for base in found:
            if base["files"] not in seen:
                seen.append(base["files"])
                yield base


def _source_files(path: Path) -> list[Path]:
    """List the files of a Hugging Face folder that decide its model and tokenizer, or the GGUF file itself."""
    return [path] if path.is_file() else sorted({file for pattern in SOURCE_FILES for file in path.glob(pattern)})
