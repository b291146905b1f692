"""A teacher's output distributions on disk, for any number of runs: `hylo cache-teacher` writes, `distil` reads.

Kept are the last hidden states, in few bytes (hidden_codec.py), and the head. Entries are keyed by document and offset, so a
store serves every batch size, seed, sequence length, packing and parallelism. The teacher reads each document from its
start in segments of `sequence_length`, of which all but the first `overlap` tokens are new. With `teacher_window.mode` windows
a segment is a window, half of it overlap.

    STORE/store.json          what it is of, bytes and KL a token
    STORE/codec.safetensors   codec and head [V, H]
    STORE/tokenizer/          the dataset's
    STORE/shards/00000.bin    blocks of 2,048 tokens, one after another; 00000.json: where each begins

How a block is compressed is in code_blocks.py; zstd adds a checksum. Tokens are counted in the dataset's order, so a shard
belongs to no rank: ranks share them out, and a writer that is started again leaves out those that are there.
"""

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zstandard
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hylo.config import ConfigError, ParallelConfig, TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.data.packed import DocumentStore, PackedDataset
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.tokenizer import check_dataset, copy_tokenizer
from megatron_hylo.data.windows import WindowSource
from megatron_hylo.distill.head_rows import head_part, whole_head
from megatron_hylo.io import (
    DamagedError,
    atomic_directory,
    barrier,
    check_free,
    has_manifest,
    read_json,
    read_verified_json,
    staging_directory,
    verify_manifest,
    write_json,
)
from megatron_hylo.io.identity import content_identity, file_identity, is_made_of
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model, read_description
from megatron_hylo.models.checks import require_finite
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.context import sequence_shard
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.teachers.entropy_coding import compress_block, decompress_block
from megatron_hylo.teachers.hidden_codec import HiddenCodec, fit_codec

logger = logging.getLogger("megatron_hylo.distill")
BLOCK = 2048  # tokens that are read together
SHARD = 128 * BLOCK  # tokens of a file, and lost at most when a writer is killed
FIT_TOKENS_PER_CHANNEL = 32
FIT_PIECE = 256  # of them that stand together: few, to be of many documents
VERSION = 2


def write_store(
    teacher: str | Path,
    data: str | Path,
    output: str | Path,
    kl: float = 9e-4,
    sequence_length: int = 2048,
    overlap: int | None = None,
    micro_batch_size: int = 8,
    precision: torch.dtype = torch.bfloat16,
    parallel: ParallelConfig | None = None,
    overwrite: bool = False,
    track: Track = no_progress,
    teacher_window: TeacherWindow | None = None,
) -> dict[str, Any]:
    """Write a store of DATA/train; `platform.initialize` must have run, with `parallel`.

    Args:
        teacher: model folder.
        data: dataset folder made by `hylo preprocess` with the teacher's tokenizer.
        output: folder to make. Shards done so far are kept beside it and reused when the same command runs again.
        kl: mean KL(teacher || store) a token, in nats.
        sequence_length: tokens that the teacher reads at a time.
        overlap: of them context alone; half by default. A token deep in a document has at least so many before it.
        micro_batch_size: segments a forward pass.
        precision: of the teacher.
        parallel: tensor and data parallelism.
        overwrite: replace what is there.
        track: progress display over an iterable.
        teacher_window: how the teacher reads segments longer than its window; part of what the store is.

    Returns:
        The content of store.json.

    Raises:
        ConfigError: settings that cannot work, segments longer than the teacher's window, or a dataset of another vocabulary.
    """
    check_free(output, overwrite, [teacher, data])
    ways, architecture = teacher_window or OWN_WINDOW, read_description(teacher)[0]
    check_dataset(data, teacher, architecture.vocab_size)
    ways.check(architecture, sequence_length, f"teacher {teacher}")
    ways = ways.resolve(architecture, sequence_length)
    if (window := ways.window(architecture, sequence_length)) is not None:
        if overlap is not None:
            raise ConfigError(f"overlap {overlap}: windows of {window} tokens overlap by half; leave it out")
        sequence_length = window
    overlap = sequence_length // 2 if overlap is None else overlap
    if kl <= 0 or sequence_length < 1 or micro_batch_size < 1:
        raise ConfigError(
            f"--kl must be above 0, --sequence_length and --micro_batch_size at least 1, got {kl}, {sequence_length} and "
            f"{micro_batch_size}"
        )
    if not 0 <= overlap < sequence_length:
        raise ConfigError(f"overlap {overlap} must be at least 0 and below sequence_length {sequence_length}")
    if parallel is not None:
        parallel.check_tensor_parallel_alone("cache-teacher")
    documents = DocumentStore(f"{data}/train")
    model = load_model(teacher, parallel, params_dtype=precision, **ways.changes()).eval()
    require_finite(model, teacher)
    description = {
        "version": VERSION, "teacher": content_identity(teacher), "dataset": dataset_identity(data), "tokens": documents.tokens,
        "kl": kl, "sequence_length": sequence_length, "overlap": overlap, "precision": str(precision).split(".")[1],
    }  # fmt: skip
    if ways.mode != "none":
        description["teacher_window"] = asdict(ways)
    work = staging_directory(Path(output), "shards", "key", description)
    reader = SegmentReader(model, documents, sequence_length, overlap, micro_batch_size, track)
    _make_codec(reader, work, kl)
    tensors = _tensors(work)
    codec, head = HiddenCodec.from_tensors(tensors), tensors["head"]
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    shards = -(-documents.tokens // SHARD)
    for shard in track(range(rank, shards, ranks), "cache the teacher"):
        if not (work / f"{shard:05d}.json").is_file():
            codes = codec.encode(reader.hidden(shard * SHARD, min((shard + 1) * SHARD, documents.tokens)), head)
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                _write_shard(work / f"{shard:05d}", codes.cpu().numpy(), codec.levels.cpu().numpy())
    barrier()
    found = read_json(work / "fit.json")
    stored = sum((work / f"{shard:05d}.bin").stat().st_size for shard in range(shards))
    description |= found | {"bytes_per_token": stored / documents.tokens}
    with atomic_directory(output, overwrite) as partial:
        if is_main():
            (partial / "shards").mkdir()
            for file in sorted(work.glob("[0-9]*")):
                os.replace(file, partial / "shards" / file.name)
            os.replace(work / "codec.safetensors", partial / "codec.safetensors")
            write_json(partial / "store.json", description)
            copy_tokenizer(data, partial)
    if is_main():
        for file in work.iterdir():
            file.unlink()
        work.rmdir()
    return description


class SegmentReader:
    """Reader of the teacher's last hidden states for any range of the dataset's tokens."""

    def __init__(
        self, model: HyloModel, documents: DocumentStore, length: int, overlap: int, batch: int, track: Track = no_progress
    ) -> None:
        self.model, self.documents, self.length, self.overlap, self.batch = model, documents, length, overlap, batch
        self.track = track
        self.starts = np.concatenate([[0], np.cumsum(documents.lengths)])

    @torch.no_grad()
    def hidden(self, start: int, stop: int) -> Tensor:
        """Return the hidden states of tokens [start, stop) in the dataset's order: [tokens, H]."""
        where = next(self.model.parameters()).device
        segments = sorted(self._segments(start, stop), key=lambda s: s[2] - s[1])  # alike lengths together
        out: Tensor | None = None
        for i in self.track(range(0, len(segments), self.batch), "segments"):
            group = segments[i : i + self.batch]
            ids = torch.zeros(len(group), max(end - begin for _, begin, end, *_ in group), dtype=torch.int64)
            for row, (document, begin, end, *_) in enumerate(group):
                ids[row, : end - begin] = torch.from_numpy(self.documents.read(document, begin, end - begin))
            states = self.model(ids.to(where)).transpose(0, 1)  # padding comes after all that is kept
            out = states.new_empty(stop - start, states.shape[-1]) if out is None else out
            for row, (document, begin, end, first) in enumerate(group):
                place = int(self.starts[document]) + first - start
                out[place : place + end - first] = states[row, first - begin : end - begin]
        assert out is not None, "an empty range"
        return out

    def _segments(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """List segments (document, first token read, end, first token kept) that cover a range, each token kept once."""
        found, stride = [], self.length - self.overlap
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        while document < len(self.documents.lengths) and self.starts[document] < stop:
            base = int(self.starts[document])
            first, last = max(start - base, 0), min(stop - base, int(self.documents.lengths[document]))
            while first < last:
                number = max(0, (first - self.overlap) // stride)  # the segment whose new tokens `first` is one of
                begin = number * stride
                end = min(begin + self.length, last)
                found.append((document, begin, end, first))
                first = end
            document += 1
        return found


def _make_codec(reader: SegmentReader, work: Path, kl: float) -> None:
    """Fit the codec on tokens spread over the whole dataset; writes codec.safetensors and fit.json."""
    if not (work / "fit.json").is_file():
        model, group = reader.model, parallel_state.get_tensor_model_parallel_group()
        head = whole_head(model.head_weight(), model.config.hylo.vocab_size, group)
        codec, found = fit_codec(fit_sample(reader), head, kl)
        if is_main():
            tensors = codec.tensors() | {"head": head.contiguous()}
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, work / "codec.safetensors")
            measured = {"measured_kl": found.mean().item(), "measured_kl_p99": found.quantile(0.99).item(),
                        "measured_kl_max": found.max().item(), "measured_tokens": len(found)}  # fmt: skip
            write_json(work / "fit.json", measured)
    barrier()


def fit_sample(reader: SegmentReader) -> Tensor:
    """Sample last hidden states from the whole dataset to fit a codec on: [tokens, H]."""
    wanted, total = FIT_TOKENS_PER_CHANNEL * reader.model.head_weight().shape[1], reader.documents.tokens
    pieces, size = min(-(-wanted // FIT_PIECE), max(1, total // FIT_PIECE)), min(FIT_PIECE, total)
    places = [i * (total - size) // max(1, pieces - 1) for i in range(pieces)]
    return torch.cat([reader.hidden(place, place + size) for place in reader.track(places, "fit the codec")])


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "codec.safetensors", device="cuda" if torch.cuda.is_available() else "cpu")


def _write_shard(path: Path, codes: np.ndarray, levels: np.ndarray) -> None:
    """Write codes int16 [tokens, 3 + H] to PATH.bin, then PATH.json, whose presence says that both are complete."""
    edges = [0]
    partial = path.with_suffix(".tmp")
    with open(partial, "wb") as file:
        for first in range(0, len(codes), BLOCK):
            file.write(compress_block(codes[first : first + BLOCK], levels))
            edges.append(file.tell())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path.with_suffix(".bin"))
    write_json(path.with_suffix(".json"), {"tokens": len(codes), "edges": edges})


def dataset_identity(data: str | Path) -> dict[str, Any]:
    """Hashes of the tokens and document boundaries that a store's entries belong to."""
    return {"index_sha256": file_identity(data, "train.idx"), "tokens_sha256": file_identity(data, "train.bin")}


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
            raise ConfigError(f"{path} is not a finished teacher store; make one with `hylo cache-teacher`")
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
        tensors = _tensors(self.path)
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
