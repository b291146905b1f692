r"""Documents, places that give none, and the check of what can be tokenised.

A byte that is invalid in a file's encoding is read as the half surrogate pair `INVALID`, so that one check finds it and the
half pairs that JSON escapes such as "\ud83d" can make: no tokenizer, and no file in UTF-8, can hold either.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_hylo.config import ConfigError

logger = logging.getLogger("megatron_hylo.data")
OnBadText = Literal["skip", "replace", "error"]
Spans = tuple[tuple[int, int], ...]
HOPELESS = 1000  # documents in a row from the first that cannot be used: the rest will not be better
SHOWN = 3  # places shown of each reason
EMPTY, BLANK_LINE = "empty document", "blank line"  # nothing is lost with these
INVALID = "\udcff"
_HALF_PAIRS = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text that is never split between training and held-out data."""

    source: str  # package or folder it came from
    name: str  # decides whether it is held out; unique within its source
    text: str
    where: str = field(default="", compare=False)  # file and line, for messages
    answers: Spans | None = None  # (first, last + 1) characters of what alone is learnt; None: all

    @property
    def place(self) -> str:
        """Name the place of a document, for messages."""
        return self.where or f"{self.source}/{self.name}"


@dataclass(frozen=True)
class TextField:
    """Place of an object's text: under `key`, a string, or what `render` makes a string and perhaps its answers of."""

    key: str = "text"
    render: Callable[[Any], tuple[str, Spans | None]] | None = None

    def text(self, value: Any) -> "tuple[str, Spans | None] | Unreadable":
        """The text of what is under the key and its answers; without a place where it is none."""
        if self.render is None:
            if isinstance(value, str):
                return value, None
            return Unreadable("", f'"{self.key}" is not a string', f"it is of type {type(value).__name__}")
        try:
            return self.render(value)
        except NoAnswerError as error:
            return Unreadable("", error.reason, error.detail)
        except Exception as error:  # a template is a program of the tokenizer's author
            return Unreadable("", f'"{self.key}" does not fit the chat template', f"{type(error).__name__}: {error}"[:200])


TEXT = TextField()


class NoAnswerError(ValueError):
    """A conversation of which the answers cannot be found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


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
        former: `state` of a check that this one goes on from.

    Attributes:
        skipped: how many were left out, by reason.
        replaced: documents with characters replaced.
    """

    def __init__(self, on_bad_text: OnBadText = "skip", former: dict[str, Any] | None = None) -> None:
        former = former or {"skipped": {}, "replaced": 0, "places": {}, "usable": 0}
        self.on_bad_text = on_bad_text
        self.skipped: Counter[str] = Counter(former["skipped"])
        self.replaced: int = former["replaced"]
        self._places: dict[str, list[str]] = {reason: list(places) for reason, places in former["places"].items()}
        self._usable: int = former["usable"]

    def state(self) -> dict[str, Any]:
        """Return all counts as JSON can hold them; `former` of a check that goes on with them."""
        places = {reason: list(shown) for reason, shown in self._places.items()}
        return {"skipped": dict(self.skipped), "replaced": self.replaced, "places": places, "usable": self._usable}

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
                answers, moved = item.answers, len(item.text) - len(text)
                if answers and moved:
                    answers = tuple((max(0, start - moved), stop - moved) for start, stop in answers)
                source, name = replace_half_pairs(item.source), replace_half_pairs(item.name)
                yield Document(source, name, text, item.where, answers)
            else:
                self.skip(item.place, EMPTY)

    def encoded(self) -> None:
        """Count a document that the tokenizer could encode."""
        self._usable += 1

    def failed(self, place: str, error: str) -> None:
        """Count a document that passed another check, but that the tokenizer could not encode."""
        self.skip(place, "tokenizer failed", error)

    def with_other(self, other: "TextCheck") -> "TextCheck":
        """Return a check with the counts of both."""
        both = TextCheck(self.on_bad_text)
        both.replaced = self.replaced + other.replaced
        for reason in self.skipped | other.skipped:
            both.skipped[reason] = self.skipped[reason] + other.skipped[reason]
        for reason in self._places | other._places:
            both._places[reason] = [*self._places.get(reason, []), *other._places.get(reason, [])][:SHOWN]
        return both

    def skip(self, where: str, reason: str, detail: str = "") -> None:
        """Leave something out, count it by its reason, and warn where it is among the first.

        Args:
            where: file and line, say.
            reason: counted by this text; `EMPTY` and `BLANK_LINE` are no loss.
            detail: for the message alone.

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
