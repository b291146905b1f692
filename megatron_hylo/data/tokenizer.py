"""Whether things with tokens belong together: vocabularies (token -> id, added tokens included) are compared, not files.

Two models or folders agree where every id means one token in both. A dataset keeps which ids occur in it (`USED_IDS`), and
those alone must agree with a model's tokenizer: a token that no document has may be named otherwise, or lie beyond a model's
embedding.
"""

import functools
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.io import read_json, sha256
from megatron_hylo.io.identity import json_identity

logger = logging.getLogger("megatron_hylo.data")
USED_IDS = "used_token_ids.npy"  # of a dataset folder: int64, ascending
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
NAMED = 3  # differing tokens that an error names
SCAN = 2**24  # tokens looked at together


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and where they were read."""

    tokens: Mapping[int, str]
    where: str

    @functools.cached_property
    def identity(self) -> str:
        """sha256 of the map, whatever files it was in."""
        return json_identity(sorted(self.tokens.items()))

    def differences(self, other: "Vocabulary", ids: np.ndarray | None = None) -> list[int]:
        """Ids, ascending, that mean another token there, or none.

        Args:
            other: to compare with.
            ids: the only ones that matter; by default all that either has.
        """
        among = self.tokens.keys() | other.tokens.keys() if ids is None else ids.tolist()
        return [i for i in sorted(among) if self.tokens.get(i) != other.tokens.get(i)]

    def named(self, other: "Vocabulary", ids: Sequence[int]) -> str:
        """The first of differing ids in words, and how many there are."""
        said = [f"id {i} is {self._token(i)} in {self.where} and {other._token(i)} in {other.where}" for i in ids[:NAMED]]
        more = f", and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
        return "; ".join(said) + more

    def _token(self, number: int) -> str:
        return repr(self.tokens[number]) if number in self.tokens else "no token"


def read_vocabulary(folder: str | Path) -> Vocabulary | None:
    """The vocabulary of a model, dataset, teacher-store, calibration or Hugging Face folder, or GGUF file; None without one."""
    path = Path(folder)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    found = load_transformers_tokenizer(path) if path.exists() else None
    return vocabulary_of(found, str(path)) if found is not None else None


def vocabulary_of(tokenizer: Any, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers."""
    return Vocabulary({number: token for token, number in tokenizer.get_vocab().items()}, where)


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Put the tokenizer of a dataset or model folder, where it has one, beside what is made with it: FOLDER/tokenizer."""
    if (Path(source) / "tokenizer").is_dir():
        shutil.copytree(Path(source) / "tokenizer", folder / "tokenizer")


def check_same_vocabulary(one: str | Path, other: str | Path) -> None:
    """Refuse two folders of different tokenizers; where one has none, say so.

    Raises:
        ConfigError: an id means different tokens; names the first ones.
    """
    if (found := _two(one, other)) and (ids := found[0].differences(found[1])):
        raise ConfigError(f"{one} and {other} have different tokenizers: {found[0].named(found[1], ids)}")


def vocabulary_difference(source: str | Path, model: str | Path) -> str | None:
    """How the vocabulary of what was made of a source differs from the source's, in words; None where it does not."""
    theirs, ours = read_vocabulary(source), read_vocabulary(model)
    if theirs is None or ours is None:
        return f"{model} has no tokenizer, {source} has one" if theirs else None
    ids = theirs.differences(ours)
    return theirs.named(ours, ids) if ids else None


def check_dataset(data: str | Path, model: str | Path, vocab_size: int | None = None) -> None:
    """Refuse a dataset that was not made for a model: another tokenizer, or ids that the model has no embedding for.

    Args:
        data: dataset folder, or what was made of one with its tokenizer beside it (teacher store, calibration).
        model: model folder, or another dataset.
        vocab_size: rows of the model's embedding.

    Raises:
        ConfigError: an id that occurs in the dataset is too large, or means another token to the model; names the first ones.
    """
    if vocab_size is not None:
        check_dataset_ids(data, vocab_size, model)
    if not (found := _two(data, model)):
        return
    ours, theirs = found
    ids = ours.differences(theirs)
    used = Path(data) / USED_IDS
    if ids and used.is_file():
        occurring = np.load(used)
        harmless, ids = ids, ours.differences(theirs, occurring)
        if not ids:
            _say_once(f"{ours.where} and {theirs.where} differ, in no token that {data} holds: {ours.named(theirs, harmless)}")
    if ids:
        raise ConfigError(
            f"{data} was made with another tokenizer than that of {model}: {ours.named(theirs, ids)}; preprocess with the "
            f"tokenizer of {model}"
        )


def check_ids(ids: Tensor | int, vocab_size: int, data: str | Path, model: str | Path) -> None:
    """Refuse token ids outside a model's vocabulary before they reach its embedding.

    Args:
        ids: all of them, or the one that lies outermost.
        vocab_size: rows of the embedding.
        data, model: where they are from, and whose embedding it is, for the message.

    Raises:
        ConfigError: there is one.
    """
    low, high = (int(found) for found in torch.aminmax(ids)) if isinstance(ids, Tensor) else (ids, ids)
    if low < 0 or high >= vocab_size:
        raise ConfigError(
            f"{data} holds token id {low if low < 0 else high}, the vocabulary of {model} has {vocab_size} "
            f"(0 to {vocab_size - 1}); preprocess with that model's tokenizer"
        )


def check_vocabulary_identity(data: str | Path, teacher: str, identity: str | None) -> None:
    """Refuse a remote teacher of another tokenizer than a dataset's; where one of them does not tell, say so.

    Args:
        data: dataset folder.
        teacher: its address, for messages.
        identity: `Vocabulary.identity` of its tokenizer.

    Raises:
        ConfigError: they differ.
    """
    ours = read_vocabulary(data)
    if identity is None or ours is None:
        _say_once(f"the tokenizers of {data} and {teacher} are not compared: {data if ours is None else teacher} without one")
    elif ours.identity != identity:
        raise ConfigError(
            f"the teacher at {teacher} has another tokenizer than {data}; serve one with the same, or preprocess with that "
            f"teacher's"
        )


def check_dataset_ids(data: str | Path, vocab_size: int, model: str | Path) -> None:
    """`check_ids` of all tokens of a dataset folder.

    A dataset of an earlier version does not know its largest id: where its tokenizer has larger ones, all tokens are read.
    """
    file = Path(data) / "data.json"
    described = read_json(file) if file.is_file() else {}
    if "largest_token_id" in described:
        check_ids(described["largest_token_id"], vocab_size, data, model)
    elif described.get("vocab_size", vocab_size + 1) > vocab_size:
        for outermost in _outermost_stored(data):
            check_ids(outermost, vocab_size, data, model)


def _outermost_stored(data: str | Path) -> Iterator[int]:
    """Smallest and largest id of each `SCAN` tokens in the files of a dataset folder."""
    for split in ("train", "heldout"):
        prefix = str(Path(data) / split)
        if IndexedDataset.exists(prefix):
            tokens = np.memmap(f"{prefix}.bin", IndexedDataset(prefix).index.dtype, "r")
            for part in (tokens[i : i + SCAN] for i in range(0, len(tokens), SCAN)):
                yield from (int(part.min()), int(part.max()))


def _two(one: str | Path, other: str | Path) -> tuple[Vocabulary, Vocabulary] | None:
    """Both vocabularies; None where they come of equal files, or one is not known, which is said."""
    if (files := _files(one)) and files == _files(other):
        return None
    first, second = read_vocabulary(one), read_vocabulary(other)
    if first is None or second is None:
        missing = [str(folder) for folder, found in ((one, first), (other, second)) if found is None]
        _say_once(f"the tokenizers of {one} and {other} are not compared: {' and '.join(missing)} without one")
        return None
    return first, second


def _files(folder: str | Path) -> dict[str, str]:
    """sha256 of what a vocabulary is read from."""
    path = Path(folder)
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    return {name: sha256(path / name) for name in TOKENIZER_FILES if (path / name).is_file()}


@functools.lru_cache
def _say_once(message: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.warning("%s", message)
