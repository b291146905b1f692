"""Token ids of documents.

Byte-level BPE encodes each word of a text on its own, and most words of a text have come before: `WordCache` keeps the ids of
words, cut by the tokenizer's own pattern, and asks the tokenizer for new ones alone. It is used where the pattern is known to
cut as the tokenizer does (GPT-2's, that with single digits, and any that tokenizer.json gives as a Split); every other text,
and every other tokenizer, goes through the tokenizer as a whole.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex
from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)
CACHED_WORDS = 2**19  # about 100 MB; then the cache begins anew
LONGEST_CACHED = 64  # characters of a word
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same behind a split into single digits, before which white space is not cut
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Classes of ASCII characters; Python's own engine, which has no \p, is twice as fast with them.
ASCII = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r" \t\n\r\f\v", r"\S": r" \t\n\r\f\v"}
Spans = Sequence[tuple[int, int]]


@dataclass
class Encoded:
    """Ids of a batch of documents, each with its end token.

    Attributes:
        ids: of all documents, end to end, in the dataset's dtype.
        lengths: tokens of each document; 0 where it could not be encoded.
        errors: why, by the document's place in the batch.
        answers: (first, last + 1) tokens of each document's answers; None where its text is learnt as a whole.
    """

    ids: bytes
    lengths: list[int]
    errors: dict[int, str] = field(default_factory=dict)
    answers: list[list[tuple[int, int]] | None] = field(default_factory=list)


@dataclass(frozen=True)
class EncoderSettings:
    """All that makes ids of texts; can be sent to another process.

    Attributes:
        tokenizer: content of a tokenizer.json.
        end: token that ends every document.
        dtype: of the ids.
        special_tokens: text that looks like a special token is that token.
    """

    tokenizer: str
    end: int
    dtype: str
    special_tokens: bool = False


def plain_encoder(tokenizer: Any, special_tokens: bool = False) -> Tokenizer:
    """A copy of the tokenizer's Rust part: no truncation or padding; special tokens in a text are text by default."""
    return _plain(tokenizer.backend_tokenizer.to_str(), special_tokens)


def _plain(content: str, special_tokens: bool) -> Tokenizer:
    encoder = Tokenizer.from_str(content)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = not special_tokens  # "<|endoftext|>" in a document is text about that token
    return encoder


class DocumentEncoder:
    """Encodes batches of texts; one that the tokenizer fails on is named, and the others are encoded."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.dtype = np.dtype(settings.dtype)
        self.end = self.dtype.type(settings.end).tobytes()
        self.encoder = _plain(settings.tokenizer, settings.special_tokens)
        pattern = None if settings.special_tokens else word_pattern(settings.tokenizer)
        self.words = WordCache(settings.tokenizer, pattern, self.dtype) if pattern else None

    def encode(self, texts: Sequence[str], answers: Sequence[Spans | None] | None = None) -> Encoded:
        """Ids of each text.

        Args:
            texts: characters that UTF-8 can hold.
            answers: characters of each that are answers; None for all.
        """
        found: list[bytes | str] = [b""] * len(texts)
        marked: list[list[tuple[int, int]] | None] = [None] * len(texts)
        fast = [i for i, text in enumerate(texts) if self.words is not None and self.words.can_encode(text)]
        fast = [i for i in fast if answers is None or answers[i] is None]
        if self.words is not None and fast:
            for i, ids in zip(fast, self.words.encode([texts[i] for i in fast]), strict=True):
                found[i] = ids
        slow = sorted(set(range(len(texts))) - set(fast))
        with_offsets = [i for i in slow if answers is not None and answers[i] is not None]
        for some, function in (
            ([i for i in slow if i not in set(with_offsets)], self.encoder.encode_batch_fast),
            (with_offsets, self.encoder.encode_batch),
        ):
            for i, encoding in zip(some, self._encodings([texts[i] for i in some], function), strict=True):
                if isinstance(encoding, str):
                    found[i] = encoding
                    continue
                ids = np.array(encoding.ids, self.dtype).tobytes()
                found[i] = ids or "it makes no token of the text"
                if answers is not None and (spans := answers[i]) is not None:
                    marked[i] = answer_tokens(encoding, spans)
        lengths: list[int] = []
        errors: dict[int, str] = {}
        parts: list[bytes] = []
        for i, result in enumerate(found):
            if isinstance(result, str):
                errors[i] = result
                lengths.append(0)
            else:
                lengths.append(len(result) // self.dtype.itemsize + 1)
                parts += [result, self.end]
        return Encoded(b"".join(parts), lengths, errors, marked if answers is not None else [])

    def _encodings(self, texts: list[str], function: Callable[..., list[Encoding]]) -> Iterator[Encoding | str]:
        """Token ids of each text, or the reason why the tokenizer fails on it."""
        if not texts:
            return
        try:
            yield from function(texts, add_special_tokens=False)
        except STOPS:
            raise
        except BaseException as error:  # a panic in the tokenizer's Rust code is no Exception
            if len(texts) == 1:
                yield str(error)
            else:  # it does not say at which text
                middle = len(texts) // 2
                yield from self._encodings(texts[:middle], function)
                yield from self._encodings(texts[middle:], function)


def answer_tokens(encoding: Encoding, spans: Spans) -> list[tuple[int, int]]:
    """(first, last + 1) tokens that have characters of each span."""
    starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    found = []
    for first, last in spans:
        inside = np.flatnonzero((starts < last) & (stops > first))
        if len(inside):
            found.append((int(inside[0]), int(inside[-1]) + 1))
    return found


class WordCache:
    """Ids of words that have come before.

    Args:
        tokenizer: content of a tokenizer.json.
        pattern: what its words are, see `word_pattern`.
        dtype: of the ids.
    """

    def __init__(self, tokenizer: str, pattern: str, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.model = _plain(tokenizer, False)
        self.normalises = _normalizer(json.loads(tokenizer)) is not None
        self.model.normalizer = None
        self.model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.added = [t.content for t in self.model.get_added_tokens_decoder().values() if not t.special]
        classes = sorted(set(re.findall(r"\\p\{\w+\}|\\s", pattern)))
        self._classes = [(regex.compile(name), pre_tokenizers.Split(Regex(name), "removed")) for name in classes]
        self._digits = pre_tokenizers.Digits() if pattern == GPT2_DIGITS else None
        self._seen: set[str] = set()
        self._unlike: set[str] = set()  # characters that the engines have in other classes: their Unicode versions differ
        self._all = regex.compile(pattern)
        self._ascii = _ascii_pattern(pattern) or self._all
        self._ids: dict[str, bytes] = {}

    def can_encode(self, text: str) -> bool:
        """Whether the text is cut as the tokenizer cuts it: no added token in it, nothing to normalise."""
        if any(token in text for token in self.added):
            return False
        if text.isascii():
            return True
        characters = set(text)
        if new := characters - self._seen:
            self._unlike |= {character for character in new if not self._is_alike(character)}
            self._seen |= new
        return self._unlike.isdisjoint(characters) and (not self.normalises or unicodedata.is_normalized("NFC", text))

    def _is_alike(self, character: str) -> bool:
        """Whether the tokenizer's engine has a character in the same classes as the pattern's engine."""
        if any((found.match(character) is None) != bool(split.pre_tokenize_str(character)) for found, split in self._classes):
            return False
        if self._digits is None:
            return True
        return (len(self._digits.pre_tokenize_str(f"a{character}")) > 1) == (regex.match(r"\p{N}", character) is not None)

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text."""
        cut = [(self._ascii if text.isascii() else self._all).findall(text) for text in texts]
        if len(self._ids) > CACHED_WORDS:
            self._ids.clear()
        new = list(set().union(*cut) - self._ids.keys())
        encodings = self.model.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._ids[word] = np.array(encoding.ids, self.dtype).tobytes()
        found = [b"".join(map(self._ids.__getitem__, words)) for words in cut]
        for word in new:
            if len(word) > LONGEST_CACHED:  # a line of dashes, a number of a thousand digits: hardly ever again
                del self._ids[word]
        return found


def word_pattern(tokenizer: str) -> str | None:
    """The pattern of a tokenizer's words; None where its words are not known to be encoded each on its own.

    Args:
        tokenizer: content of a tokenizer.json.
    """
    content = json.loads(tokenizer)
    model, normalizer = content["model"], _normalizer(content)
    if model.get("type") != "BPE" or model.get("dropout") or (normalizer and normalizer["type"] != "NFC"):
        return None
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in content["added_tokens"]):
        return None
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_pattern = steps[-1].get("use_regex", True)
    if [step["type"] for step in steps] == ["ByteLevel"] and own_pattern:
        return GPT2
    if [step["type"] for step in steps] == ["Digits", "ByteLevel"] and own_pattern and steps[0]["individual_digits"]:
        return GPT2_DIGITS
    if [step["type"] for step in steps] == ["Split", "ByteLevel"] and not own_pattern:
        split = steps[0]
        pattern = split["pattern"].get("Regex")
        if pattern and split["behavior"] == "Isolated" and not split["invert"] and _is_known(pattern):
            return pattern
    return None


def _normalizer(content: dict[str, Any]) -> dict[str, Any] | None:
    """The normalizer of a tokenizer.json, out of sequences of one or none."""
    found = content.get("normalizer")
    while found and found["type"] == "Sequence" and len(found["normalizers"]) <= 1:
        found = found["normalizers"][0] if found["normalizers"] else None
    return found


def _is_known(pattern: str) -> bool:
    """Whether the two engines read a pattern alike: the classes that GPT-2's descendants are written in, and no others."""
    rest = re.sub(r"\\p\{(L|N|Lu|Ll|Lt|Lm|Lo|M)\}|\\[srnS]|\(\?(i:|:|!)|\{1,3\}", "", pattern)
    return re.fullmatch(r"[a-zA-Z'|?+*^\[\]()/ ]*", rest) is not None


def _ascii_pattern(pattern: str) -> re.Pattern[str] | None:
    """The pattern for ASCII text in Python's own engine; None where it has other classes than letters, digits and space."""
    made, inside, i = [], False, 0
    while i < len(pattern):
        part = next((name for name in ASCII if pattern.startswith(name, i)), pattern[i])
        if part in ASCII:
            if part == r"\S" and inside:
                return None
            made.append(ASCII[part] if inside else f"[{'^' if part == chr(92) + 'S' else ''}{ASCII[part]}]")
        elif part == "\\" and pattern.startswith(r"\p", i):
            return None
        else:
            inside = part == "[" or (inside and part != "]")
            made.append(part)
            if part == "\\":
                made.append(pattern[i + 1])
                i += 1
        i += len(part)
    return re.compile("".join(made))
