"""Readers of distributed checkpoints that do not execute code from them.

torch.distributed.checkpoint, with which Megatron-Core reads weights/, unpickles two things: `.metadata` (the location of each
tensor) and entries that are not tensors. A pickle can call any function that it names. `install_safe_loading` replaces both
readers for the whole process:

- the pickle of `.metadata` is parsed into inert objects (no name in it is imported or called), and torch's own dataclasses are
  built from them after every field was checked;
- other entries are read with torch.load(weights_only=True).

The file format stays torch's. Files that are refused raise ConfigError.
"""

import io
import pickle
import re
from collections.abc import Iterable
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
    """Arguments and state that a pickle gives for one object, stored without constructing the object."""

    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "_Inert":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Unpickler that imports nothing: it turns every allowed name into a new subclass of `_Inert`."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        """Return a new subclass of `_Inert` for a name that tensor metadata may contain.

        Raises:
            UnpicklingError: any other name.
        """
        if (module, name) not in _NAMES and f"{module}.{name}" not in _DTYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in tensor metadata")
        return type(name, (_Inert,), {"name": f"{module}.{name}"})


def parse_metadata(data: bytes) -> Metadata:
    """Parse the bytes of a `.metadata` file.

    Raises:
        ValueError: content that torch does not write there; the message names it.
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
    where = filesystem._StorageInfo(file, _count(info["offset"]), _count(info["length"]))
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
    """Replacement of FileSystemReader.read_metadata."""
    path = self._get_metadata_path(rank)
    with self.fs.create_stream(path, "rb") as stream:
        data = stream.read()
    try:
        found = parse_metadata(data)
    except ValueError as error:
        raise ConfigError(f"{path} is refused: {error}; {ADVICE}") from error
    assert found.storage_meta is not None  # set by _metadata
    found.storage_meta.load_id = self.load_id
    return found


def unpickling_reason(error: BaseException) -> str:
    """Say why torch.load(weights_only=True) refused a file; torch's own message advises the user to run the file's code."""
    if not isinstance(error, pickle.UnpicklingError):
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}, which is not data" if named else "it is no pickle of plain data"


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Replacement of DefaultLoadPlanner.load_bytes, with weights_only."""
    name = read_item.dest_index.fqn
    try:
        entry = torch.load(value, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"entry {name!r} of a checkpoint is refused: {unpickling_reason(error)}; {ADVICE}") from error
    if self.flatten_state_dict:
        torch.distributed.checkpoint.default_planner.set_element(self.original_state_dict, self.mappings[name], entry)
    else:
        self.state_dict[name] = entry


def install_safe_loading() -> None:
    """Replace torch's two readers in this process; calling it again changes nothing."""
    reader: Any = FileSystemReader
    planner: Any = DefaultLoadPlanner
    reader.read_metadata, planner.load_bytes = _read_metadata, _load_bytes


def is_safe_loading_installed() -> bool:
    """Whether both readers are replaced in this process."""
    return FileSystemReader.read_metadata is _read_metadata and DefaultLoadPlanner.load_bytes is _load_bytes
