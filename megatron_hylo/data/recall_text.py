"""Templates and vocabularies of the recall exercises that models are trained on.

All wording is here, so that an evaluation of recall can be tested to share no template and no key with training
(`TEMPLATES`, `KEY_WORDS`). An exercise is facts, questions and their answers; where they go in a text is recall.py's matter.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_hylo.config.recall import RecallTask

T = TypeVar("T")
QUALITIES = (
    "amber", "brisk", "copper", "dappled", "earnest", "faded", "gilded", "hollow", "indigo", "jagged", "knotted", "lilac",
    "mossy", "narrow", "ochre", "pewter", "quilted", "russet", "slanted", "tawny", "umber", "velvet", "wicker", "woven",
    "ashen", "braided", "chalky", "dusky", "etched", "fluted", "glazed", "hushed", "ivied", "lacquered", "mottled", "notched",
    "pleated", "ribbed", "salted", "tufted",
)  # fmt: skip
THINGS = (
    "lantern", "orchard", "kiln", "ferry", "granary", "loom", "belfry", "quarry", "cistern", "harrow", "jetty", "mill",
    "paddock", "rafter", "sluice", "turret", "vestry", "wharf", "anvil", "bellows", "causeway", "dovecote", "foundry", "gantry",
    "hayloft", "inkwell", "lintel", "mooring", "nursery", "oast", "pulpit", "rookery", "scullery", "tannery", "undercroft",
    "viaduct", "weir", "almshouse", "boathouse", "cloister",
)  # fmt: skip
PEOPLE = (
    "Aldous", "Brielle", "Casimir", "Delphine", "Evander", "Fenella", "Gideon", "Hesper", "Ignatius", "Jolanda", "Kester",
    "Lavinia", "Merrick", "Nerissa", "Osric", "Petronella", "Quillon", "Rosalba", "Soren", "Tamsin", "Ulric", "Verity",
    "Wystan", "Xanthe", "Yorick", "Zelda",
)  # fmt: skip
GOODS = (
    "barley", "beeswax", "cardamom", "cobalt", "damask", "flax", "ginger", "hemp", "juniper", "kelp", "linen", "madder",
    "mercury", "nutmeg", "onyx", "paprika", "quartz", "resin", "saffron", "tallow", "turpentine", "vanilla", "walnuts", "zinc",
)  # fmt: skip
EVENTS = (
    "the tide bell rang", "a grey heron crossed the yard", "the night coach arrived", "the signal lamp was lit",
    "the east gate was opened", "a letter came from the coast", "the pump was primed", "the choir rehearsed",
)  # fmt: skip
KEY_WORDS = frozenset(QUALITIES + THINGS + PEOPLE + GOODS)
MOST_KEYS = 12  # facts like each other
MOST_QUESTIONS = 4  # about them
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# one attribute of a thing: (the fact, ways to ask for it); {answer} stands where the answer begins
ATTRIBUTES = (
    ("The entry number of the {key} was set to {value}.",
     ("What was the entry number of the {key} set to? It was set to {answer}.",
      "Recall: the entry number of the {key} was set to {answer}.")),
    ("In the ledger, the {key} is listed under {value}.",
     ("Under what is the {key} listed in the ledger? Under {answer}.", "As noted, the {key} is listed under {answer}.")),
    ("Note for later: whoever asks about the {key} should be told {value}.",
     ("Someone asks about the {key}. Tell them: {answer}.", "Q: What should one be told about the {key}?\nA: {answer}\n")),
    ("{value} is what they painted on the door of the {key}.",
     ("What did they paint on the door of the {key}? They painted {answer}.",
      "Q: What is on the door of the {key}?\nA: {answer}\n")),
    ("[index] {key} => {value}", ("[lookup] {key} => {answer}\n", "According to the index, {key} maps to {answer}.")),
)  # fmt: skip
SEVERAL = (
    ("A crate of {value} was left at the {key}.",
     ("In order, the crates left at the {key} held {answer}.", "Q: What was left at the {key}, in order?\nA: {answer}\n")),
    ("{value} was added to the stores of the {key}.",
     ("List what was added to the stores of the {key}: {answer}.", "The stores of the {key} received, in order, {answer}.")),
)  # fmt: skip
CHAIN = (
    ("{name} was handed a card with {value} on it.", "{name} copied the card of {source}.",
     "Q: What is on the card of {name}?\nA: {answer}\n"),
    ("let {name} be {value};", "let {name} be {source};", "So {name} evaluates to {answer}"),
    ("Cell {name} holds {value}.", "Cell {name} mirrors cell {source}.", "Reading cell {name} gives {answer}."),
)  # fmt: skip
PASSKEYS = (
    ("Keep this in mind: the vault opens with {value}.", ("Which number opens the vault? The vault opens with {answer}.",)),
    ("Important, do not lose this number: {value}.",
     ("You were told not to lose a number. The number was {answer}.", "Q: Which number was not to be lost?\nA: {answer}\n")),
    ("(The caretaker's combination today is {value}, memorise it.)",
     ("The caretaker's combination today, as memorised: {answer}.", "Q: What is the caretaker's combination?\nA: {answer}\n")),
    ("The tower guard whispers tonight's watchword number: {value}.",
     ("The guard asks for the watchword number. One answers {answer}.", "Tonight's watchword number at the tower: {answer}\n")),
    ("Before leaving, the captain wrote {value} in chalk on the hull.",
     ("Q: What did the captain chalk on the hull?\nA: {answer}\n", "In chalk on the hull one still reads {answer}.")),
    ("safe_dial = {value}  # needed further down", ("assert safe_dial == {answer}\n", "print(safe_dial)  # prints {answer}\n")),
)  # fmt: skip
COUNTING = (
    ("At the {key}, {event}.",
     ("Counting the times at the {key} that {event}: {answer}.",
      "Q: At the {key}, how often does the text say that {event}?\nA: {answer}\n")),
)  # fmt: skip
TEMPLATES: frozenset[str] = frozenset(
    [fact for fact, _ in (*ATTRIBUTES, *SEVERAL, *PASSKEYS, *COUNTING)]
    + [question for _, questions in (*ATTRIBUTES, *SEVERAL, *PASSKEYS, *COUNTING) for question in questions]
    + [template for templates in CHAIN for template in templates]
)


@dataclass(frozen=True)
class Question:
    """A question about the facts of an exercise."""

    fact: int  # the first fact that the answer takes, by number
    text: str  # up to the answer
    answer: str
    rest: str  # what follows the answer


@dataclass(frozen=True)
class Exercise:
    """Facts, and questions that they answer, one after another."""

    facts: tuple[str, ...]
    ordered: int  # the first so many facts stand in this order, the others anywhere among them
    questions: tuple[Question, ...]


class Exercises:
    """Exercises of one window; no two have a key, a name or a passkey's template in common, so that each has one answer.

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
        fact, _ = self._pick(ATTRIBUTES)
        return fact.format(key=self._key(), value=self._value())

    def _key_value(self, most: int) -> Exercise:
        fact, questions = self._pick(ATTRIBUTES)
        key, value = self._key(), self._value()
        return _exercise((fact.format(key=key, value=value),), self._pick(questions), value, key=key)

    def _several_keys(self, most: int) -> Exercise:
        fact, questions = self._pick(ATTRIBUTES)
        kind = self._pick(self._kinds)
        keys = self._keys(self._between(2, min(most, MOST_KEYS)))
        pairs = [(key, kind(self)) for key in keys]
        facts = tuple(fact.format(key=key, value=value) for key, value in pairs)
        asked = range(self._between(1, min(len(pairs), MOST_QUESTIONS)))
        return Exercise(facts, 1, tuple(_question(i, self._pick(questions), pairs[i][1], key=pairs[i][0]) for i in asked))

    def _several_values(self, most: int) -> Exercise:
        fact, questions = self._pick(SEVERAL)
        key, values = self._key(), self._some(GOODS, self._between(2, min(most, 4)))
        facts = [fact.format(key=key, value=value) for value in values]
        answer = f"{', '.join(values[:-1])} and {values[-1]}"
        return _exercise(tuple(text[0].upper() + text[1:] for text in facts), self._pick(questions), answer, key=key)

    def _variable_chain(self, most: int) -> Exercise:
        first, following, question = self._pick(CHAIN)
        names = [self._unused(self._name) for _ in range(self._between(2, min(most, 5)))]
        value = self._digits()
        facts = [first.format(name=names[0], value=value)]
        facts += [following.format(name=name, source=source) for source, name in zip(names, names[1:])]
        return _exercise(tuple(facts), question, value, name=names[-1])

    def _passkey(self, most: int) -> Exercise:
        left = [pair for pair in PASSKEYS if pair[0] not in self._used]
        if not left:
            return self._key_value(most)
        fact, questions = self._pick(left)
        self._used.add(fact)
        value = self._digits()
        return _exercise((fact.format(value=value),), self._pick(questions), value)

    def _counting(self, most: int) -> Exercise:
        fact, questions = self._pick(COUNTING)
        key, event = self._key(), self._pick(EVENTS)
        count = self._between(1, min(most, len(NUMBERS) - 1))
        facts = (fact.format(key=key, event=event),) * count
        return _exercise(facts, self._pick(questions), NUMBERS[count], key=key, event=event)

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
        """So many keys, in a third of the cases each drawn alone, in a third all alike but for one word, and in a third from
        a grid of few words, of which it takes two to tell a key.
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
        digits = self._between(3, 7)
        return str(self._between(10 ** (digits - 1), 10**digits - 1))

    def _code(self) -> str:
        letters = "".join(chr(65 + self._below(26)) for _ in range(self._between(2, 3)))
        return f"{letters}-{self._between(100, 9999)}"

    def _pair(self) -> str:
        return f"{self._pick(PEOPLE)} and {self._pick(PEOPLE)}"

    _kinds: tuple[Callable[["Exercises"], str], ...] = (_digits, _digits, _code, _pair)

    def _value(self) -> str:
        return self._pick(self._kinds)(self)


def _exercise(facts: tuple[str, ...], template: str, answer: str, **words: str) -> Exercise:
    return Exercise(facts, len(facts), (_question(0, template, answer, **words),))


def _question(fact: int, template: str, answer: str, **words: str) -> Question:
    before, after = template.split("{answer}")
    return Question(fact, before.format(**words), answer, after)
