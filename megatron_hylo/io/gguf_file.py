"""Access to GGUF files (llama.cpp's format): location, metadata keys and special token ids."""

import contextlib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError


def gguf_file(path: Path) -> Path | None:
    """Return the one .gguf file at `path` (the file itself, or in a directory without config.json), or None.

    Raises:
        ConfigError: the directory holds several.
    """
    if path.suffix == ".gguf":
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise ConfigError(f"{path} holds several .gguf files; name one of {', '.join(f.name for f in files)}")
    return files[0] if files else None


def gguf_fields(file: Path) -> dict[str, Any]:
    """Return the metadata fields of a GGUF file by key; a field's `.contents()` is its value.

    Raises:
        ConfigError: not a GGUF file, or cut short.
    """
    return open_gguf(file).fields


def gguf_token_ids(file: Path) -> dict[str, Any]:
    """Return bos_token_id, eos_token_id and pad_token_id, those that the file has.

    eos_token_id is a list where a chat turn or message ends with another token.
    """
    fields = gguf_fields(file)
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding", "eos", "eot", "eom")}
    ids = {name: int(fields[key].contents()) for name, key in keys.items() if key in fields}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    eos = ends[0] if len(ends) == 1 else ends or None
    found = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding"), "eos_token_id": eos}
    return {name: value for name, value in found.items() if value is not None}


def open_gguf(file: Path) -> Any:
    """Return the gguf package's reader of a file, cached until the file changes: parsing a vocabulary takes seconds.

    Raises:
        ConfigError: not a GGUF file, or cut short.
    """
    try:
        state = file.stat()
        return _reader(file.resolve(), state.st_size, state.st_mtime_ns)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError(f"{file} is not a whole GGUF file ({error}); download it again") from error


@lru_cache(maxsize=1)
def _reader(file: Path, size: int, changed: int) -> Any:
    from megatron_hylo.io.gguf_quick_reader import QuickReader

    return QuickReader(file)


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Have transformers read GGUF files by `open_gguf` in this block, and make its map of tensor names once.

    It parses the header for the configuration, the tokenizer and the weights anew, and makes the map for each module.
    """
    import gguf

    module: Any = gguf
    reader, names = module.GGUFReader, module.get_tensor_name_map
    module.GGUFReader, module.get_tensor_name_map = lambda path: open_gguf(Path(path)), cache(names)
    try:
        yield
    finally:
        module.GGUFReader, module.get_tensor_name_map = reader, names
