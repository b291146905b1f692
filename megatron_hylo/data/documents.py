"""Documents out of users' text files: their encodings, and what cannot be read, named and counted.

Reading and judging are apart: `read_documents` yields every document or says why one cannot be read, and `TextCheck`
decides what becomes of those. A byte that is invalid in a file's encoding is read as the half surrogate pair
`INVALID`, so that one check finds it and the half pairs that JSON escapes such as "\\ud83d" can make: no tokenizer, and
no file in UTF-8, can hold either.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import zstandard

from megatron_hylo.config import ConfigError

logger = logging.getLogger("megatron_hylo.data")
OnBadText = Literal["skip", "replace", "error"]
TEXT_SUFFIXES = (".txt", ".md", ".rst")
PACKED_SUFFIXES = ("", ".gz", ".bz2", ".xz", ".zst")
LINES_SUFFIXES = tuple(f".jsonl{packed}" for packed in PACKED_SUFFIXES)
FILE_SUFFIXES = tuple(f"{text}{packed}" for text in TEXT_SUFFIXES for packed in PACKED_SUFFIXES)
# first bytes of a compressed file -> what reads it
UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda raw: zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True),
}
MAX_CHARACTERS = 2**28  # of a document; encoding one takes about 65 bytes a character
HOPELESS = 1000  # documents in a row from the first that cannot be used: the rest will not be better
SHOWN = 3  # places shown of each reason
EMPTY, BLANK_LINE = "empty document", "blank line"  # nothing is lost with these
INVALID = "\udcff"
# UTF-32's little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HALF_PAIRS = re.compile("[\ud800-\udfff]")
# a disk's errors, and what is raised for a damaged or cut compressed file
_CANNOT_READ = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_EXPECTED = 'each line must be an object such as {"name": "a", "text": "..."}'


def _invalid_bytes(error: UnicodeError) -> tuple[str, int]:
    """Decoder error handler: `INVALID` in place of the bytes, then go on after them."""
    assert isinstance(error, UnicodeDecodeError)
    return INVALID, error.end


codecs.register_error("megatron_hylo.invalid", _invalid_bytes)


@dataclass(frozen=True)
class Document:
    """One text that is never split between training and held-out data."""

    source: str  # package or folder it came from
    name: str  # decides whether it is held out; unique within its source
    text: str
    where: str = field(default="", compare=False)  # file and line, for messages

    @property
    def place(self) -> str:
        """Name the place of a document, for messages."""
        return self.where or f"{self.source}/{self.name}"


@dataclass(frozen=True)
class TextField:
    """Place of an object's text: under `key`, a string, or what `render` makes one of."""

    key: str = "text"
    render: Callable[[Any], str] | None = None

    def text(self, value: Any) -> "str | Unreadable":
        """The text of what is under the key; without a place where it is none."""
        if self.render is None:
            if isinstance(value, str):
                return value
            return Unreadable("", f'"{self.key}" is not a string', f"it is of type {type(value).__name__}")
        try:
            return self.render(value)
        except Exception as error:  # a template is a program of the tokenizer's author
            return Unreadable("", f'"{self.key}" does not fit the chat template', f"{type(error).__name__}: {error}"[:200])


@dataclass(frozen=True)
class Unreadable:
    """A place in the input that gives no document."""

    where: str
    reason: str  # counted by it
    detail: str = ""


class TextCheck:
    """Passes on the documents that can be tokenised; counts and names the others.

    Args:
        on_bad_text: what becomes of a document with invalid bytes or half a surrogate pair: skip leaves it out, replace
            puts U+FFFD there, error ends. What gives no text at all (a line that is not JSON, say) cannot be
            replaced: it is left out, or with error ends.

    Attributes:
        skipped: how many were left out, by reason.
        replaced: documents with characters replaced.
    """

    def __init__(self, on_bad_text: OnBadText = "skip") -> None:
        self.on_bad_text = on_bad_text
        self.skipped: Counter[str] = Counter()
        self.replaced = 0
        self._places: dict[str, list[str]] = {}
        self._usable = 0

    def usable(self, items: Iterable[Document | Unreadable]) -> Iterator[Document]:
        """The documents that have text, all of it characters; without a byte order mark that was left in front.

        Raises:
            ConfigError: text that is not allowed, with its place; or the first thousand documents cannot be used.
        """
        for item in items:
            if isinstance(item, Unreadable):
                self.skip(item.where, item.reason, item.detail)
                continue
            text = item.text.removeprefix("\ufeff")
            half = None if text.isascii() else _HALF_PAIRS.search(text)
            if half is not None:
                reason = "invalid bytes" if half[0] == INVALID else "half a surrogate pair"
                if self.on_bad_text != "replace":
                    self.skip(item.place, reason, f"at character {half.start():,}")
                    continue
                text = replace_half_pairs(text)
                self.replaced += 1
                self._note(item.place, f"{reason} replaced by U+FFFD")
            if text.strip():
                self._usable += 1
                yield Document(replace_half_pairs(item.source), replace_half_pairs(item.name), text, item.where)
            else:
                self.skip(item.place, EMPTY)

    def failed(self, document: Document, error: BaseException | str) -> None:
        """Count a document that passed, but that the tokenizer could not encode."""
        self._usable -= 1
        self.skip(document.place, "tokenizer failed", str(error))

    def skip(self, where: str, reason: str, detail: str = "") -> None:
        """Leave something out.

        Raises:
            ConfigError: `on_bad_text` is error, or nothing so far could be used and there were many.
        """
        nothing_lost = reason in (EMPTY, BLANK_LINE)
        if self.on_bad_text == "error" and not nothing_lost:
            raise ConfigError(f"{where}: {reason}{f' ({detail})' if detail else ''}; repair it, or give on_bad_text skip")
        self.skipped[reason] += 1
        self._note(where, reason, detail, quiet=nothing_lost)
        lost = self.skipped.total() - self.skipped[EMPTY] - self.skipped[BLANK_LINE]
        if lost >= HOPELESS and self._usable <= 0:
            raise ConfigError(f"nothing of the first {lost:,} documents can be used: {self.summary()}")

    def summary(self) -> str:
        """Describe what was left out or changed, by reason with the first places; empty where nothing was."""
        parts = [f"{count:,} x {reason} ({', '.join(self._shown(reason, count))})" for reason, count in self.skipped.items()]
        if self.replaced:
            parts.append(f"{self.replaced:,} x characters replaced by U+FFFD")
        return "; ".join(parts)

    def report(self, documents: int) -> None:
        """Say at the end what was left out of how much: a warning where text was lost or changed."""
        if self.skipped or self.replaced:
            lost = self.replaced or any(reason not in (EMPTY, BLANK_LINE) for reason in self.skipped)
            say = logger.warning if lost else logger.info
            say("%d documents are used; left out or changed: %s", documents, self.summary())

    def _note(self, where: str, reason: str, detail: str = "", quiet: bool = False) -> None:
        places = self._places.setdefault(reason, [])
        if len(places) < SHOWN:
            places.append(where)
            if not quiet:
                logger.warning("%s: %s%s", where, reason, f" ({detail})" if detail else "")

    def _shown(self, reason: str, count: int) -> list[str]:
        return [*self._places[reason], *(["..."] if count > SHOWN else [])]


def replace_half_pairs(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, `INVALID` among them."""
    return text if text.isascii() else _HALF_PAIRS.sub("\ufffd", text)


def read_documents(path: str | Path, field: TextField = TextField()) -> Iterator[Document | Unreadable]:
    """Documents at `path`, one at a time, in a fixed order, and the places that give none.

    Text is UTF-8, or what a byte order mark says (UTF-8, UTF-16, UTF-32). Lines end in LF, CRLF or CR.

    Args:
        path: a .jsonl file, each line an object with "text" and perhaps "source" and "name" (by default a hash of the text),
            a .txt, .md or .rst file, one document, or a folder, all such text files in which (at any depth) are documents
            named by their path. All may be compressed: .gz, .bz2, .xz, .zst.
        field: the key of the text, and how it is made a string.

    Raises:
        ConfigError: nothing there, no text in it, a .jsonl file that cannot be opened, is binary or UTF-16 without a byte
            order mark, or is one JSON value over several lines.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path)
    elif path.is_file() and path.name.lower().endswith(LINES_SUFFIXES):
        yield from _read_lines(path, field)
    elif path.is_file() and path.name.lower().endswith(FILE_SUFFIXES):
        text = read_text_file(path)
        where = replace_half_pairs(str(path))
        yield Document(path.parent.name, path.name, text, where) if isinstance(text, str) else text
    else:
        what = (
            "does not exist"
            if not path.exists()
            else f"is not a .jsonl, .parquet or text file ({', '.join(PACKED_SUFFIXES[1:])})"
        )
        raise ConfigError(
            f"{path} {what}; give a folder of {', '.join(TEXT_SUFFIXES)} files or a .jsonl file with a 'text' field"
        )


def open_text(file: Path) -> TextIO:
    """Open text in the encoding that its byte order mark says, else UTF-8, unpacked where it is compressed (gz, bz2, xz, zst).

    Invalid bytes are read as `INVALID`; line ends as LF.

    Raises:
        ValueError: NUL bytes in the first line.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    raw = open(file, "rb")
    try:
        first = raw.peek(6)
        for magic, unpack in UNPACK.items():
            if first.startswith(magic):
                raw = io.BufferedReader(unpack(raw))
        start = raw.peek(4096)[:4096]  # a zstd stream cannot seek
        mark, encoding = next((found for found in BYTE_ORDER_MARKS if start.startswith(found[0])), (b"", "utf-8"))
        if not mark and b"\0" in start.split(b"\n", 1)[0]:  # further down, one torn line need not spoil the file
            raise ValueError("NUL bytes: a binary file, or UTF-16 without a byte order mark")
        raw.read(len(mark))
        return io.TextIOWrapper(raw, encoding, errors="megatron_hylo.invalid", newline=None)
    except BaseException:
        raw.close()
        raise


def _read_folder(path: Path) -> Iterator[Document | Unreadable]:
    refused: list[OSError] = []
    found = [Path(folder, name) for folder, _, names in os.walk(path, onerror=refused.append) for name in names]
    files = sorted(file for file in found if file.suffix.lower() in TEXT_SUFFIXES)
    if not files:
        raise ConfigError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} file; give a folder of text files or a .jsonl file")
    if len(found) > len(files):
        logger.info("%s: %d files are not read, whose names do not end in %s", path, len(found) - len(files), TEXT_SUFFIXES)
    for error in refused:
        yield Unreadable(replace_half_pairs(str(error.filename)), "folder cannot be read", str(error.strerror))
    for file in files:
        text = read_text_file(file)
        where = replace_half_pairs(str(file))
        yield Document(path.name, file.relative_to(path).as_posix(), text, where) if isinstance(text, str) else text


def read_text_file(file: Path) -> str | Unreadable:
    """Text of a file as `open_text` reads it, or why there is none."""
    where = replace_half_pairs(str(file))
    try:
        if not file.is_file():
            return Unreadable(where, "not a file", "a broken link, a pipe or a device")
        with open_text(file) as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except ValueError as error:
        return Unreadable(where, "not text", str(error))
    except _CANNOT_READ as error:
        return Unreadable(where, "file cannot be read", str(error))
    if len(text) > MAX_CHARACTERS:
        return Unreadable(where, f"longer than {MAX_CHARACTERS:,} characters")
    if "\0" in text:
        return Unreadable(where, "not text", "NUL bytes")
    return text


def _read_lines(path: Path, field: TextField) -> Iterator[Document | Unreadable]:
    shown, source = replace_half_pairs(str(path)), path.name[: path.name.lower().rindex(".jsonl")]
    try:
        lines = open_text(path)
    except ValueError as error:
        raise ConfigError(f"{shown} holds {error}; convert it, e.g. iconv -f UTF-16LE -t UTF-8") from error
    except _CANNOT_READ as error:
        raise ConfigError(f"{shown} cannot be read: {error}") from error
    number, first = 0, True
    with lines:
        while True:
            where = f"{shown} line {number + 1:,}"
            try:
                line = lines.readline(MAX_CHARACTERS)
                number += 1
                long = len(line) == MAX_CHARACTERS and line[-1] != "\n"
                rest = line
                while long and len(rest) == MAX_CHARACTERS and rest[-1] != "\n":
                    rest = lines.readline(MAX_CHARACTERS)
            except _CANNOT_READ as error:
                yield Unreadable(where, "the rest of the file cannot be read", str(error) or type(error).__name__)
                return
            if not line:
                return
            if first and line.strip():
                _check_first_line(line, shown)
                first = False
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
    """The document of an object that has the field's key."""
    text = field.text(value[field.key])
    if isinstance(text, Unreadable):
        return Unreadable(where, text.reason, text.detail)
    name = value.get("name") or hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
    return Document(str(value.get("source") or source), str(name), text, where)
