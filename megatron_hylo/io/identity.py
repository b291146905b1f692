"""Content hashes of folders: they depend on the tensors and tokens inside, not on the path or on other files."""

import hashlib
import json
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.io import listed_files, read_json, read_manifest, sha256

READ = ("weights/", "shards/", "codec.safetensors", "train.", "heldout.")  # files whose bytes enter a run's computation
TENSORS = "tensors.json"  # hashes of all tensors, which stand for the files: those depend on how weights are divided
NOT_CONTENT = "weights/.metadata"  # Megatron-Core writes a new random id into it each time
ARCHITECTURE = ("model", "params_dtype")  # of hylo.json; its provenance names paths


def content_identity(folder: str | Path) -> str:
    """Return the sha256 over the content of a model, dataset or teacher-store folder.

    It stays the same when the folder is moved, copied or reproduced. Hashes are taken from the manifest where there is one
    (they are verified when the folder is opened), else files are read.

    Args:
        folder: model folder, checkpoint, dataset folder or teacher store.

    Raises:
        ConfigError: the folder is missing, or holds no weights, tokens or shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a model, dataset or teacher-store folder")
    if listed := listed_files(folder):
        files = {name: entry["sha256"] for name, entry in listed.items()}
        files = {name: digest for name, digest in files.items() if (name == TENSORS if TENSORS in files else _is_content(name))}
    else:
        names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        files = {name: sha256(folder / name) for name in names if _is_content(name)}
    description = folder / "hylo.json"
    made = read_json(description) if description.is_file() else {}
    content = {"files": files, "architecture": {name: made[name] for name in ARCHITECTURE if name in made}}
    if not files and not content["architecture"]:
        raise ConfigError(f"{folder} holds no weights, tokens or shards; give a model, dataset or teacher-store folder")
    return json_identity(content)


def is_made_of(identity: str, teacher: str | Path) -> bool:
    """Whether a stored teacher identity is that of this teacher.

    Args:
        identity: as stored; earlier versions stored a hash over the weight files of one conversion.
        teacher: model folder.
    """
    return identity in (content_identity(teacher), _files_identity(teacher))


def _files_identity(teacher: str | Path) -> str:
    """Return the identity that earlier versions stored: sha256 over the hashes of all weight files of one conversion."""
    weights = sorted((name, e["sha256"]) for name, e in read_manifest(teacher).items() if name.startswith("weights/"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def file_identity(folder: str | Path, name: str) -> str:
    """Return the sha256 of a file in a folder: from the manifest if it lists the file, else the file is read."""
    files = listed_files(folder)
    return files[name]["sha256"] if name in files else sha256(Path(folder) / name)


def text_identity(path: str | Path) -> str:
    """Return the sha256 over names and contents of a file, or of all files under a folder."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return json_identity([(str(p.relative_to(path)), sha256(p)) for p in files])


def json_identity(value: object) -> str:
    """Return the sha256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_content(name: str) -> bool:
    return name.startswith(READ) and name != NOT_CONTENT
