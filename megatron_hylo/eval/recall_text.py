"""Sentences of the recall evaluation: facts, questions about them, and the words of their keys.

None of it is in the exercises that models are trained on (data/recall_wording.py); a test compares sentences and words. A
question ends in the words that the fact has before its value, as in the usual passkey test, and its answer is a number of five
digits.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

T = TypeVar("T")
RecallEvalTask = Literal["passkey", "several_needles", "key_value"]
RECALL_EVAL_TASKS: tuple[RecallEvalTask, ...] = get_args(RecallEvalTask)

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "brown", "pink", "silver", "golden")
MANNERS = (
    "gentle", "hungry", "clever", "sleepy", "noisy", "proud", "shy", "brave", "lazy", "quick", "jolly", "curious", "patient",
    "clumsy", "lucky", "nervous",
)  # fmt: skip
ANIMALS = (
    "otter", "badger", "falcon", "tortoise", "giraffe", "penguin", "hamster", "leopard", "walrus", "beaver", "camel", "donkey",
    "lobster", "panther", "rabbit", "squirrel",
)  # fmt: skip

# (the fact, its question up to the answer)
PASSKEYS = (
    ("The pass key is {value}. Remember it. {value} is the pass key.", "What is the pass key? The pass key is"),
    ("The access code is {value}. Do not forget it. {value} is the access code.",
     "What is the access code? The access code is"),
    ("My ticket number is {value}. Write it down. {value} is my ticket number.",
     "What is my ticket number? My ticket number is"),
    ("The secret number is {value}. Take note of it. {value} is the secret number.",
     "What is the secret number? The secret number is"),
)  # fmt: skip
NEEDLES = (
    ("The {key} pass key is {value}.", "What is the {key} pass key? The {key} pass key is"),
    ("The code of the {key} door is {value}.", "What is the code of the {key} door? The code of the {key} door is"),
    ("Bus {key} leaves from stop {value}.", "From which stop does bus {key} leave? Bus {key} leaves from stop"),
)
PAIRS = (
    ("The phone number of the {key} is {value}.", "What is the phone number of the {key}? The phone number of the {key} is"),
    ("Member {key} has card {value}.", "Which card does member {key} have? Member {key} has card"),
    ("record({key}): {value}", "Look the record up again. record({key}):"),
)


class _Task(NamedTuple):
    """Contents of a text of one task."""

    facts: int  # in one text, and as many questions
    templates: tuple[tuple[str, str], ...]  # (a fact, its question), of which a text has one
    words: tuple[tuple[str, ...], ...]  # a key is one of each


_TASKS: Mapping[RecallEvalTask, _Task] = {
    "passkey": _Task(1, PASSKEYS, ()),
    "several_needles": _Task(5, NEEDLES, (COLOURS,)),
    "key_value": _Task(10, PAIRS, (MANNERS, ANIMALS)),
}
FACTS: Mapping[RecallEvalTask, int] = {task: _TASKS[task].facts for task in RECALL_EVAL_TASKS}
TEMPLATES = tuple(pair for task in _TASKS.values() for pair in task.templates)
KEY_WORDS = frozenset(word for task in _TASKS.values() for words in task.words for word in words)


@dataclass(frozen=True)
class Fact:
    """A sentence and a question that it answers; the answer begins with a space."""

    text: str
    question: str
    answer: str


def make_facts(task: RecallEvalTask, generator: random.Random) -> list[Fact]:
    """Draw the facts of a text: `FACTS[task]`, of one template, with keys and values all different."""
    count, templates, words = _TASKS[task]
    fact, question = _pick(templates, generator)
    keys = _different(lambda: " ".join(_pick(some, generator) for some in words), count) if words else [""] * count
    values = _different(lambda: str(10_000 + int(generator.random() * 90_000)), count)
    return [Fact(fact.format(key=k, value=v), question.format(key=k), f" {v}") for k, v in zip(keys, values, strict=True)]


def _different(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _pick(items: tuple[T, ...], generator: random.Random) -> T:
    return items[int(generator.random() * len(items))]  # the same in all versions of Python, unlike `choice`
