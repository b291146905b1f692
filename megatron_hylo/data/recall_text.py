"""Recall exercises as text: facts, questions and their answers, drawn from the wording of recall_wording.py.

Where they go in a window is recall.py's matter.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from megatron_hylo.config.recall import RecallTask
from megatron_hylo.data.recall_wording import (
    BULLETS,
    CHAIN,
    COUNTING,
    ECHOES,
    ENDS,
    EVENTS,
    FACTS,
    GOODS,
    LEAD_INS,
    NOUNS,
    NUMBERS,
    PASSKEYS,
    PEOPLE,
    QUALITIES,
    SECRET_WORDINGS,
    SECRETS,
    SEVERAL,
    SEVERAL_FRAMES,
    THINGS,
    TOGETHER,
    listed,
    plural,
    with_article,
)

T = TypeVar("T")
MOST_KEYS = 12  # facts like each other
MOST_QUESTIONS = 4  # about them
ECHOED = 0.25  # part of the questions that are the fact's own first words, where these can ask
LED_IN = 0.4  # part of the questions that end in one of ENDS whose answer follows a lead-in
ASKED_TOGETHER = 0.5  # part of the exercises asking for several keys, where a noun is said of them, whose questions are one


@dataclass(frozen=True)
class Question:
    """A question about the facts of an exercise."""

    fact: int  # that the answer takes, by number; of several the one that stands first
    text: str  # up to the answer
    answer: str
    rest: str  # what follows the answer


@dataclass(frozen=True)
class Exercise:
    """Facts, and questions that they answer, one after another."""

    facts: tuple[str, ...]
    ordered: int  # the first so many facts stand in this order, the others anywhere among them
    questions: tuple[Question, ...]


class _Wording(NamedTuple):
    """How facts of one kind are told and asked for."""

    fact: str
    questions: tuple[str, ...]
    noun: str = ""  # what is said of a thing
    secret: str = ""

    def words(self, key: str = "", article: str = "") -> dict[str, str]:
        """Return the words that stand for the templates' placeholders."""
        the, secret = article + key, self.secret
        return {
            "key": key, "the": the, "The": article.capitalize() + key, "noun": self.noun,
            "a": with_article(self.noun) if self.noun else "",
            "secret": secret, "Secret": secret[:1].upper() + secret[1:],
        }  # fmt: skip


class Exercises:
    """Exercises of one window; no two have a key, a name or a secret in common, so that each has one answer.

    Args:
        generator: decides all of them.
    """

    def __init__(self, generator: random.Random) -> None:
        self._random = (
            generator.random
        )  # the same in all versions of Python, which `choice` and `sample` are not promised to be
        self._used: set[str] = set()
        self._makers: Mapping[RecallTask, Callable[[int], Exercise]] = {
            "key_value": self._key_value,
            "several_keys": self._several_keys,
            "several_values": self._several_values,
            "variable_chain": self._variable_chain,
            "passkey": self._passkey,
            "counting": self._counting,
        }

    def make(self, task: RecallTask, most_facts: int) -> Exercise:
        """The next exercise, of this task, of at most `most_facts` facts (2 where that is less)."""
        return self._makers[task](max(most_facts, 2))

    def fact(self) -> str:
        """A fact that nothing asks about."""
        wording, (words,) = self._attributes(1)
        return wording.fact.format(**words, value=self._value())

    def _key_value(self, most: int) -> Exercise:
        wording, (words,) = self._attributes(1)
        return self._single(wording, words, self._value())

    def _several_keys(self, most: int) -> Exercise:
        wording, things = self._attributes(self._between(2, min(most, MOST_KEYS)))
        kind = self._pick(self._kinds)
        values = [kind(self) for _ in things]
        facts = tuple(wording.fact.format(**words, value=value) for words, value in zip(things, values))
        asked = range(self._between(1, min(len(things), MOST_QUESTIONS)))
        able = len(asked) > 1 and "{noun}" in wording.fact and " and " not in values[0]
        if able and self._random() < ASKED_TOGETHER:
            order = self._some(asked, len(asked))
            words = {"nouns": plural(wording.noun), "all": listed([things[i]["the"] for i in order])}
            return Exercise(facts, len(asked), (self._question_of_several(TOGETHER, [values[i] for i in order], **words),))
        return Exercise(facts, 1, tuple(self._question(i, self._asked(wording), values[i], **things[i]) for i in asked))

    def _several_values(self, most: int) -> Exercise:
        count = self._between(2, min(most, 4))
        if self._below(2):
            fact, questions = self._pick(SEVERAL)
            words, values = {"key": self._key()}, self._some(GOODS, count)
        else:
            fact, questions = self._pick(SEVERAL_FRAMES)
            words = _Wording(fact, questions, noun=self._pick(NOUNS)).words(self._key(), "the ")
            code = self._pick(self._codes)
            values = [code(self) for _ in range(count)]
        facts = tuple((text := fact.format(**words, value=value))[0].upper() + text[1:] for value in values)
        return Exercise(facts, count, (self._question_of_several(questions, values, **words),))

    def _variable_chain(self, most: int) -> Exercise:
        first, following, of_last, of_value = self._pick(CHAIN)
        names = [self._unused(self._name) for _ in range(self._between(2, min(most, 5)))]
        value = self._unused(self._digits)
        facts = (
            first.format(name=names[0], value=value),
            *(following.format(name=name, source=source) for source, name in zip(names, names[1:])),
        )
        if self._below(2):
            question = self._question_of_several(of_value, names, value=value)
        else:
            question = self._question(0, self._pick(of_last), value, name=names[-1])
        return Exercise(facts, len(facts), (question,))

    def _passkey(self, most: int) -> Exercise:
        left = [about for about in (*PASSKEYS, *SECRETS) if about not in self._used]
        if not left:
            return self._key_value(most)
        about = self._pick(left)
        self._used.add(about)
        if about in PASSKEYS:
            return self._single(_Wording(about, PASSKEYS[about]), {}, self._digits())
        wording = _Wording(*self._pick(SECRET_WORDINGS), secret=about)
        return self._single(wording, wording.words(), self._pick(self._codes)(self))

    def _single(self, wording: _Wording, words: dict[str, str], value: str) -> Exercise:
        question = self._question(0, self._asked(wording), value, **words)
        return Exercise((wording.fact.format(**words, value=value),), 1, (question,))

    def _attributes(self, count: int) -> tuple[_Wording, list[dict[str, str]]]:
        """One wording, and what stands for its placeholders for each of so many things of one style of name."""
        wording = _Wording(*self._pick(FACTS), noun=self._pick(NOUNS))
        style = self._below(8)  # half of the names are plain
        if style == 4:
            things = self._some(THINGS, 1) if self._below(2) else THINGS
            keys = [self._unused(lambda: f"{self._pick(things)} {self._between(100, 999)}") for _ in range(count)]
        else:
            keys = self._keys(count) if count > 1 else [self._key()]
            if style > 4:
                keys = [_STYLES[style - 5](key) for key in keys]
        return wording, [wording.words(key, "the " if style < 4 else "") for key in keys]

    def _asked(self, wording: _Wording) -> str:
        echo = ECHOES.get(wording.fact)
        return echo if echo is not None and self._random() < ECHOED else self._pick(wording.questions)

    def _counting(self, most: int) -> Exercise:
        fact, questions = self._pick(COUNTING)
        key, event = self._key(), self._pick(EVENTS)
        count = self._between(1, min(most, len(NUMBERS) - 1))
        facts = (fact.format(key=key, event=event),) * count
        return Exercise(facts, count, (self._question(0, self._pick(questions), NUMBERS[count], key=key, event=event),))

    def _question(self, fact: int, template: str, answer: str, **words: str) -> Question:
        """The question, whose answer follows at once or after a lead-in."""
        before, after = (part.format(**words) for part in template.split("{answer}"))
        if before.endswith(ENDS) and self._random() < LED_IN:
            before = led_in(before, self._pick(LEAD_INS))
        return Question(fact, before, answer, after)

    def _question_of_several(self, templates: Sequence[str], values: Sequence[str], **words: str) -> Question:
        """One question about an exercise's first facts, whose values are in a sentence or a line each.

        The first line's mark is before the answer: nothing says which one it is, so it is not learnt as an answer.
        """
        before, after = (part.format(**words) for part in self._pick(templates).split("{answer}"))
        if not before.endswith(ENDS) or self._random() >= LED_IN:
            return Question(0, before, listed(values), after)
        bullet = self._pick(BULLETS)
        first, *others = [bullet.format(number=number) for number, _ in enumerate(values, 1)]
        lines = [values[0], *(mark + value for mark, value in zip(others, values[1:]))]
        return Question(0, led_in(before, self._pick((":\n", ":\n\n")) + first), "\n".join(lines), "\n")

    def _below(self, bound: int) -> int:
        return int(self._random() * bound)

    def _between(self, low: int, high: int) -> int:
        return low + self._below(high - low + 1)

    def _pick(self, items: Sequence[T]) -> T:
        return items[self._below(len(items))]

    def _unused(self, draw: Callable[[], str]) -> str:
        while (found := draw()) in self._used:
            pass
        self._used.add(found)
        return found

    def _key(self) -> str:
        return self._unused(
            lambda: f"{self._pick(QUALITIES)} {self._pick(THINGS)}{self._pick(('', ' of ' + self._pick(PEOPLE)))}"
        )

    def _keys(self, count: int) -> list[str]:
        """Draw that many different keys.

        In a third of the cases each is drawn alone, in a third all are alike but for one word, and in a third they are from a
        grid of few words, of which it takes two to tell a key.
        """
        kind = self._below(3)
        if kind == 0:
            return [self._key() for _ in range(count)]
        person = self._pick(("", f" of {self._pick(PEOPLE)}"))
        side = 1 if kind == 1 else math.isqrt(2 * count - 1) + 1  # about half of the grid is drawn
        qualities, things = self._some(QUALITIES, side), self._some(THINGS, side)
        if kind == 1:
            qualities, things = (list(QUALITIES), things) if self._below(2) else (qualities, list(THINGS))
        left = [key for q in qualities for t in things if (key := f"{q} {t}{person}") not in self._used]
        if len(left) < count:
            return [self._key() for _ in range(count)]
        keys = self._some(left, count)
        self._used.update(keys)
        return keys

    def _some(self, items: Sequence[T], count: int) -> list[T]:
        left = list(items)
        return [left.pop(self._below(len(left))) for _ in range(count)]

    def _name(self) -> str:
        return f"{self._pick(PEOPLE)}{self._between(1, 999)}"

    def _digits(self) -> str:
        digits = self._between(3, 9)
        return str(self._between(10 ** (digits - 1), 10**digits - 1))

    def _code(self) -> str:
        letters = "".join(chr(65 + self._below(26)) for _ in range(self._between(2, 3)))
        return f"{letters}-{self._between(100, 9999)}"

    def _pair(self) -> str:
        return f"{self._pick(PEOPLE)} and {self._pick(PEOPLE)}"

    def _words(self) -> str:
        return " ".join(self._some(GOODS, 2))

    def _hexadecimal(self) -> str:
        digits = self._between(6, 12)
        return f"{self._below(16**digits):0{digits}x}"

    _kinds: tuple[Callable[["Exercises"], str], ...] = (_digits, _digits, _digits, _code, _pair, _words, _hexadecimal)
    _codes: tuple[Callable[["Exercises"], str], ...] = (_digits, _digits, _code, _hexadecimal)

    def _value(self) -> str:
        return self._pick(self._kinds)(self)


def led_in(before: str, lead_in: str) -> str:
    """A question up to its answer, with a lead-in for the space at its end."""
    before = before.rstrip(" ")
    return (before.removesuffix(":") if lead_in.startswith(":") else before) + lead_in


def _camel_case(key: str) -> str:
    first, *others = key.split()
    return first + "".join(word.capitalize() for word in others)


# a key's words as one name
_STYLES: tuple[Callable[[str], str], ...] = (
    lambda key: key.replace(" ", "-").lower(), lambda key: key.replace(" ", "_").lower(), _camel_case
)  # fmt: skip
