"""Tokenizers of Hugging Face folders and GGUF files, through transformers."""

from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.data.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from megatron_hylo.io.folder_kinds import hint
from megatron_hylo.io.foreign import load_foreign_tokenizer, load_transformers
from megatron_hylo.io.gguf_file import gguf_fields, gguf_file

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a folder with one of these files has a tokenizer


def find_tokenizer(path: Path) -> Path:
    """The place of the tokenizer of a Hugging Face folder, model folder or GGUF file; nothing is read.

    Raises:
        ConfigError: there is none.
    """
    place = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not place.exists() or (gguf_file(place) is None and not any((place / name).is_file() for name in TOKENIZERS)):
        raise no_tokenizer(path)
    return place


def no_tokenizer(path: Path) -> ConfigError:
    """The error about a path at which there is no tokenizer."""
    return ConfigError(
        f"{path} holds no tokenizer{hint(path, 'model')}; give a folder with tokenizer.json, a .gguf file, or a model folder"
    )


def load_transformers_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer at `path` (Hugging Face folder or GGUF), or None where the folder has none."""
    load_transformers()
    path = Path(path)
    gguf = gguf_file(path)
    if gguf:
        return _gguf_tokenizer(gguf)
    if not any((path / name).is_file() for name in TOKENIZERS):
        return None
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return load_sentencepiece_tokenizer(path)
    return load_foreign_tokenizer(path)


def _gguf_tokenizer(file: Path) -> Any | None:
    """The tokenizer inside a GGUF file (None: it has none), with two things set that transformers leaves out of it.

    The end-of-sequence token is the one the file names, and the file's pre-tokenizer "smollm" splits digits one by
    one before the byte-level split (235 of 721 documents tokenise differently without it).
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    fields = gguf_fields(file)
    if "tokenizer.ggml.tokens" not in fields:
        return None
    tokenizer = load_foreign_tokenizer(file.parent, gguf_file=file.name)
    if "tokenizer.ggml.eos_token_id" in fields:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(fields["tokenizer.ggml.eos_token_id"].contents()))
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() == "smollm":
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer
