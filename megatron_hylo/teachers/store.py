"""A teacher's output distributions on disk, for any number of runs: store_writer.py writes them, training reads.

Kept are the last hidden states, in few bytes (hidden_codec.py), and the head. Entries are keyed by document and offset, so a
store serves every batch size, seed, sequence length, packing and parallelism. The teacher reads each document from its
start in segments of `sequence_length`, of which all but the first `overlap` tokens are new. With `teacher_window.mode` windows
a segment is a window, half of it overlap.

    STORE/store.json          what it is of, bytes and KL a token
    STORE/codec.safetensors   codec and head [V, H]
    STORE/tokenizer/          the dataset's
    STORE/shards/00000.bin    blocks of 2,048 tokens, one after another; 00000.json: where each begins

How a block is compressed is in entropy_coding.py; zstd adds a checksum. Tokens are counted in the dataset's order, so a shard
belongs to no rank: ranks share them out, and a writer that is started again leaves out those that are there.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zstandard
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.data.packed import DocumentStore, PackedDataset
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.tokenizer import check_dataset
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.distill.head_rows import head_part
from megatron_hylo.io import (
    DamagedError,
    has_manifest,
    read_json,
    read_verified_json,
    verify_manifest,
)
from megatron_hylo.io.folder_kinds import hint
from megatron_hylo.io.identity import file_identity, is_made_of
from megatron_hylo.parallel.context import sequence_shard
from megatron_hylo.teachers.entropy_coding import decompress_block
from megatron_hylo.teachers.hidden_codec import HiddenCodec

logger = logging.getLogger("megatron_hylo.distill")
BLOCK = 2048  # tokens that are read together
SHARD = 128 * BLOCK  # tokens of a file, and lost at most when a writer is killed
VERSION = 2


def dataset_identity(data: str | Path) -> dict[str, Any]:
    """Hashes of the tokens and document boundaries that a store's entries belong to."""
    return {"index_sha256": file_identity(data, "train.idx"), "tokens_sha256": file_identity(data, "train.bin")}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Codec and head of a store, finished or not, on this rank's device."""
    return load_file(folder / "codec.safetensors", device="cuda" if torch.cuda.is_available() else "cpu")


class TeacherStore:
    """Reader of a teacher store.

    Args:
        path: made by `hylo cache-teacher`.
        data: dataset folder that is trained on.
        teacher: model folder that it must be of, where one is given.

    Raises:
        ConfigError: no store, one of another dataset or tokenizer, or of another teacher.
        DamagedError: its files are not what its manifest says.
    """

    def __init__(self, path: str | Path, data: str | Path, teacher: str | Path | None = None) -> None:
        self.path = Path(path)
        if not (has_manifest(self.path) and (self.path / "store.json").is_file()):
            raise ConfigError(f"{path} is not a finished teacher store{hint(path, 'store')}; `hylo cache-teacher` makes one")
        verify_manifest(self.path)
        self.description = read_verified_json(self.path, "store.json", ("version", "dataset", "teacher"))
        if self.description["version"] != VERSION:
            raise ConfigError(
                f"{path} has format {self.description['version']}, this version reads {VERSION}; cache the teacher again"
            )
        theirs, ours = self.description["dataset"], dataset_identity(data)
        if theirs["index_sha256"] != ours["index_sha256"] or theirs.get("tokens_sha256") not in (None, ours["tokens_sha256"]):
            raise ConfigError(f"{path} was made of another text than {data}; cache the teacher on this dataset")
        if "tokens_sha256" not in theirs:
            logger.warning("%s is of a version that kept only documents' lengths: taken as made of the text of %s", path, data)
        check_dataset(data, path)
        if teacher is not None and not is_made_of(self.description["teacher"], teacher):
            raise ConfigError(f"{path} was made by another teacher than {teacher}; cache this one, or leave teacher out")
        tensors = stored_tensors(self.path)
        self.head = tensors.pop("head")  # [V, H]
        codec = HiddenCodec.from_tensors(tensors)  # in the precision that `decode` wants, every batch
        self.codec = replace(codec, mean=codec.mean.float(), from_axes=codec.from_axes.float())
        self.levels = codec.levels.cpu().numpy()
        self.starts = np.concatenate([[0], np.cumsum(DocumentStore(f"{data}/train").lengths)])
        self._open = functools.lru_cache(maxsize=64)(self._map)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return the codes of tokens [start, start + length) of a document: int16 [length, 3 + H].

        Raises:
            DamagedError: a block that is not what was written; names it.
        """
        first = int(self.starts[document]) + start
        parts, place = [], first
        while place < first + length:
            block = place // BLOCK
            begin = place - block * BLOCK
            end = min(first + length - block * BLOCK, BLOCK)
            parts.append(self._block(block)[begin:end])
            place = block * BLOCK + end
        return np.concatenate(parts)

    def _map(self, shard: int) -> tuple[np.ndarray, list[int]]:
        file = self.path / "shards" / f"{shard:05d}"
        return np.memmap(file.with_suffix(".bin"), np.uint8, "r"), read_json(file.with_suffix(".json"), ("edges",))["edges"]

    def _block(self, number: int) -> np.ndarray:
        shard, place = divmod(number, SHARD // BLOCK)
        data, edges = self._open(shard)
        try:
            return decompress_block(data[edges[place] : edges[place + 1]].tobytes(), self.levels)
        except (zstandard.ZstdError, IndexError) as error:
            raise DamagedError(
                f"{self.path}/shards/{shard:05d}.bin: block {place} (tokens from {number * BLOCK:,}) is damaged ({error}); "
                f"remove the store and run `hylo cache-teacher` again"
            ) from error


class StoredTeacher:
    """A `TeacherSignal` out of a store, with this rank's rows of the head."""

    def __init__(self, store: TeacherStore, dtype: torch.dtype) -> None:
        self.store, self.dtype = store, dtype
        self.weight = head_part(store.head, parallel_state.get_tensor_model_parallel_group()).to(dtype)
        # every tensor-parallel rank reads all tokens
        self.config = SimpleNamespace(sequence_parallel=False, hylo=SimpleNamespace(vocab_size=len(store.head)))

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the head, [vocab / TP rounded up, H]."""
        return self.weight

    def with_hidden(self, batches: Iterator[dict], dataset: WindowSource) -> Iterator[dict]:
        """Implement `TeacherSignal.with_hidden`; a thread reads the store some micro-batches ahead.

        With recall exercises, which the teacher did not read, a batch has "taught" as well, bool [windows, sequence]: True at
        tokens of the text, whose hidden states are those of the text without exercises.
        """
        text = dataset.source if isinstance(dataset, RecallWindows) else dataset
        assert isinstance(text, PackedDataset)  # the settings refuse a store with other windows
        for batch in ahead(self._with_codes(batches, text)):
            codes = batch.pop("codes").reshape(*batch["input_ids"].shape, -1)
            yield batch | {"teacher_hidden": functools.partial(self._hidden, codes)}

    def _with_codes(self, batches: Iterator[dict], dataset: PackedDataset) -> Iterator[dict]:
        """Add "codes" int16 [windows, sequence, 3 + H] of all input tokens to each batch, as stored."""
        for batch in batches:
            rows = []
            for window in batch["windows"].tolist():
                rows.append(np.concatenate([self.store.read(*piece) for piece in dataset.pieces(window)]))
            codes = torch.from_numpy(np.stack(rows))
            places = batch.get("source_places")
            if places is None:
                yield batch | {"codes": codes[:, :-1]}  # the last token is a label alone
                continue
            taught = places >= 0
            of_text = places.view(len(codes), -1).clamp(min=0)
            yield batch | {"codes": codes.gather(1, of_text.unsqueeze(2).expand(-1, -1, codes.shape[2])), "taught": taught}

    def _hidden(self, codes: Tensor) -> Tensor:
        decoded = self.store.codec.decode(sequence_shard(codes).to(self.weight.device), self.dtype)
        return decoded.transpose(0, 1).contiguous()
