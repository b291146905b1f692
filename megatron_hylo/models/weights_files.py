"""Weights of a model folder (torch.distributed.checkpoint's format), read and written one parameter at a time.

Readers and writers need a model without memory (`skeleton`), which says how each parameter is stored: under which keys, and
as which part of a global tensor. A file of weights is finished with a record of its content beside it, so that a folder can be
made file by file and by several processes; `finish_weights` then makes the `.metadata` of all of them.
"""

import contextlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils import serialization

from megatron_hylo.config import ConfigError, ModelConfig, ParallelConfig
from megatron_hylo.io import DamagedError, place_file
from megatron_hylo.io.overlap import PartsFile
from megatron_hylo.models.checkpoint import BackgroundWrite, sharded_weights
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.models.placement import without_memory
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.platform.safe_loading import ADVICE, install_safe_loading, unpickling_reason

METADATA = ".metadata"
Place = tuple[int, int]  # address and bytes of a tensor


def skeleton(config: ModelConfig, params_dtype: torch.dtype, parallel: ParallelConfig | None = None) -> HyloModel:
    """Build this rank's part of a model without memory: every parameter on the meta device.

    Args:
        config: of the model.
        params_dtype: of the parameters but those kept in fp32.
        parallel: sizes of the groups; None: one rank has all.
    """
    with without_memory():
        return build_model(config, parallel, params_dtype=params_dtype, backend="local")


@dataclass(frozen=True)
class Piece:
    """Part of a global tensor, and where its bytes are in a file."""

    key: str
    dtype: str
    shape: list[int]  # of the global tensor
    offsets: list[int]
    sizes: list[int]
    start: int
    length: int


class PartReader(Protocol):
    """Reader of parts of global tensors."""

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Read a part of the global tensor of that key, on the CPU.

        Args:
            key: Megatron-Core's name of the tensor in a checkpoint.
            offsets: of the part's first element, in each dimension of the global tensor.
            sizes: of the part, likewise.
        """
        ...


class StoredLayout:
    """How the parameters of a model are stored, by their name in the model.

    Args:
        model: whole, with or without memory.
    """

    def __init__(self, model: HyloModel) -> None:
        self.parameters = dict(model.named_parameters())
        self.sharded = sharded_weights(model)

    def undivided_name(self, name: str) -> str:
        """Name of a parameter in a model that is not divided over ranks."""
        described = self.sharded[name]
        part = next(iter(self.parts(name, self.parameters[name].data)))
        if not part.prepend_axis_num:
            return str(described.key)
        return str(described.key).replace(".experts.experts.", f".experts.local_experts.{part.global_offset[0]}.")

    def parts(self, name: str, value: Tensor) -> list[ShardedTensor]:
        """Divide the value of a parameter, of the parameter's shape, into the parts it is stored in.

        On device "meta" the parts have no data.
        """
        described = self.sharded[name]
        if isinstance(described, ShardedTensorFactory):
            built = described.build_fn(described.key, value, described.replica_id, None)
            return list(_leaves(built))
        return [described.without_data() if value.device.type == "meta" else _with_data(described, value)]

    def merge(self, name: str, reader: PartReader) -> Tensor:
        """Read a parameter, on the CPU, in the dtype that is stored: the inverse of `parts`.

        Args:
            name: of the parameter in the model.
            reader: reads each part; its errors are passed on.
        """
        described = self.sharded[name]

        def read(part: ShardedTensor) -> Tensor:
            """Read one shard, in the shape that it has on this rank."""
            return reader.read(part.key, part.global_offset, stored_shape(part)).view(part.local_shape)

        if not isinstance(described, ShardedTensorFactory):
            return read(described)
        built = described.build_fn(described.key, self.parameters[name].data, described.replica_id, None)
        return described.merge_fn(_replace(built, read))


def stored_shape(part: ShardedTensor) -> tuple[int, ...]:
    """Shape of a part in its global tensor; an expert's has the experts' axis, of length 1, before its own."""
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


def _with_data(described: ShardedTensor, value: Tensor) -> ShardedTensor:
    copy = described.without_data()
    copy.data = value
    return copy


def _leaves(built: Any) -> Iterator[ShardedTensor]:
    if isinstance(built, ShardedTensor):
        yield built
    else:
        for part in built.values() if isinstance(built, dict) else built:
            yield from _leaves(part)


def _replace(built: Any, read: Any) -> Any:
    if isinstance(built, ShardedTensor):
        return read(built)
    if isinstance(built, dict):
        return {name: _replace(part, read) for name, part in built.items()}
    return [_replace(part, read) for part in built]


def write_parts(file: PartsFile, parts: list[ShardedTensor], digests: Mapping[Place, bytes]) -> list[Piece]:
    """Append the parts of a parameter to a file of weights.

    torch's archives have no CRC-32 of the values, which nothing reads: their sha256 is in the folder's manifest.

    Args:
        file: what they are appended to.
        parts: made by `StoredLayout.parts`, contiguous.
        digests: sha256 of the values by `place`; complete once the file is closed.

    Returns:
        Where each part is.

    Raises:
        OSError: the disk is full, say.
        RuntimeError: torch cannot write its archive for another reason.
    """
    pieces = []
    for part in parts:
        start, value = file.tell(), _alone(part.data.detach()).view(stored_shape(part))
        try:
            with (
                file.hashed_elsewhere(value.nbytes, partial(digests.__getitem__, place(part.data))),
                serialization.config.patch("save.compute_crc32", False),  # type: ignore[attr-defined]
            ):
                torch.save(value, cast(Any, file))
        except RuntimeError as error:  # of torch's archive, which a full disk has cut off, about its own length
            raise error.__context__ or error from None
        shape, offsets, sizes = (list(map(int, x)) for x in (part.global_shape, part.global_offset, value.shape))
        pieces.append(Piece(part.key, str(part.dtype).split(".")[1], shape, offsets, sizes, start, file.tell() - start))
    return pieces


def place(value: Tensor) -> Place:
    """Address and bytes of a contiguous tensor: what two tensors that are alive have in common if they are the same memory."""
    return value.data_ptr(), value.nbytes


def _alone(value: Tensor) -> Tensor:
    """Return a contiguous tensor, in the same memory, whose storage is no larger: torch saves a whole storage."""
    if value.untyped_storage().nbytes() == value.nbytes:
        return value
    return torch.frombuffer(memoryview(value.reshape(-1).view(torch.uint8).numpy()), dtype=value.dtype)


def finish_weights(folder: Path, files: Sequence[tuple[Path, list[Piece]]]) -> list[Path]:
    """Put files of weights into a new folder and write what Megatron-Core needs beside them; all ranks call it.

    Args:
        folder: weights/ of an atomic directory; created.
        files: each file with its content, in the order of the model.

    Returns:
        The files' new places; empty on other ranks than the first.
    """
    BackgroundWrite({}, folder, folder.parent).finish()  # the entries and files that every checkpoint of Megatron-Core has
    if not is_main():
        return []
    install_safe_loading()
    metadata = FileSystemReader(folder).read_metadata()
    tensors, places = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
    moved = []
    for number, (file, pieces) in enumerate(files):
        name = f"weights_{number:05d}.distcp"
        moved.append(place_file(file, folder / name))
        for piece in pieces:
            kind = TensorProperties(getattr(torch, piece.dtype))
            entry = tensors.setdefault(piece.key, TensorStorageMetadata(kind, torch.Size(piece.shape), []))
            offsets = torch.Size(piece.offsets)
            cast(TensorStorageMetadata, entry).chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
            places[MetadataIndex(piece.key, offsets)] = _StorageInfo(name, piece.start, piece.length)
    with open(folder / METADATA, "wb") as out:
        pickle.dump(Metadata(tensors, None, places, metadata.storage_meta, metadata.version), out)
    return moved


class WeightsReader:
    """Reader of a weights/ folder, whichever ranks wrote it; nothing in it is run.

    Args:
        folder: the weights/ folder of a model folder or training checkpoint.

    Raises:
        ConfigError: the folder holds what could run code, or what this project does not write.
        DamagedError: its description cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        install_safe_loading()
        if (folder / "common.pt").exists():
            raise ConfigError(f"{folder} is refused: it holds common.pt, a pickle of older Megatron-Core; {ADVICE}")
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except OSError as error:
            raise DamagedError(f"{folder} cannot be read: {error}; {ADVICE}") from error
        self.tensors, self.places = metadata.state_dict_metadata, metadata.storage_data

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Read a part of a global tensor, on the CPU; arguments as of `PartReader.read`.

        Raises:
            ConfigError: the folder has no such tensor, or less of it than is asked for.
            DamagedError: it cannot be read.
        """
        entry = self.tensors.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ConfigError(f"{self.folder} has no tensor {key}, which hylo.json asks for")
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        if chunks.get(tuple(offsets)) == tuple(sizes):
            return self._read_chunk(key, tuple(offsets))
        out, filled = torch.empty(tuple(sizes), dtype=entry.properties.dtype), 0
        for start, extent in chunks.items():
            low = [max(a, b) for a, b in zip(start, offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, extent, offsets, sizes)]
            if all(last > first for first, last in zip(low, high)):
                there = tuple(slice(first - b, last - b) for first, last, b in zip(low, high, offsets))
                here = tuple(slice(first - a, last - a) for first, last, a in zip(low, high, start))
                out[there] = self._read_chunk(key, start)[here]
                filled += out[there].numel()
        if filled != out.numel():
            raise ConfigError(f"{self.folder}: {key} is {list(entry.size)}, hylo.json asks for {list(sizes)} of it")
        return out

    def _read_chunk(self, key: str, start: tuple[int, ...]) -> Tensor:
        place = self.places[MetadataIndex(key, torch.Size(start))]
        file = self.folder / place.relative_path
        try:
            with contextlib.closing(_create_file_view(open(file, "rb"), place.offset, place.length)) as view:
                return torch.load(cast(Any, view), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DamagedError(f"{file} cannot be read: {unpickling_reason(error)}; {ADVICE}") from error
