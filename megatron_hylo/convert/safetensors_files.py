"""Single files of safetensors: read a tensor at a time without mapping the file, and written a tensor at a time.

A mapped file counts as memory of the process as far as it was read, and a process that reads a mapped file after another one
cut it short is killed. So tensors are read into memory of their own, and the file is looked at again for each.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hylo.config import ConfigError

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_state(path: str | Path) -> tuple[int, int, int]:
    """Return (inode, size, modification time in ns) of a file, which differ once it was changed or replaced."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


class SafetensorsFile:
    """A whole, valid file of safetensors.

    Args:
        path: of the file.

    Attributes:
        stored: name -> (safetensors' dtype, shape).

    Raises:
        ConfigError: it is corrupt or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state = file_state(path)
            with safe_open(path, framework="np"):  # checks the header, and that the data is all there; maps the file meanwhile
                pass
            self.file = open(path, "rb", buffering=0)
            (size,) = struct.unpack("<Q", self._bytes(0, 8))
            header: dict[str, Any] = json.loads(self._bytes(8, size))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise ConfigError(f"{path} is corrupt or cut short ({error}); download the checkpoint again") from error
        header.pop("__metadata__", None)
        self.stored = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        self.places = {name: (8 + size + entry["data_offsets"][0], entry["data_offsets"]) for name, entry in header.items()}

    def _bytes(self, start: int, length: int) -> bytes:
        return os.pread(self.file.fileno(), length, start)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or rows of it, into memory of its own, in the stored dtype.

        Args:
            name: of the tensor.
            rows: first row and the one after the last; by default all.

        Raises:
            ConfigError: the file was changed since it was opened, or cannot be read.
        """
        dtype, shape = self.stored[name]
        start, (first, last) = self.places[name]
        if rows is not None:
            row = (last - first) // shape[0]
            start, last = start + rows[0] * row, first + (rows[1] - rows[0]) * row
            shape = (rows[1] - rows[0], *shape[1:])
        out = torch.empty(shape, dtype=DTYPES[dtype])
        buffer, done = memoryview(out.reshape(-1).view(torch.uint8).numpy()) if out.numel() else memoryview(b""), 0
        try:
            self.require_unchanged()
            while done < last - first:
                read = os.preadv(self.file.fileno(), [buffer[done:]], start + done)
                if not read:
                    raise ConfigError(_changed(self.path))
                done += read
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from error
        return out

    def require_unchanged(self) -> None:
        """Refuse a file that was changed, replaced or removed since it was opened.

        Raises:
            ConfigError: it was.
        """
        require_unchanged(self.path, self.state)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def require_unchanged(path: Path, state: tuple[int, int, int]) -> None:
    """Refuse a source file whose `file_state` is another than it was.

    Raises:
        ConfigError: it is, or the file is gone.
    """
    try:
        same = file_state(path) == state
    except OSError as error:
        raise ConfigError(f"{path} went away while it was read ({error}); bring it back and run again") from error
    if not same:
        raise ConfigError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path} was changed while it was read; wait until nothing writes to it (a download, say) and run again"


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Make the beginning of a file of safetensors that holds these tensors, without gaps, in this order.

    Args:
        tensors: name -> (dtype, shape).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor of any shape and dtype, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
