"""Quotations of a window's own text as recall exercises: words of it again, and how they go on is the answer.

The exercises of recall_text.py are looked up at a few thousand wordings, which a model may learn by heart; here any text is the
key and any text the value. Tokens are copied, not tokenised again.
"""

import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_hylo.data.recall_wording import QUOTATION_FRAMES
from megatron_hylo.data.windows import Window

LEAD = (6, 16)  # tokens that are quoted as the question, least and most
ANSWER = (4, 16)  # tokens after them, which are the answer
MOST_ALIKE = 64  # places that begin like a lead; text with more of them is not quoted
TRIES = 8  # places drawn for a quotation before it is left out


@dataclass(frozen=True)
class Quotation:
    """A quotation whose words are not chosen yet.

    Attributes:
        before, after: texts around it.
        lead, answer: tokens to quote as the question, and after them as the answer.
    """

    before: str
    after: str
    lead: int
    answer: int

    @property
    def copied(self) -> int:
        """Tokens of the window's text."""
        return self.lead + self.answer


def draw_quotation(generator: random.Random) -> Quotation:
    """Draw frame and lengths."""
    before, after = QUOTATION_FRAMES[int(generator.random() * len(QUOTATION_FRAMES))]
    lead, answer = (low + int(generator.random() * (high - low + 1)) for low, high in (LEAD, ANSWER))
    return Quotation(before, after, lead, answer)


class Sources:
    """Text of one window that can be quoted, as far as it is not yet.

    Args:
        base: the window without exercises.
        special: ids of special tokens, which are not quoted.
        places: tokens of `base` that exercises are inserted before.
    """

    def __init__(self, base: Window, special: set[int], places: Iterable[int]) -> None:
        self._tokens, self._special = base.tokens, special
        grams = _hash_grams(base.tokens)
        self._order = np.argsort(grams)  # places that go on alike are together
        alike = np.diff(grams[self._order]) == 0
        self._bounds = np.concatenate([[0], np.flatnonzero(~alike) + 1, [len(grams)]])
        self._group = np.empty(len(grams), np.int64)
        self._group[self._order] = np.repeat(np.arange(len(self._bounds) - 1), np.diff(self._bounds))
        cuts = () if base.cuts is None else base.cuts.tolist()
        self._borders = sorted({*base.document_starts.tolist(), *cuts})
        self._places = sorted(places)
        self._begins: list[int] = []  # of the quoted spans, which do not overlap
        self._ends: list[int] = []

    def take(self, first: int, quotation: Quotation, asked: int) -> np.ndarray | None:
        """Quote the text from token `first` on in a question before token `asked`, which is behind that text.

        Returns:
            The tokens, int64 [quotation.copied]; None where they cannot be quoted: they have a special token, a document's or
            cut's border, an exercise or the text of another quotation in them, the question would be in the text of another,
            or the lead occurs more than once before the question.
        """
        end = first + quotation.copied
        if self._quoted(first, end) or self._quoted(asked, asked):
            return None
        if _between(self._places, first, end) or _between(self._borders, first, end):
            return None
        span = self._tokens[first:end]
        if not self._special.isdisjoint(span.tolist()) or not self._once(first, quotation.lead, asked):
            return None
        number = bisect_left(self._begins, first)
        self._begins.insert(number, first)
        self._ends.insert(number, end)
        insort(self._places, asked)
        return span

    def _quoted(self, first: int, end: int) -> bool:
        """Whether text between two places, or a place itself, is inside of a quoted span."""
        number = bisect_left(self._begins, end)
        return number > 0 and self._ends[number - 1] > first

    def _once(self, first: int, lead: int, asked: int) -> bool:
        """Whether the `lead` tokens from `first` on are once before token `asked`."""
        begin, end = self._bounds[self._group[first] :][:2]
        if not 1 < end - begin <= MOST_ALIKE:
            return bool(end - begin == 1)
        places = self._order[begin:end]
        places = places[places + lead <= asked]
        same = self._tokens[places[:, None] + np.arange(lead)] == self._tokens[first : first + lead]
        return int(same.all(axis=1).sum()) == 1


def _hash_grams(tokens: np.ndarray) -> np.ndarray:
    """A number for the tokens from each place on, as many as the shortest lead has; the same for the same tokens."""
    grams = np.zeros(max(len(tokens) - LEAD[0] + 1, 0), np.uint64)
    for number in range(LEAD[0]):
        grams *= np.uint64(0x9E3779B97F4A7C15)
        grams += tokens[number : number + len(grams)].astype(np.uint64)
    return grams


def _between(places: list[int], first: int, end: int) -> bool:
    """Whether one of the places is behind `first` and before `end`."""
    return bisect_right(places, first) < bisect_left(places, end)
