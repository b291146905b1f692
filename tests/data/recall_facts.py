"""Reads facts of recall exercises back: which wording, thing and value a line has."""

import re
from typing import NamedTuple

from megatron_hylo.data.recall_wording import FACTS, NOUNS, PASSKEYS, PEOPLE, SECRET_FACTS, SECRETS

GROUPS = {
    "KKKK": r"(?:[Tt]he )?(?P<key>[A-Za-z][\w -]*)",
    "NNNN": f"(?P<noun>{'|'.join(NOUNS)})",
    "SSSS": f"(?P<secret>(?i:{'|'.join(map(re.escape, SECRETS))}))",
    "VVVV": "(?P<value>[A-Za-z0-9][A-Za-z0-9 -]*)",
}


class Parts(NamedTuple):
    """Parts of a fact: the name of its thing, or its secret; the noun of what is told; the value."""

    name: str
    noun: str
    value: str


def _pattern(fact: str) -> re.Pattern[str]:
    words = dict.fromkeys(("key", "the", "The"), "KKKK") | dict.fromkeys(("secret", "Secret"), "SSSS")
    text = re.escape(fact.format(**words, noun="NNNN", value="VVVV"))
    for mark, group in GROUPS.items():
        text = text.replace(mark, group, 1)
    return re.compile(text)


PATTERNS = {fact: _pattern(fact) for fact in (*(fact for fact, _ in FACTS), *PASSKEYS, *SECRET_FACTS)}


def parse_fact(line: str) -> tuple[tuple[str, str], Parts] | None:
    """(template and noun, what it is about) of a fact; None of another line."""
    found = [(fact, match.groupdict()) for fact, pattern in PATTERNS.items() if (match := pattern.fullmatch(line))]
    if not found:
        return None
    ((fact, words),) = found
    parts = Parts(words.get("key") or words.get("secret") or fact, words.get("noun", ""), words["value"])
    return (fact, parts.noun), parts


def plain_key(name: str) -> str:
    """A name without hyphens, underscores and capitals: two names that differ in these alone are one."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[0-9]+", name)).lower()


def answers_of(answer: str) -> list[str]:
    """Values of an answer: a sentence's, or a line each; one of a single fact stays whole."""
    lines = [re.sub(r"^([-*]|[0-9][.)]) ", "", line) for line in answer.split("\n")]
    if len(lines) > 1 or re.fullmatch(f"({'|'.join(PEOPLE)}) and ({'|'.join(PEOPLE)})", answer):
        return lines
    return re.split(", | and ", lines[0])
