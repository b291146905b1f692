"""Inputs of `hylo preprocess`: folders, files and patterns, read in a fixed order from any place on."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import TEXT, Document, TextField, Unreadable, replace_half_pairs
from megatron_hylo.data.text_files import read_lines, read_text_file, row_document

logger = logging.getLogger("megatron_hylo.data")
TEXT_SUFFIXES = (".txt", ".md", ".rst")
PACKED_SUFFIXES = ("", ".gz", ".bz2", ".xz", ".zst")
LINES_SUFFIXES = tuple(f".jsonl{packed}" for packed in PACKED_SUFFIXES)
FILE_SUFFIXES = tuple(f"{text}{packed}" for text in TEXT_SUFFIXES for packed in PACKED_SUFFIXES)
PARQUET = ".parquet"
ROWS = 1024  # of a Parquet file that are read together


@dataclass(frozen=True)
class InputFile:
    """A file with documents."""

    path: Path
    folder: Path | None = None  # that was given, by which its documents are named

    @property
    def identity(self) -> tuple[str, int, int]:
        """Path, size and time of change: another file has another."""
        try:
            found = os.stat(self.path)
        except OSError:
            return str(self.path), -1, -1
        return replace_half_pairs(str(self.path.absolute())), found.st_size, found.st_mtime_ns


class InputReader:
    """Documents of all inputs, in the order given, and the places that give none; each line, row or text file is an item.

    Args:
        inputs: folders, files, or patterns such as `data/*.jsonl.zst`. A file is .jsonl, each line an object with "text" and
            perhaps "source" and "name" (by default a hash of the text); .txt, .md or .rst, one document; or .parquet, each row
            a document. All but Parquet may be compressed: .gz, .bz2, .xz, .zst. A folder's are its .txt, .md and .rst files
            at any depth, named by their path.
        field: where an object's text is.

    Raises:
        ConfigError: there is no input, a pattern has no file, or a file is of another kind.
    """

    def __init__(self, inputs: Sequence[str | Path], field: TextField = TEXT) -> None:
        self.field = field
        self.files: list[InputFile | Unreadable] = [file for given in inputs for file in _files(Path(given))]
        self._sizes = [file.path.stat().st_size if isinstance(file, InputFile) and file.path.is_file() else 0
                       for file in self.files]  # fmt: skip
        self._read = 0
        self._raw: BinaryIO | None = None
        self.position = (0, 0)

    def items(self, position: tuple[int, int] = (0, 0)) -> Iterator[Document | Unreadable]:
        """Read from (file, item of it) on; `position` is behind the item that came last.

        Raises:
            ConfigError: a file of another format than its name says, or a Parquet file without the column.
        """
        first, skip = position
        self._read = sum(self._sizes[:first])
        for number in range(first, len(self.files)):
            self.position = (number, skip)
            for item in self._items(self.files[number], skip):
                self.position = (number, self.position[1] + 1)
                yield item
            self._read, skip = self._read + self._sizes[number], 0
            self.position = (number + 1, 0)

    @property
    def share(self) -> float:
        """Part of the bytes of all files that has been read."""
        inside = self._raw.tell() if self._raw is not None and not self._raw.closed else 0
        return (self._read + inside) / max(1, sum(self._sizes))

    def _items(self, file: InputFile | Unreadable, skip: int) -> Iterator[Document | Unreadable]:
        if isinstance(file, Unreadable):
            yield from [file][skip:]
            return
        path, name = file.path, file.path.name.lower()
        if not name.endswith((*LINES_SUFFIXES, PARQUET)):
            if not skip:
                yield _text_document(file)
            return
        try:
            self._raw = raw = open(path, "rb")
        except OSError as error:
            yield from [Unreadable(replace_half_pairs(str(path)), "file cannot be read", str(error))][skip:]
            return
        with raw:
            if name.endswith(PARQUET):
                yield from read_parquet(path, raw, self.field, skip)
            else:
                yield from read_lines(path, raw, self.field, skip)


def read_documents(path: str | Path, field: TextField = TEXT) -> Iterator[Document | Unreadable]:
    """Documents of one input, and the places that give none; see `InputReader`."""
    yield from InputReader([path], field).items()


def read_parquet(path: Path, raw: BinaryIO, field: TextField, skip: int = 0) -> Iterator[Document | Unreadable]:
    """Documents of a Parquet file, a row each; only the columns that are needed are read.

    Args:
        path: of the file, for messages and names.
        raw: the file, open.
        field: the column with the text.
        skip: rows that are passed over.

    Raises:
        ConfigError: pyarrow is not installed, or the file has no such column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path} is read with pyarrow, which is not installed: pip install megatron-hylo[data]") from error
    shown = replace_half_pairs(str(path))
    try:
        table = pyarrow.parquet.ParquetFile(raw)
    except (OSError, pyarrow.ArrowException) as error:
        yield from [Unreadable(shown, "file cannot be read", f"{error}; is the download whole?")][skip:]
        return
    names = table.schema_arrow.names
    if field.key not in names:
        raise ConfigError(f"{path} has no column {field.key!r}; its columns are {', '.join(names)}: give one as key")
    number = 0
    try:
        for batch in table.iter_batches(ROWS, columns=[n for n in (field.key, "source", "name") if n in names]):
            if number + len(batch) <= skip:
                number += len(batch)
                continue
            for row in batch.to_pylist():
                number += 1
                if number > skip:
                    yield row_document(row, f"{shown} row {number:,}", path.stem, field)
    except (OSError, pyarrow.ArrowException) as error:
        yield Unreadable(f"{shown} row {number + 1:,}", "the rest of the file cannot be read", str(error))


def _files(given: Path) -> Iterator[InputFile | Unreadable]:
    """Files of an input."""
    found = [given]
    if not given.exists() and glob.has_magic(str(given)):
        found = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
        if not found:
            raise ConfigError(f"no file is named like {given}; give another pattern, in quotes")
    for path in found:
        if path.is_dir():
            yield from _folder_files(path)
        elif path.is_file() and path.name.lower().endswith((*LINES_SUFFIXES, *FILE_SUFFIXES, PARQUET)):
            yield InputFile(path)
        else:
            what = "does not exist"
            if path.exists():
                what = f"is not a .jsonl, .parquet or text file ({', '.join(PACKED_SUFFIXES[1:])})"
            raise ConfigError(
                f"{path} {what}; give a folder of {', '.join(TEXT_SUFFIXES)} files or a .jsonl file with a 'text' field"
            )


def _folder_files(path: Path) -> Iterator[InputFile | Unreadable]:
    refused: list[OSError] = []
    found = [Path(folder, name) for folder, _, names in os.walk(path, onerror=refused.append) for name in names]
    files = sorted(file for file in found if file.suffix.lower() in TEXT_SUFFIXES)
    if not files:
        raise ConfigError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} file; give a folder of text files or a .jsonl file")
    if len(found) > len(files):
        logger.info("%s: %d files are not read, whose names do not end in %s", path, len(found) - len(files), TEXT_SUFFIXES)
    for error in refused:
        yield Unreadable(replace_half_pairs(str(error.filename)), "folder cannot be read", str(error.strerror))
    yield from (InputFile(file, path) for file in files)


def _text_document(file: InputFile) -> Document | Unreadable:
    text = read_text_file(file.path)
    if isinstance(text, Unreadable):
        return text
    folder = file.folder or file.path.parent
    return Document(folder.name, file.path.relative_to(folder).as_posix(), text, replace_half_pairs(str(file.path)))
