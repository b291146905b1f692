"""Content identities: which tensors and tokens a folder holds, whatever its path, its neighbours or who made it."""

import hashlib
import json
from pathlib import Path

from megatron_hylo.config import ConfigError
from megatron_hylo.io import has_manifest, read_json, read_manifest, sha256

READ = ("weights/", "shards/", "codec.safetensors", "train.", "heldout.")  # files whose bytes a run computes with
NOT_CONTENT = "weights/.metadata"  # Megatron-Core writes a new random id into it each time
ARCHITECTURE = ("model", "params_dtype")  # of hylo.json; its provenance names paths


def content_identity(folder: str | Path) -> str:
    """sha256 over what a model, dataset or teacher-store folder holds: moved, copied or made again it is the same.

    The manifest's hashes are taken where there is a manifest (whoever opens the folder verifies them), else files are read.

    Args:
        folder: model folder, checkpoint, dataset folder or teacher store.

    Raises:
        ConfigError: it is not there, or holds nothing that a run computes with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a model, dataset or teacher-store folder")
    if has_manifest(folder):
        files = {name: entry["sha256"] for name, entry in read_manifest(folder).items() if _is_content(name)}
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
    """Whether what keeps the content identity of its teacher was made with this one.

    Args:
        identity: as stored; folders of earlier versions have another, of the files of one conversion.
        teacher: model folder.
    """
    return identity in (content_identity(teacher), _files_identity(teacher))


def _files_identity(teacher: str | Path) -> str:
    """sha256 over the hashes of all files of the weights: a teacher that was made again has another."""
    weights = sorted((name, e["sha256"]) for name, e in read_manifest(teacher).items() if name.startswith("weights/"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def file_identity(folder: str | Path, name: str) -> str:
    """sha256 of a file in a folder: the manifest's where it knows the file, else the file is read."""
    files = read_manifest(folder) if has_manifest(folder) else {}
    return files[name]["sha256"] if name in files else sha256(Path(folder) / name)


def text_identity(path: str | Path) -> str:
    """sha256 over names and content of a file, or of all files under a folder."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return json_identity([(str(p.relative_to(path)), sha256(p)) for p in files])


def json_identity(value: object) -> str:
    """sha256 of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_content(name: str) -> bool:
    return name.startswith(READ) and name != NOT_CONTENT
