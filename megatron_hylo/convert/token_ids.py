"""Token ids that begin, end and pad a text: read from a source, kept beside the tokenizer, exported again."""

import json
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.hf_keys import TOKEN_IDS
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.io import write_json
from megatron_hylo.io.gguf_file import gguf_file, gguf_token_ids

GENERATION_CONFIG = "generation_config.json"


def generation_settings(source: Path, tokenizer: Any | None) -> dict[str, Any]:
    """Return a source's generation_config.json, completed with the token ids that it lacks.

    Those that the file lacks are config.json's (or the GGUF file's own), and then those of the tokenizer.

    Args:
        source: Hugging Face folder or GGUF file.
        tokenizer: of transformers, or None.

    Raises:
        ConfigError: a file that is not a JSON object.
    """
    gguf = gguf_file(source)
    settings = {} if gguf else _json_object(source / GENERATION_CONFIG)
    config = gguf_token_ids(gguf) if gguf else _json_object(source / "config.json")
    for name in TOKEN_IDS:
        candidates = (settings.get(name), config.get(name), getattr(tokenizer, name, None))
        found = [value for value in candidates if value is not None]
        if found:
            settings[name] = found[0]
    return settings


def stored_token_ids(folder: Path | None) -> dict[str, Any]:
    """Read bos_token_id, eos_token_id and pad_token_id from a tokenizer folder's generation_config.json, those it has.

    A folder that was made without that file (by other programs) is asked for its tokenizer.
    """
    if folder is None or not folder.is_dir():
        return {}
    settings = _json_object(folder / GENERATION_CONFIG)
    if any(name not in settings for name in TOKEN_IDS):
        settings = generation_settings(folder, load_transformers_tokenizer(folder))
    return {name: settings[name] for name in TOKEN_IDS if settings.get(name) is not None}


def save_tokenizer(source: Path, folder: Path) -> None:
    """Save tokenizer files and generation_config.json (for the ids that end generation), those that there are."""
    tokenizer = load_transformers_tokenizer(source)
    settings = generation_settings(source, tokenizer)
    if tokenizer is not None or settings:
        folder.mkdir()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if settings:
        write_json(folder / GENERATION_CONFIG, settings)


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return value
