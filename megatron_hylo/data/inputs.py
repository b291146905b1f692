"""Inputs of `hylo preprocess`: several inputs, patterns, Parquet files, chats."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import Document, TextField, Unreadable, read_documents, replace_half_pairs, row_document

PARQUET = ".parquet"


def read_inputs(inputs: Sequence[str | Path], field: TextField) -> Iterator[Document | Unreadable]:
    """Documents of all inputs, in the order given; a pattern's files in the order of their names.

    Args:
        inputs: folders, files, or patterns such as `data/*.jsonl.zst`, as `read_documents` and `read_parquet` take them.
        field: where the text is.

    Raises:
        ConfigError: there is no input, or a pattern has no file.
    """
    for given in inputs:
        found = [Path(given)]
        if not Path(given).exists() and glob.has_magic(str(given)):
            found = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
            if not found:
                raise ConfigError(f"no file is named like {given}; give another pattern, in quotes")
        for path in found:
            yield from read_parquet(path, field) if path.suffix.lower() == PARQUET else read_documents(path, field)


def read_parquet(path: Path, field: TextField) -> Iterator[Document | Unreadable]:
    """Documents of a Parquet file, a row each; only the columns that are needed are read.

    Raises:
        ConfigError: pyarrow is not installed, or the file is not Parquet or has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path} is read with pyarrow, which is not installed: pip install megatron-hylo[data]") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} is not a readable Parquet file ({error}); is the download whole?") from error
    names = table.schema_arrow.names
    if field.key not in names:
        raise ConfigError(f"{path} has no column {field.key!r}; its columns are {', '.join(names)}: give one as key")
    number = 0
    try:
        for batch in table.iter_batches(1024, columns=[n for n in (field.key, "source", "name") if n in names]):
            for row in batch.to_pylist():
                number += 1
                yield row_document(row, f"{replace_half_pairs(str(path))} row {number:,}", path.stem, field)
    except (OSError, pyarrow.ArrowException) as error:
        yield Unreadable(f"{path} row {number + 1:,}", "the rest of the file cannot be read", str(error))


def chat_field(tokenizer: Any, key: str) -> TextField:
    """Conversations under `key`, each a list of {"role", "content"}, as the tokenizer's chat template writes them.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat_template, which chat data needs; give the folder of an instruct model")
    return TextField(key, lambda messages: tokenizer.apply_chat_template(messages, tokenize=False))
