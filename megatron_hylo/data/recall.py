"""Synthetic recall in training windows: facts, and questions about them further down, made as the window is read.

A window of sequence_length + 1 tokens is made of a shorter one of another source and of exercises (recall_text.py), `share`
of its length together. Distances between questions and the first fact are half log-uniform, so that every octave up to the
window's length occurs, and half uniform. Of some exercises a fact is the first that the window says, where random places never
are and models forget most. Texts go to line ends where one is near. The room that is left over is filled with facts that
nothing asks about, the last of them cut by the window's end. All of it is a function of (seed, window number): nothing is
stored, and no number of ranks, workers or samples a batch changes it.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.data.recall_text import Exercise, Exercises
from megatron_hylo.data.windows import Window, WindowSource

LEAST_ROOM = 64  # tokens of a window's exercises; of facts and their questions 91 % take at most so many
FACT_TOKENS = 25  # room counted for each fact where their number is chosen
CHARACTERS_A_TOKEN = 3.0  # of exercises, fewer than most tokenizers', so that one batch is nearly always enough
AT_START = 0.2  # part of the exercises that have a fact at the window's start
ASKED_AT_END = 0.5  # part of those whose questions are at its end
SNAP = 64  # tokens that a text may move to the next line end
MISSES = 3  # exercises that do not fit before the rest is filled


class _Text(NamedTuple):
    ids: np.ndarray  # int64
    answer: np.ndarray  # bool, which of them answer; none of a fact


class _Exercise(NamedTuple):
    facts: list[_Text]
    ordered: int  # see recall_text.Exercise
    questions: list[_Text]
    asked: list[int]  # of each question, the first fact that it needs

    @property
    def size(self) -> int:
        """Tokens of all facts and questions."""
        return sum(len(text.ids) for text in (*self.facts, *self.questions))


class _Piece(NamedTuple):
    place: int  # the token of the base window that it goes before
    order: int  # among those of one place
    fact: int  # order of the first fact that it answers, its own if it is none
    text: _Text


def exercise_tokens(settings: RecallSettings, sequence_length: int) -> int:
    """Tokens of a window of `sequence_length` that are of exercises."""
    return round(settings.share * sequence_length)


class RecallWindows(WindowSource):
    """Windows of another source with exercises in them.

    Args:
        source: makes the source of a given sequence length.
        sequence_length: tokens a window predicts.
        settings: share and tasks.
        encoder: the dataset's tokenizer without special tokens, as `plain_encoder` makes it.
        seed: decides exercises and places.
        within_documents: put all of an exercise into one document, for windows whose documents do not see each other.

    Raises:
        ConfigError: the share of a window is too short for an exercise.
    """

    def __init__(
        self,
        source: Callable[[int], WindowSource],
        sequence_length: int,
        settings: RecallSettings,
        encoder: Tokenizer,
        seed: int,
        within_documents: bool = False,
    ) -> None:
        self.room = exercise_tokens(settings, sequence_length)
        if self.room < LEAST_ROOM:
            raise ConfigError(
                f"recall.share {settings.share} of sequence_length {sequence_length} is {self.room} tokens, a fact and its "
                f"question need {LEAST_ROOM}: give a share of at least {LEAST_ROOM / sequence_length:.2g}, or longer windows"
            )
        self.source = source(sequence_length - self.room)
        self.sequence_length, self.settings, self.seed = sequence_length, settings, seed
        self.within_documents = within_documents
        self.windows_per_epoch = self.source.windows_per_epoch
        self.masked = self.source.masked
        self._encoder = encoder
        first = encoder.encode("\n", add_special_tokens=False)
        self._prefix = first.ids[0] if len(first) > 1 and first.tokens[0] == "▁" else None  # SentencePiece's, of any text
        self._special = {number for number, token in encoder.get_added_tokens_decoder().items() if token.special}
        tokens = {number: token for token, number in encoder.get_vocab(with_added_tokens=True).items()}
        self._line_ends = np.array([tokens.get(i, "").endswith(("Ċ", "\n", "<0x0A>")) for i in range(max(tokens) + 2)])

    def window(self, index: int) -> Window:
        """Window `index` of the source with its exercises."""
        base = self.source.window(index)
        generator = random.Random(f"recall {self.seed} {index}")
        line_ends = np.flatnonzero(self._line_ends.take(base.tokens, mode="clip")) + 1
        exercises = Exercises(generator)
        pieces: list[_Piece] = []
        room = self.room
        for exercise in self._chosen(exercises, generator, room):
            room -= exercise.size
            pieces += self._place(exercise, base, line_ends, generator, len(pieces))
        return _merge(base, pieces, self._filling(exercises, room), self.settings.cross_entropy == "answers")

    @property
    def long_share(self) -> float:
        """The source's."""
        return self.source.long_share

    def describe(self, windows: int) -> str:
        """The source's sentence, and the share of exercises."""
        return (
            f"{self.source.describe(windows)}; {self.room:,} tokens of each window of {self.sequence_length:,} are recall: "
            f"{', '.join(self.settings.tasks)}"
        )

    def _chosen(self, exercises: Exercises, generator: random.Random, room: int) -> Iterator[_Exercise]:
        """Exercises that together take at most `room` tokens."""
        tasks, misses = self.settings.tasks, 0
        while room >= LEAST_ROOM // 2 and misses < MISSES:
            made: list[Exercise] = []
            texts: list[tuple[str, tuple[int, int]]] = []  # of all exercises, and where in each the answer is
            size = 0  # in characters
            while size < room * CHARACTERS_A_TOKEN:
                made.append(exercises.make(tasks[int(generator.random() * len(tasks))], room // FACT_TOKENS))
                texts += (new := _texts(made[-1]))
                size += sum(len(text) for text, _ in new)
            encodings = self._encoder.encode_batch([text for text, _ in texts], add_special_tokens=False)
            encoded = (self._text(encoding, span) for encoding, (_, span) in zip(encodings, texts, strict=True))
            for one in made:
                facts, questions = list(islice(encoded, len(one.facts))), list(islice(encoded, len(one.questions)))
                exercise = _Exercise(facts, one.ordered, questions, [question.fact for question in one.questions])
                if exercise.size <= room:
                    yield exercise
                    room, misses = room - exercise.size, 0
                    continue
                misses += 1
                if misses == MISSES:
                    return

    def _text(self, encoding: Encoding, span: tuple[int, int]) -> _Text:
        ids = np.array(encoding.ids, dtype=np.int64)
        skip = int(self._prefix is not None and len(ids) > 0 and ids[0] == self._prefix)
        answer = np.array([start < span[1] and stop > span[0] for start, stop in encoding.offsets], dtype=bool)
        return _Text(ids[skip:], answer[skip:])

    def _place(
        self, exercise: _Exercise, base: Window, line_ends: np.ndarray, generator: random.Random, order: int
    ) -> list[_Piece]:
        """Place an exercise's texts: the first fact at the drawn distance from the questions, its followers between.

        As many of the other facts stand after the first one as before it, on average, and any number is as likely: neither
        the first nor the last of several alike is the right one more often than the others.
        """
        low, high = self._segment(base, generator)
        width = high - low
        distance = int(width ** generator.random() if generator.random() < 0.5 else width * generator.random())
        asked = low + distance + int((width - distance + 1) * generator.random())
        first = asked - distance
        between = sorted(first + int((distance + 1) * generator.random()) for _ in range(exercise.ordered - 1))
        others = len(exercise.facts) - exercise.ordered
        after = int((others + 1) * generator.random())
        reach = low  # of half of the exercises all facts are within a stretch that is log-uniform, so that many are near
        if generator.random() < 0.5:
            reach = min(first, max(low, asked - int(width ** generator.random())))
        free = [
            first + int((distance + 1) * generator.random()) if i < after else reach + int((first - reach) * generator.random())
            for i in range(others)
        ]
        facts = [first, *between, *free]
        start = None
        if generator.random() < AT_START:  # any fact whose order is free, so that a place says nothing about what is asked
            start = (0, *range(exercise.ordered, len(facts)))[int((others + 1) * generator.random())]
            facts[start] = self._start(base, low)
            asked = high if generator.random() < ASKED_AT_END else asked
        places = facts + [asked] * len(exercise.questions)
        of_fact = [*range(len(exercise.facts)), *exercise.asked]
        found = []
        for number, (place, fact, text) in enumerate(zip(places, of_fact, (*exercise.facts, *exercise.questions), strict=True)):
            line = int(np.searchsorted(line_ends, place))
            if number != start and line < len(line_ends) and line_ends[line] <= min(place + SNAP, high):
                place = int(line_ends[line])
            found.append(_Piece(place, order + number, order + fact, text))
        return found

    def _segment(self, base: Window, generator: random.Random) -> tuple[int, int]:
        """First and last place for the texts of an exercise: in the window, or in a document of it, by length."""
        start, stop = 0, len(base.tokens)
        if self.within_documents:
            number = np.searchsorted(base.document_starts, int(stop * generator.random()), side="right")
            start = int(base.document_starts[number - 1])
            if number < len(base.document_starts):
                stop = int(base.document_starts[number])
        return start + 1, max(stop - 1, start + 1)  # behind a document's first token, before its end token

    def _start(self, base: Window, low: int) -> int:
        """Return the first place of a segment whose other places begin at `low`.

        It is before all text of a window, but behind a special token; in a later document behind the document's first token,
        as a text before that would belong to the document above.
        """
        return low - 1 if low == 1 and int(base.tokens[0]) not in self._special else low

    def _filling(self, exercises: Exercises, room: int) -> np.ndarray:
        ids = np.zeros(0, np.int64)
        while len(ids) < room:
            encoding = self._encoder.encode(f"\n{exercises.fact()}\n", add_special_tokens=False)
            ids = np.concatenate([ids, self._text(encoding, (0, 0)).ids])
        return ids[:room]


def _texts(exercise: Exercise) -> list[tuple[str, tuple[int, int]]]:
    """Texts of an exercise, facts before questions, and where in each the answer is."""
    texts = [(f"\n{fact}\n", (0, 0)) for fact in exercise.facts]
    for question in exercise.questions:
        start = 1 + len(question.text)
        text = f"\n{question.text}{question.answer}{question.rest}"
        texts.append((text if text.endswith("\n") else f"{text}\n", (start, start + len(question.answer))))
    return texts


def _merge(base: Window, pieces: list[_Piece], filling: np.ndarray, answers_alone: bool) -> Window:
    """The base window with the pieces before their places and the filling at the end.

    Args:
        base, pieces, filling: what it is made of.
        answers_alone: leave the exercises' other tokens without cross-entropy.
    """
    ordered = sorted(pieces)
    sizes = np.array([len(piece.text.ids) for piece in ordered], dtype=np.int64)
    places = np.array([piece.place for piece in ordered], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(sizes)])  # tokens of all pieces before each
    starts = places + before[:-1]
    start_of = {piece.order: int(start) for piece, start in zip(ordered, starts)}
    parts = []
    answers = np.zeros(len(base.tokens) + int(before[-1]) + len(filling), np.int32)
    done = 0
    for piece, start in zip(ordered, starts):
        parts += [base.tokens[done : piece.place], piece.text.ids]
        done = piece.place
        at = int(start) + np.flatnonzero(piece.text.answer)
        answers[at] = at - start_of[piece.fact]
    tokens = np.concatenate([*parts, base.tokens[done:], filling])
    document_starts = _moved(base.document_starts, places, before)
    document_starts[0] = 0
    moved = _moved(np.arange(len(base.tokens)), places, before)
    mask = None
    if base.loss_mask is not None:  # of the exercises the answers alone are learnt, too
        mask = answers > 0
        mask[moved] |= base.loss_mask
    elif base.padding:  # which may be between exercises now
        mask = np.ones(len(tokens), bool)
        mask[moved[-base.padding :]] = False
    source_places = np.full(len(tokens), -1, np.int64)
    source_places[moved] = np.arange(len(base.tokens))
    left_out = (source_places < 0) & (answers == 0) & answers_alone
    if base.unlabelled is not None:
        left_out[_moved(base.unlabelled, places, before)] = True
    return Window(tokens, document_starts, answers, mask, np.flatnonzero(left_out[1:]) + 1, source_places)


def _moved(at: np.ndarray, places: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Places of the base window's tokens after the pieces are inserted."""
    return at + before[np.searchsorted(places, at, side="right")]
