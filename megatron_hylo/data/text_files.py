"""Text files of users: encodings by their byte order marks, compression, and what cannot be read, named.

Text is UTF-8, or what a byte order mark says (UTF-8, UTF-16, UTF-32). Lines end in LF, CRLF or CR.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import zstandard

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import BLANK_LINE, INVALID, Document, TextField, Unreadable, replace_half_pairs

logger = logging.getLogger("megatron_hylo.data")
# first bytes of a compressed file -> what reads it
UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda raw: zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True),
}
MAX_CHARACTERS = 2**28  # of a document; encoding one takes about 65 bytes a character
# UTF-32's little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# a disk's errors, and what is raised for a damaged or cut compressed file
CANNOT_READ = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_EXPECTED = 'each line must be an object such as {"name": "a", "text": "..."}'


def _invalid_bytes(error: UnicodeError) -> tuple[str, int]:
    """Decoder error handler: `INVALID` in place of the bytes, then go on after them."""
    assert isinstance(error, UnicodeDecodeError)
    return INVALID, error.end


codecs.register_error("megatron_hylo.invalid", _invalid_bytes)


def open_text(raw: BinaryIO) -> TextIO:
    """Text of an open file, unpacked where it is compressed (gz, bz2, xz, zst); invalid bytes as `INVALID`, line ends as LF.

    Args:
        raw: buffered and at its start; whoever opened it closes it.

    Raises:
        ValueError: NUL bytes in the first line.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    stream: Any = raw
    first = stream.peek(6)
    for magic, unpack in UNPACK.items():
        if first.startswith(magic):
            stream = io.BufferedReader(unpack(raw))
    start = stream.peek(4096)[:4096]  # a zstd stream cannot seek
    mark, encoding = next((found for found in BYTE_ORDER_MARKS if start.startswith(found[0])), (b"", "utf-8"))
    if not mark and b"\0" in start.split(b"\n", 1)[0]:  # further down, one torn line need not spoil the file
        raise ValueError("NUL bytes: a binary file, or UTF-16 without a byte order mark")
    stream.read(len(mark))
    return io.TextIOWrapper(stream, encoding, errors="megatron_hylo.invalid", newline=None)


def read_text_file(file: Path) -> str | Unreadable:
    """Text of a file as `open_text` reads it, or why there is none."""
    where = replace_half_pairs(str(file))
    try:
        if not file.is_file():
            return Unreadable(where, "not a file", "a broken link, a pipe or a device")
        with open(file, "rb") as raw, open_text(raw) as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except ValueError as error:
        return Unreadable(where, "not text", str(error))
    except CANNOT_READ as error:
        return Unreadable(where, "file cannot be read", str(error) or type(error).__name__)
    if len(text) > MAX_CHARACTERS:
        return Unreadable(where, f"longer than {MAX_CHARACTERS:,} characters")
    if "\0" in text:
        return Unreadable(where, "not text", "NUL bytes")
    return text


def read_text_folder(folder: Path, suffixes: Sequence[str], source: str) -> Iterator[tuple[str, str]]:
    """Text files at any depth of a folder, in the order of their names, apart from a .gz.

    Args:
        folder: to look in.
        suffixes: of text files; "" of those without any.
        source: whose files they are, for warnings of what is left out or has invalid bytes.

    Yields:
        (path inside the folder without .gz, text). Symbolic links are left out: they repeat files.
    """
    files = {str(file.relative_to(folder)).removesuffix(".gz"): file for file in folder.rglob("*") if not file.is_symlink()}
    for path in sorted(files):
        file = files[path]
        if file.is_file() and Path(path).suffix in suffixes:
            text = read_text_file(file)
            if isinstance(text, Unreadable):
                logger.warning("%s: %s is left out: %s (%s)", source, path, text.reason, text.detail)
                continue
            if (shown := replace_half_pairs(text)) != text:
                logger.warning("%s: %s is not valid UTF-8; U+FFFD stands for what is not", source, path)
            yield path, shown


def read_lines(path: Path, raw: BinaryIO, field: TextField, skip: int = 0) -> Iterator[Document | Unreadable]:
    """Documents of a .jsonl file, an item a line.

    Args:
        path: of the file, for messages and names.
        raw: the file, open.
        field: where a line's text is.
        skip: lines that are passed over at its start.

    Raises:
        ConfigError: it is binary, UTF-16 without a byte order mark, or one JSON value over several lines.
    """
    shown, source = replace_half_pairs(str(path)), path.name[: path.name.lower().rindex(".jsonl")]
    try:
        lines = open_text(raw)
    except ValueError as error:
        raise ConfigError(f"{shown} holds {error}; convert it, e.g. iconv -f UTF-16LE -t UTF-8") from error
    except CANNOT_READ as error:
        yield Unreadable(shown, "file cannot be read", str(error) or type(error).__name__)
        return
    number, first = 0, True
    while True:
        where = f"{shown} line {number + 1:,}"
        try:
            line = lines.readline(MAX_CHARACTERS)
            number += 1
            long = len(line) == MAX_CHARACTERS and line[-1] != "\n"
            rest = line
            while long and len(rest) == MAX_CHARACTERS and rest[-1] != "\n":
                rest = lines.readline(MAX_CHARACTERS)
        except CANNOT_READ as error:
            yield Unreadable(where, "the rest of the file cannot be read", str(error) or type(error).__name__)
            return
        if not line:
            return
        if first and line.strip():
            _check_first_line(line, shown)
            first = False
        if number <= skip:
            continue
        if long:
            yield Unreadable(where, f"longer than {MAX_CHARACTERS:,} characters")
        elif line.strip():
            yield _parse_line(line, where, source, field)
        else:
            yield Unreadable(where, BLANK_LINE)


def _check_first_line(line: str, shown: str) -> None:
    start = line.strip()
    if start[0] == "[":
        raise ConfigError(f"{shown} is a JSON array, and {_EXPECTED}: jq -c '.[]' makes lines of it")
    if start == "{":
        raise ConfigError(f"{shown} has JSON over several lines, and {_EXPECTED}: jq -c . makes lines of it")


def _parse_line(line: str, where: str, source: str, field: TextField) -> Document | Unreadable:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(where, "not JSON", "NUL bytes" if "\0" in line else f"{error.msg} at character {error.pos:,}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets a thousand deep
        return Unreadable(where, "not JSON", str(error))
    if not isinstance(value, dict):
        return Unreadable(where, "not an object", _EXPECTED)
    if field.key not in value:
        return Unreadable(where, f'no "{field.key}"', replace_half_pairs(f"the keys are {', '.join(list(value)[:8])}"))
    return row_document(value, where, source, field)


def row_document(value: dict[str, Any], where: str, source: str, field: TextField) -> Document | Unreadable:
    """The document of an object that has the field's key; `Unreadable` where the field finds no text.

    Args:
        value: object of a line or row; "name" and "source" of it are the document's, else a hash of the text and `source`.
        where: file and line, for messages.
        source: of what does not name one.
        field: tells the key and reads its value.
    """
    found = field.text(value[field.key])
    if isinstance(found, Unreadable):
        return Unreadable(where, found.reason, found.detail)
    text, answers = found
    name = value.get("name") or hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
    return Document(str(value.get("source") or source), str(name), text, where, answers)
