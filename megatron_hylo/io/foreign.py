"""Load third-party models and tokenizers through transformers without executing code from their folders.

A Hugging Face folder can ask transformers to import its Python files (`auto_map`), to unpickle its weights
(pytorch_model.bin), or to download attention kernels (`attn_implementation`). All three are disabled here, without a prompt.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io.gguf_file import parsed_once

ERRORS = (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError)  # raised by transformers for unusable folders
OLDEST = "5.17"  # transformers that pyproject.toml asks for; an older one fails in ways that do not say so


def load_transformers() -> Any:
    """Import transformers lazily (it takes seconds), with its progress bars switched off."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_foreign_model(cls: Any, folder: str | Path, **settings: Any) -> Any:
    """Call cls.from_pretrained(folder) with safetensors or GGUF weights and transformers' own classes and attention only.

    Raises:
        ConfigError: the folder cannot be loaded that way.
    """
    from transformers import AutoConfig

    if (Path(folder) / "adapter_config.json").is_file():  # transformers would load the model that it names, from anywhere
        raise ConfigError(f"{folder} holds a PEFT adapter (adapter_config.json); merge it into its base model first")
    place = {"gguf_file": settings["gguf_file"]} if "gguf_file" in settings else {}
    config = _load(getattr(cls, "config_class", None) or AutoConfig, folder, **place)
    config._attn_implementation = None  # the default; config.json may name a repository of kernels
    return _load(cls, folder, config=config, use_safetensors=True, **settings)


def load_foreign_tokenizer(folder: str | Path, **settings: Any) -> Any:
    """Call AutoTokenizer.from_pretrained(folder) with transformers' own classes only.

    Raises:
        ConfigError: the folder cannot be loaded that way.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, folder, **settings)


def _load(cls: Any, folder: str | Path, **settings: Any) -> Any:
    try:
        with parsed_once() if "gguf_file" in settings else contextlib.nullcontext():
            return cls.from_pretrained(folder, trust_remote_code=False, **settings)
    except ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        if outdated := _outdated_transformers():
            raise ConfigError(f"{folder} cannot be loaded: {reason}; {outdated}") from error
        if isinstance(error, ImportError):  # a package of the folder's quantisation, which the reason names
            raise ConfigError(f"{folder} cannot be loaded: {reason}") from error
        raise ConfigError(
            f"{folder} cannot be loaded: {reason or type(error).__name__} (code and pickles of a folder are never run: convert "
            f"its weights to safetensors, and use an architecture and tokenizer that transformers has itself)"
        ) from error


def _outdated_transformers() -> str:
    """Sentence on an installed transformers that is older than `OLDEST`; empty where it is not."""
    installed = load_transformers().__version__
    found, oldest = (tuple(int(part) for part in re.findall(r"\d+", version)[:2]) for version in (installed, OLDEST))
    if found >= oldest:
        return ""
    return f"transformers {installed} is installed, {OLDEST} or later is needed; pip install 'transformers>={OLDEST},<6'"
