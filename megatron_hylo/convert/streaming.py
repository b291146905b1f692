"""Write a model shard by shard, a group of tensors in memory at a time, and go on at the shard where a killed run was.

Reading and arithmetic run in the calling thread, writing and hashing beside it (`io.overlap`). Finished shards wait in a
directory beside the output, each with a record of its content, until all are there; ranks share them out.

TENSORS (tensors.json) in the output lists the sha256 of every tensor's values under its Hugging Face name, in the dtype that
is stored. They depend on neither format, shard size nor parallelism, so that any two folders can be compared by them.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.mapping import Entry, model_entries
from megatron_hylo.convert.safetensors_files import header_bytes, tensor_bytes
from megatron_hylo.io import DamagedError, barrier, on_all, rank, read_json, staging_directory, world_size, write_json
from megatron_hylo.io.overlap import HashedFile, NewFile, Overlap, PartsFile
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.weights_files import Piece, Place, StoredLayout, place, write_parts

TENSORS = "tensors.json"
SHARD_BYTES = 2 * 10**9
Read = Callable[[str], Tensor]  # Hugging Face name -> CPU tensor


class NoSpaceError(ConfigError):
    """Disk with too little space for an output; what is there of it is kept."""


@dataclass(frozen=True)
class Group:
    """Tensors that are read, computed and written together: those of one Megatron parameter."""

    entry: Entry
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]  # of the tensors of `entry.hugging_face`

    @property
    def bytes(self) -> int:
        """Size of all its tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * self.dtype.itemsize


@dataclass
class Shard:
    """A finished file."""

    file: Path
    manifest_entry: dict[str, Any]
    tensors: dict[str, dict[str, Any]]  # Hugging Face name -> {"dtype", "shape", "sha256"}
    pieces: list[Piece]  # of Megatron's format

    @property
    def tensor_bytes(self) -> int:
        """Size of all its tensors."""
        about = [(getattr(torch, entry["dtype"]), entry["shape"]) for entry in self.tensors.values()]
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in about)


@dataclass
class Prepared:
    """A group in memory, as it will be stored; `write` and `hash` may run in two threads."""

    write: Callable[[Any], list[Piece]]  # to a file of the format's class
    hash: Callable[[], list[bytes]]  # sha256 of each Hugging Face tensor


class Format(Protocol):
    """How a shard is laid out."""

    name: str

    def open(self, path: Path) -> NewFile:
        """Create a shard's file."""
        ...

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Order the groups of a shard."""
        ...

    def begin(self, file: Any, groups: Sequence[Group]) -> None:
        """Write what comes before the first group."""
        ...

    def prepare(self, group: Group, tensors: list[Tensor]) -> Prepared:
        """Compute what is stored of a group.

        Args:
            group: Hugging Face names, and the Megatron parameter that they make.
            tensors: of those names, on the CPU.
        """
        ...


class Megatron:
    """Files of a model folder's weights/, hashed in parts: of a tensor that is stored as it is, the hash is taken once.

    Args:
        layout: of the model that is written.
    """

    name = "megatron"

    def __init__(self, layout: StoredLayout) -> None:
        self.layout = layout

    def open(self, path: Path) -> PartsFile:
        """Create a file that is hashed in parts."""
        return PartsFile(path)

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Keep the order of the layers."""
        return list(groups)

    def begin(self, file: PartsFile, groups: Sequence[Group]) -> None:
        """Write nothing."""

    def prepare(self, group: Group, tensors: list[Tensor]) -> Prepared:
        """Merge the tensors into Megatron's parameter.

        Raises:
            ConfigError: it has another shape than the model's.
        """
        name, names = group.entry.megatron, group.entry.hugging_face
        merged, wanted = group.entry.merge(tensors), self.layout.parameters[name].shape
        if merged.shape != wanted:
            raise ConfigError(f"{' + '.join(names)}: {list(merged.shape)} does not fit {list(wanted)}")
        parts = self.layout.parts(name, merged)
        for part in parts:
            part.data = part.data.contiguous()
        kept = tensors if group.entry.interleaved else group.entry.split(merged)  # views; the tensors they are copies of can go
        digests: dict[Place, bytes] = {}

        def hash_tensors() -> list[bytes]:
            """Return the sha256 of the tensors, and note those of the parts; what is the same memory is hashed once."""
            for value in (*kept, *(part.data for part in parts)):
                if place(value) not in digests:  # the same memory, and so the same bytes
                    digests[place(value)] = tensor_sha256(value)
            return [digests[place(value)] for value in kept]

        return Prepared(lambda file: write_parts(file, parts, digests), hash_tensors)


class Safetensors:
    """Files of a Hugging Face folder, each with its own sha256, which others compute and publish too."""

    name = "safetensors"

    def open(self, path: Path) -> HashedFile:
        """Create a file that is hashed as a whole."""
        return HashedFile(path)

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Put wider dtypes first, so that every tensor is aligned."""
        return sorted(groups, key=lambda group: -group.dtype.itemsize)

    def begin(self, file: HashedFile, groups: Sequence[Group]) -> None:
        """Write the header: all shapes are known beforehand."""
        named = {name: (group.dtype, shape) for group in groups for name, shape in zip(group.entry.hugging_face, group.shapes)}
        file.write(header_bytes(named))

    def prepare(self, group: Group, tensors: list[Tensor]) -> Prepared:
        """Take the tensors as they are."""

        def write(file: HashedFile) -> list[Piece]:
            """Write the tensors' bytes; no piece is left to write later."""
            for tensor in tensors:
                file.write(tensor_bytes(tensor))
            return []

        return Prepared(write, lambda: [tensor_sha256(tensor) for tensor in tensors])


def model_groups(config: ModelConfig, layout: StoredLayout) -> list[Group]:
    """List all groups of a model in the order of its layers."""
    shapes = tensor_names(config)
    return [
        Group(entry, layout.parameters[entry.megatron].dtype, tuple(shapes[name] for name in entry.hugging_face))
        for entry in model_entries(config)
    ]


def divide(groups: Sequence[Group], shard_bytes: int) -> list[list[Group]]:
    """Divide groups into shards of at most `shard_bytes`; a larger group is a shard of its own."""
    shards: list[list[Group]] = []
    size = 0
    for group in groups:
        if not shards or size + group.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.bytes
    return shards


@contextmanager
def shards_of(
    output: Path,
    groups: Sequence[Group],
    read: Read,
    form: Format,
    source: Any,
    shard_bytes: int = SHARD_BYTES,
    track: Track = no_progress,
) -> Iterator[list[Shard]]:
    """Make all shards of a model, or those that an earlier run did not finish; all ranks call it and get all.

    They lie beside the output, for the caller to move. Where the context ends with an error, they are kept if the output is
    what failed (a full disk), and removed if the source or the result is wrong.

    Args:
        output: folder that they are for; its lock is held.
        groups: what to write.
        read: gives a tensor of the source.
        form: of the shards.
        source: JSON that is another one where the content would be: of files, settings, version.
        shard_bytes: largest size of a shard.
        track: progress display over an iterable.

    Raises:
        ConfigError: there is too little space for them, or what `read` and `form` raise.
    """
    planned = [form.arrange(shard) for shard in divide(groups, shard_bytes)]
    described = {"format": [form.name, 2], "source": source, "shards": [[g.entry.megatron for g in shard] for shard in planned]}
    work = staging_directory(output, "shards", "shards", described)
    try:
        _check_space(output, work, planned)
        own = list(enumerate(planned))[rank() :: world_size()]

        def write() -> None:
            """Write this rank's shards that have no record; after an error remove the files of those that still have none."""
            todo = [(number, shard) for number, shard in own if not _record(work, number).is_file()]
            try:
                _write_own(work, todo, read, form, track)
            except Exception:
                for number, _ in todo:
                    if not _record(work, number).is_file():
                        for file in work.glob(f"*{_file(work, number).name}*"):  # also of a record that was cut short
                            file.unlink()
                raise

        on_all(write)
        yield [_finished(work, number) for number in range(len(planned))]
        barrier()
        if rank() == 0:
            shutil.rmtree(work)
    except (ConfigError, DamagedError) as error:
        if rank() == 0 and not isinstance(error, NoSpaceError):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _write_own(work: Path, shards: Sequence[tuple[int, list[Group]]], read: Read, form: Format, track: Track) -> None:
    todo = iter(track([(number, group) for number, shard in shards for group in shard], "write tensors"))
    with Overlap() as overlap:
        for number, shard in shards:
            file = form.open(_file(work, number).with_suffix(".partial"))
            tensors: dict[str, dict[str, Any]] = {}
            pieces: list[Piece] = []
            begun: list[Future[Any]] = []
            form.begin(file, shard)
            for group in shard:
                next(todo)
                values = [read(name).to(group.dtype).contiguous() for name in group.entry.hugging_face]
                for name, value, shape in zip(group.entry.hugging_face, values, group.shapes):
                    if tuple(value.shape) != tuple(shape):
                        raise ConfigError(
                            f"tensor {name} has shape {list(value.shape)}, its configuration asks for {list(shape)}"
                        )
                prepared = form.prepare(group, values)
                begun += overlap.add(
                    group.bytes * (1 + group.entry.interleaved),  # such tensors are there twice
                    write=partial(_append, file, prepared, pieces),
                    hash=partial(_hash, group, prepared, tensors),
                )
                del values, prepared
            overlap.finish(partial(_finish, work, number, file, tensors, pieces), begun)
        overlap.drain()
    next(todo, None)  # ends the display


def _finish(work: Path, number: int, file: NewFile, tensors: dict[str, dict[str, Any]], pieces: list[Piece]) -> None:
    about = {"file": file.close(), "tensors": tensors, "pieces": [asdict(piece) for piece in pieces]}
    file.path.rename(_file(work, number))
    write_json(_record(work, number), about)


def _append(file: NewFile, prepared: Prepared, pieces: list[Piece]) -> None:
    pieces += prepared.write(file)


def _hash(group: Group, prepared: Prepared, tensors: dict[str, dict[str, Any]]) -> None:
    for name, shape, digest in zip(group.entry.hugging_face, group.shapes, prepared.hash()):
        tensors[name] = tensor_entry(group.dtype, shape, digest)


def tensor_entry(dtype: torch.dtype, shape: Sequence[int], digest: bytes) -> dict[str, Any]:
    """Describe a tensor in tensors.json: dtype, shape, sha256 of its values."""
    return {"dtype": str(dtype).split(".")[1], "shape": list(shape), "sha256": digest.hex()}


def tensor_sha256(value: Tensor) -> bytes:
    """Return the sha256, 32 bytes, of the values of a contiguous CPU tensor."""
    return hashlib.sha256(tensor_bytes(value)).digest()


def _file(work: Path, number: int) -> Path:
    return work / f"shard_{number:05d}"


def _record(work: Path, number: int) -> Path:
    return work / f"shard_{number:05d}.json"


def _finished(work: Path, number: int) -> Shard:
    about = read_json(_record(work, number), ("file", "tensors", "pieces"))
    return Shard(_file(work, number), about["file"], about["tensors"], [Piece(**piece) for piece in about["pieces"]])


def _check_space(output: Path, work: Path, planned: Sequence[Sequence[Group]]) -> None:
    needed = sum(group.bytes for number, shard in enumerate(planned) if not _record(work, number).is_file() for group in shard)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise NoSpaceError(
            f"{output} needs {needed / 1e9:,.1f} GB more, and the disk has {free / 1e9:,.1f} GB free: make space, or choose "
            "another place, and run again"
        )
