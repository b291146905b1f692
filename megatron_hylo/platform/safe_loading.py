"""Distributed checkpoints read without running code from them.

torch.distributed.checkpoint, with which Megatron-Core reads weights/, unpickles two things: `.metadata` (which tensor lies
where) and entries that are not tensors. A pickle may name any function and have it called. `install_safe_loading` replaces
both readers for the whole process:

- the pickle of `.metadata` is parsed into inert objects - no name in it is imported or called - out of which torch's own
  dataclasses are built after every field was checked;
- other entries are read with torch.load(weights_only=True).

The file format stays torch's. What is refused raises ConfigError.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_hylo.config import ConfigError

_METADATA, _FILES = metadata.__name__, filesystem.__name__
_NAMES = {
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                     "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (_FILES, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
}  # fmt: skip
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
ADVICE = "it was not written by this project or is damaged; load nothing from it, and ask its maker for a Hugging Face export"


class _Inert:
    """What a pickle says of one object: its arguments and its state, and nothing done with them."""

    name = ""

    def __new__(cls, *arguments: Any) -> "_Inert":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Imports nothing: every name becomes a class of its own that only remembers what it was given."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        """A new `_Inert` for a name that belongs there.

        Raises:
            UnpicklingError: any other name.
        """
        if (module, name) not in _NAMES and f"{module}.{name}" not in _DTYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in tensor metadata")
        return type(name, (_Inert,), {"name": f"{module}.{name}"})


def parse_metadata(data: bytes) -> Metadata:
    """The content of a `.metadata` file.

    Raises:
        ValueError: anything else than what torch writes there; the message says what.
    """
    try:
        return _metadata(_InertUnpickler(io.BytesIO(data)).load())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, KeyError, IndexError, ImportError, OverflowError,
            MemoryError, UnicodeDecodeError) as error:  # fmt: skip
        raise ValueError(str(error) or type(error).__name__) from error


def _metadata(value: Any) -> Metadata:
    fields = _fields(value, f"{_METADATA}.Metadata")
    if fields.get("planner_data") is not None:
        _wrong("planner data")
    tensors = {_text(key): _entry(entry) for key, entry in _dict(fields["state_dict_metadata"]).items()}
    places = dict(map(_place, *zip(*_dict(fields["storage_data"]).items()))) if fields["storage_data"] else {}
    return Metadata(tensors, None, places, metadata.StorageMeta(), fields.get("version"))


def _entry(value: Any) -> metadata.STORAGE_TYPES:
    if getattr(value, "name", None) == f"{_METADATA}.BytesStorageMetadata":
        return metadata.BytesStorageMetadata()
    fields = _fields(value, f"{_METADATA}.TensorStorageMetadata")
    kind = fields["properties"]
    if getattr(kind, "name", None) != f"{_METADATA}.TensorProperties":
        _wrong(f"tensor properties {kind!r}")
    dtype = _DTYPES[kind.state[0].name]
    chunks = []
    for chunk in fields["chunks"]:
        corners = _fields(chunk, f"{_METADATA}.ChunkStorageMetadata")
        chunks.append(metadata.ChunkStorageMetadata(_size(corners["offsets"]), _size(corners["sizes"])))
    return metadata.TensorStorageMetadata(metadata.TensorProperties(dtype), _size(fields["size"]), chunks)


def _place(key: Any, value: Any) -> tuple[metadata.MetadataIndex, Any]:
    index = _fields(key, f"{_METADATA}.MetadataIndex")
    offset = index.get("offset")
    info = _fields(value, f"{_FILES}._StorageInfo")
    file = _text(info["relative_path"])
    if PurePath(file).name != file:
        _wrong(f"a tensor in {file!r}, outside its folder")
    if info.get("transform_descriptors"):
        _wrong(f"transformed data, {info['transform_descriptors']!r}")
    where = filesystem._StorageInfo(file, *(_count(info[name]) for name in ("offset", "length")))
    hint = index.get("index")
    return metadata.MetadataIndex(
        _text(index["fqn"]), None if offset is None else _size(offset), None if hint is None else _count(hint)
    ), where


def _fields(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, type) or getattr(value, "name", None) != name:
        _wrong(f"{getattr(value, 'name', type(value).__name__)} where {name} belongs")
    return _dict(value.state)


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else _wrong(f"{type(value).__name__} where a dictionary belongs")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _wrong(f"{type(value).__name__} where text belongs")


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else _wrong(f"{value!r} where a count belongs")


def _size(value: Any) -> torch.Size:
    if getattr(value, "name", None) != "torch.Size":
        _wrong(f"{type(value).__name__} where a shape belongs")
    numbers: Iterable[Any] = value.arguments[0] if value.arguments else ()
    return torch.Size([_count(number) for number in numbers])


def _wrong(what: str) -> NoReturn:
    raise ValueError(f"it holds {what}")


def _read_metadata(self: FileSystemReader, *_: Any, rank: int | None = None, **__: Any) -> Metadata:
    """Stands for FileSystemReader.read_metadata."""
    path = self._get_metadata_path(rank)
    with self.fs.create_stream(path, "rb") as stream:
        data = stream.read()
    try:
        found = parse_metadata(data)
    except ValueError as error:
        raise ConfigError(f"{path} is refused: {error}; {ADVICE}") from error
    found.storage_meta.load_id = self.load_id
    return found


def unpickling_reason(error: BaseException) -> str:
    """Why torch.load(weights_only=True) refused a file. Its own message advises to run the file's code."""
    if not isinstance(error, pickle.UnpicklingError):
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}, which is not data" if named else "it is no pickle of plain data"


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Stands for DefaultLoadPlanner.load_bytes, with weights_only."""
    name = read_item.dest_index.fqn
    try:
        entry = torch.load(value, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"entry {name!r} of a checkpoint is refused: {unpickling_reason(error)}; {ADVICE}") from error
    if self.flatten_state_dict:
        torch.distributed.checkpoint.default_planner.set_element(self.original_state_dict, self.mappings[name], entry)
    else:
        self.state_dict[name] = entry


_REPLACED: tuple[tuple[type, str, Callable], ...] = (
    (FileSystemReader, "read_metadata", _read_metadata),
    (DefaultLoadPlanner, "load_bytes", _load_bytes),
)


def install_safe_loading() -> None:
    """Replace both readers in this process; again is harmless."""
    for owner, name, function in _REPLACED:
        setattr(owner, name, function)
