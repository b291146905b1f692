"""`hylo verify --quick`: comparison of two folders by the names and hashes of their tensors and files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.hf_reader import TensorSource, open_source
from megatron_hylo.convert.streaming import TENSORS, Read, tensor_entry, tensor_sha256
from megatron_hylo.data.tokenizer import vocabulary_difference
from megatron_hylo.io import listed_files, read_verified_json
from megatron_hylo.io.progress import Track, no_progress


@dataclass
class HashVerification:
    """Result of a comparison by hashes."""

    tensors: int = 0
    differing: list[str] = field(default_factory=list)  # Hugging Face names, and how they differ
    tokenizer_difference: str | None = None  # in words; None where both have the same vocabulary, or the source none

    @property
    def ok(self) -> bool:
        """Both have the same tensors and tokens."""
        return not self.differing and self.tokenizer_difference is None

    def lines(self) -> list[str]:
        """Describe the result in words."""
        return [
            f"hashes compared of {self.tensors} tensors, differing: {len(self.differing)}",
            *(f"  {line}" for line in self.differing),
            f"tokenizer: {self.tokenizer_difference or 'no difference'}",
        ]


def verify_hashes(hugging_face: str | Path, megatron: str | Path, track: Track = no_progress) -> HashVerification:
    """Compare the values of all tensors of a model folder and a Hugging Face folder or GGUF file by their sha256.

    A folder that was made here lists them; its files are compared with its manifest. Tensors of another one are read and hashed
    one at a time.

    Raises:
        ConfigError: either cannot be read.
        DamagedError: files of a folder that was made here are not what its manifest says.
    """
    source, ours = open_source(hugging_face), FolderSource(megatron)  # compares files with manifests
    stored = _listed(megatron) or _hash(ours, ours.read, {}, track)
    theirs = _listed(hugging_face) or _hash(source, source.read, stored, track)
    names = [*stored, *(name for name in theirs if name not in stored)]
    result = HashVerification(len(names))
    for name in names:
        if name not in stored or name not in theirs:
            result.differing.append(f"{name}: missing in {megatron if name not in stored else hugging_face}")
        elif stored[name] != theirs[name]:
            ours_are, theirs_are = _kind(stored[name]), _kind(theirs[name])
            how = "other values" if ours_are == theirs_are else f"{ours_are} against {theirs_are}"
            result.differing.append(f"{name}: {how}")
    result.tokenizer_difference = vocabulary_difference(hugging_face, megatron)
    return result


def _kind(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']} {entry['shape']}"


def _listed(folder: str | Path) -> dict[str, dict[str, Any]] | None:
    """Read tensors.json where the folder's manifest, which is compared with its files, has it."""
    if not (Path(folder) / TENSORS).is_file() or TENSORS not in listed_files(folder):
        return None
    return read_verified_json(folder, TENSORS, ("tensors",))["tensors"]


def _hash(
    source: TensorSource | FolderSource, read: Read, stored: dict[str, dict[str, Any]], track: Track
) -> dict[str, dict[str, Any]]:
    """Hash all tensors, in the dtype that the other folder stores them in where that holds their values."""
    found = {}
    for name in track(list(tensor_names(source.config)), "hash tensors"):
        value = read(name)
        if name in stored and (dtype := getattr(torch, stored[name]["dtype"])) != value.dtype:
            cast = value.to(dtype)
            value = cast if torch.equal(cast.to(value.dtype), value) else value
        found[name] = tensor_entry(value.dtype, value.shape, tensor_sha256(value.contiguous()))
    return found
