"""Writing of teacher stores, `hylo cache-teacher`; their format is told in store.py."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from megatron_hylo.config import ConfigError, ParallelConfig, TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.data.tokenizer import check_dataset, copy_tokenizer
from megatron_hylo.distill.head_rows import whole_head
from megatron_hylo.io import (
    atomic_directory,
    barrier,
    check_free,
    read_json,
    staging_directory,
    write_json,
)
from megatron_hylo.io.identity import content_identity
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.checks import require_finite
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.teachers.entropy_coding import compress_block
from megatron_hylo.teachers.hidden_codec import HiddenCodec, fit_codec
from megatron_hylo.teachers.store import BLOCK, SHARD, VERSION, dataset_identity, stored_tensors

FIT_TOKENS_PER_CHANNEL = 32
FIT_PIECE = 256  # of them that stand together: few, to be of many documents


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
    tensors = stored_tensors(work)
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
