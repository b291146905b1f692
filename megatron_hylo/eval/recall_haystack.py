"""Real text that the facts of the recall evaluation are hidden in, as tokens, cut where sentences or documents end."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Encoding, Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import TextCheck
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.inputs import read_documents
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.data.tokenizer import USED_IDS, read_vocabulary, vocabulary_of
from megatron_hylo.io import read_json

LEAST_TOKENS = 2**22  # of text that examples are cut from, where there is so much
BATCH = 64  # documents tokenised together


class TextEncoder:
    """A tokenizer without special tokens, for texts that go into the middle of others, and what its tokens end and begin.

    Args:
        tokenizer: of transformers, with a tokenizer.json.

    Raises:
        ConfigError: it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one with a tokenizer.json")
        self.encoder = plain_encoder(tokenizer)
        first = self.encoder.encode("\n", add_special_tokens=False)
        self._prefix = first.ids[0] if len(first) > 1 and first.tokens[0] == "▁" else None  # SentencePiece's, of any text
        with_special, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
        self.beginning: list[int] = with_special[: len(with_special) - len(without)] if with_special != without else []
        self.beginning = [i for i in self.beginning if i == tokenizer.bos_token_id]  # not an end token
        tokens = {number: token for token, number in self.encoder.get_vocab(with_added_tokens=True).items()}
        texts = [_plain(tokens.get(i, "")) for i in range(max(tokens) + 1)]
        self._ends_sentence = np.array([t.rstrip(" \"')]*").endswith((".", "!", "?")) for t in texts])
        self._line_ends = np.array([t.count("\n") if t.endswith("\n") else 0 for t in texts], np.int8)
        self._begins_word = np.array([t[:1] in (" ", "\n") for t in texts])

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._without_prefix(self.encoder.encode(text, add_special_tokens=False))

    def ids_with_answer(self, question: str, answer: str) -> tuple[list[int], int]:
        """Tokens of question and answer together, and how many of them, the last ones, hold a part of the answer."""
        encoding = self.encoder.encode(question + answer, add_special_tokens=False)
        count = sum(stop > len(question) for _, stop in encoding.offsets)
        return self._without_prefix(encoding), count

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each of several texts."""
        return [self._without_prefix(e) for e in self.encoder.encode_batch(texts, add_special_tokens=False)]

    def edges(self, ids: np.ndarray) -> np.ndarray:
        """Whether a sentence or a paragraph ends before each token, bool [n]; the first is such a place."""
        sentence, lines = self._ends_sentence[ids], self._line_ends[ids]
        found = np.ones(len(ids), dtype=bool)
        found[1:] = (sentence[:-1] & self._begins_word[ids[1:]]) | (lines[:-1] > 1)
        found[2:] |= (lines[1:-1] > 0) & (lines[:-2] > 0)
        return found

    def _without_prefix(self, encoding: Encoding) -> list[int]:
        ids = list(encoding.ids)
        return ids[1:] if self._prefix is not None and ids[:1] == [self._prefix] else ids


class Haystack:
    """Text to hide facts in.

    Args:
        ids: int32 [n], documents end to end.
        edges: bool [n], where a text may be cut.
        source: where it is from, for messages.

    Attributes:
        ids: see above.
        tokens: how many there are; longer texts are made by repetition.

    Raises:
        ConfigError: there are no ids.
    """

    def __init__(self, ids: np.ndarray, edges: np.ndarray, source: str) -> None:
        if not len(ids):
            raise ConfigError(f"{source} has no text for the recall evaluation; give a dataset with held-out text, or files")
        self.ids, self._edges, self.tokens = ids, edges, len(ids)

    def cut(self, length: int, generator: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Draw a stretch of exactly `length` tokens that begins at an edge, and ends at one where there is such a stretch.

        Returns:
            Its ids, int32 [length], and its edges, ascending, from 0 to `length`.
        """
        repeats = 1 + (length - 1) // self.tokens
        ids, edges = (np.tile(x, repeats) if repeats > 1 else x for x in (self.ids, self._edges))
        starts = np.flatnonzero(edges[: len(ids) - length + 1])
        ends = starts + length
        both = starts[edges[np.minimum(ends, len(ids) - 1)] | (ends == len(ids))]
        chosen = both if len(both) else starts
        start = int(chosen[int(generator.random() * len(chosen))])
        inside = np.flatnonzero(edges[start : start + length])
        return ids[start : start + length], np.append(inside, length)


def load_haystack(data: str | Path, encoder: TextEncoder, tokenizer: Any, longest: int, seed: int) -> Haystack:
    """Read held-out documents of a dataset folder, or any text files, in a drawn order, as far as they are needed.

    Args:
        data: dataset folder made by `hylo preprocess`, or a folder or file as `read_documents` takes them.
        encoder, tokenizer: the model's.
        longest: tokens of the longest text to be cut; twice as many are read, at least LEAST_TOKENS, where there are any.
        seed: decides the documents and their order.

    Raises:
        ConfigError: no text there, or a dataset of another tokenizer.
    """
    wanted, between = max(LEAST_TOKENS, 2 * longest), np.array(encoder.ids("\n\n"), np.int32)
    ids, edges = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    count = 0
    for document in _dataset(data, tokenizer, seed) if is_dataset(data) else _files(data, encoder, seed):
        if len(document) == 0:
            continue
        ids += [document, between]
        edges += [encoder.edges(document), np.zeros(len(between), bool)]
        count += len(document) + len(between)
        if count >= wanted:
            break
    return Haystack(np.concatenate(ids), np.concatenate(edges), str(data))


def is_dataset(data: str | Path) -> bool:
    """Whether a path is a dataset folder, not text."""
    return (Path(data) / "data.json").is_file() or IndexedDataset.exists(str(Path(data) / "heldout"))


def check_tokenizer(data: str | Path, tokenizer: Any) -> None:
    """Refuse a dataset whose tokens mean something else to the model.

    Raises:
        ConfigError: a token that occurs in it differs.
    """
    theirs, ours = read_vocabulary(data), vocabulary_of(tokenizer, "the model's tokenizer")
    if theirs is None:
        return
    used = Path(data) / USED_IDS
    if ids := theirs.differences(ours, np.load(used) if used.is_file() else None):
        raise ConfigError(
            f"{data} was made with another tokenizer than the model's: {theirs.named(ours, ids)}; preprocess with the model's, "
            f"or give the text files, which are tokenised as they are read"
        )


def _dataset(data: str | Path, tokenizer: Any, seed: int) -> Iterator[np.ndarray]:
    check_tokenizer(data, tokenizer)
    store = DocumentStore(Path(data) / "heldout")
    end = {tokenizer.eos_token_id, *_end_token(data)}
    for number in _order(len(store.lengths), seed):
        ids = store.read(number, 0, int(store.lengths[number])).astype(np.int32)
        yield ids[:-1] if len(ids) and int(ids[-1]) in end else ids  # it would say that nothing before it matters


def _end_token(data: str | Path) -> list[int]:
    described = Path(data) / "data.json"
    found = read_json(described).get("end_token_id") if described.is_file() else None
    return [] if found is None else [found]


def _files(data: str | Path, encoder: TextEncoder, seed: int) -> Iterator[np.ndarray]:
    texts = [document.text for document in TextCheck().usable(read_documents(data))]
    order = iter(_order(len(texts), seed))
    while numbers := list(islice(order, BATCH)):
        for ids in encoder.documents([texts[i] for i in numbers]):
            yield np.array(ids, np.int32)


def _order(count: int, seed: int) -> list[int]:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed]))).permutation(count).tolist()


def _plain(token: str) -> str:
    """Text of a byte-level or SentencePiece token, as far as its spaces and line ends go."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")
