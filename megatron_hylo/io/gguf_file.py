"""Find and open a GGUF file (llama.cpp's format): its keys and its token ids."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError


def gguf_file(path: Path) -> Path | None:
    """The one .gguf file at `path` (the file itself, or a folder with exactly one and no config.json)."""
    if path.suffix == ".gguf":
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise ConfigError(f"{path} holds several .gguf files; name one of {', '.join(f.name for f in files)}")
    return files[0] if files else None


def gguf_fields(file: Path) -> dict[str, Any]:
    """The keys of a GGUF file; `.contents()` of each is its value.

    Raises:
        ConfigError: not a GGUF file, or cut short.
    """
    return open_gguf(file).fields


def gguf_token_ids(file: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where a turn or message of a chat ends with another) and pad_token_id, those named."""
    fields = gguf_fields(file)
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding", "eos", "eot", "eom")}
    ids = {name: int(fields[key].contents()) for name, key in keys.items() if key in fields}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    found = {"bos_token_id": ids.get("bos"), "pad_token_id": ids.get("padding")}
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {name: value for name, value in found.items() if value is not None}


def open_gguf(file: Path) -> Any:
    """The gguf package's reader of a file, kept while the file stays as it is: parsing a vocabulary takes seconds."""
    try:
        state = file.stat()
        return _reader(file, state.st_size, state.st_mtime_ns)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError(f"{file} is not a whole GGUF file ({error}); download it again") from error


@lru_cache(maxsize=1)
def _reader(file: Path, size: int, changed: int) -> Any:
    from gguf import GGUFReader

    return GGUFReader(file)
