"""Beginnings of sampled documents: nothing, a chat's turns, or the first tokens of a dataset's documents."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from megatron_hylo.config import ConfigError
from megatron_hylo.data.packed import DocumentStore

Kind = Literal["plain", "chat", "start"]
USER, ASSISTANT = "hylo-user-turn", "hylo-assistant-turn"  # stand for the turns' texts where a template is taken apart


@dataclass
class Draft:
    """A document that is being written.

    Attributes:
        kind: what it began with.
        ids: its tokens so far, those given in its prompt included.
        given: how many of them were given and not sampled.
        forced: tokens to read next, in place of sampled ones.
        turn: the chat's turn that is written, 0 the user's and 1 the assistant's.
        ended: whether the model ended it; one that has no room left was cut off.
    """

    kind: Kind
    ids: list[int] = field(default_factory=list)
    given: int = 0
    forced: deque[int] = field(default_factory=deque)
    turn: int = 0
    ended: bool = False

    def give(self, ids: Sequence[int]) -> None:
        """Append tokens that are not sampled, and have the model read them."""
        self.ids += ids
        self.given += len(ids)
        self.forced.extend(ids)


@dataclass(frozen=True)
class ChatPieces:
    """Token ids of a chat template around a user's and an assistant's turn."""

    head: list[int]
    middle: list[int]  # from the end of the user's text on
    tail: list[int]  # from the end of the assistant's text on


class Prompts:
    """Draws what documents begin with and follows them to their end.

    Args:
        tokenizer: of transformers.
        ends: tokens that end a document or a chat's turn.
        end: the one that stands between documents, which the model reads before each where the tokenizer adds no other.
        chat_share: part of the documents that are chats, one user's turn and one answer, both written by the model.
        starts: documents of which others begin with the first tokens.
        starts_share: part of the documents that are those.
        start_tokens: how many tokens.

    Raises:
        ConfigError: shares that are not; a tokenizer without a chat template; no document that is long enough.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        end: int,
        chat_share: float = 0.0,
        starts: DocumentStore | None = None,
        starts_share: float = 0.0,
        start_tokens: int = 64,
    ) -> None:
        shares = {"chat_share": chat_share, "starts_share": starts_share}
        if not all(0 <= share <= 1 for share in shares.values()) or sum(shares.values()) > 1:
            said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ConfigError(f"shares of documents must be between 0 and 1 and at most 1 together, got {said}")
        if (starts is None) != (starts_share == 0):
            raise ConfigError(
                f"documents that begin as those of a dataset need both starts, its folder, and a starts_share, got "
                f"{'no starts' if starts is None else 'starts'} and starts_share {starts_share:g}"
            )
        self.ends, self.chat_share, self.starts_share = frozenset(ends), chat_share, starts_share
        self.before = list(tokenizer("").input_ids) or [end]
        self.chat = chat_pieces(tokenizer) if chat_share else None
        self.starts, self.start_tokens = starts, start_tokens
        if starts is not None:
            self.long_enough = np.flatnonzero(starts.lengths > start_tokens)
            if not len(self.long_enough):
                raise ConfigError(
                    f"no document of the starts is longer than start_tokens {start_tokens}: the longest has "
                    f"{int(starts.lengths.max()):,} tokens; give fewer, or another dataset"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, with what is read before it."""
        chat = 0 if self.chat is None else len(self.chat.head) + len(self.chat.middle)
        return len(self.before) + max(chat, self.start_tokens if self.starts is not None else 0)

    def begin(self, random: np.random.Generator) -> Draft:
        """Draw the beginning of a document."""
        place = random.random()
        if self.chat is not None and place < self.chat_share:
            draft = Draft("chat")
            if self.chat.head[: len(self.before)] != self.before:
                draft.forced.extend(self.before)
            draft.give(self.chat.head)
            return draft
        draft = Draft("plain", forced=deque(self.before))
        if self.starts is not None and place < self.chat_share + self.starts_share:
            draft.kind = "start"
            number = int(random.choice(self.long_enough))
            draft.give(self.starts.read(number, 0, self.start_tokens).tolist())
        return draft

    def take(self, draft: Draft, token: int) -> bool:
        """Append a sampled token to a document, or what the template has in its place; True where that ends it."""
        if token not in self.ends:
            draft.ids.append(token)
            return False
        if draft.kind == "chat" and self.chat is not None and draft.turn == 0:
            draft.turn = 1
            draft.give(self.chat.middle)
            return False
        if draft.kind == "chat" and self.chat is not None:
            draft.ids += self.chat.tail
            draft.given += len(self.chat.tail)
        draft.ended = True
        return True


def chat_pieces(tokenizer: Any) -> ChatPieces:
    """Take a chat template apart.

    Raises:
        ConfigError: the tokenizer has none, or one that does not write turns as they are.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template, so no chats can be sampled; leave chat_share at 0")
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    try:
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template cannot be used: {error}; leave chat_share at 0") from error
    head, found, middle = asked.partition(USER)
    if not found or not whole.startswith(asked) or not whole[len(asked) :].startswith(ASSISTANT):
        raise ConfigError("the tokenizer's chat template rewrites its turns, so chats cannot be sampled; leave chat_share at 0")
    tail = whole[len(asked) + len(ASSISTANT) :]
    return ChatPieces(*(tokenizer(part, add_special_tokens=False).input_ids for part in (head, middle, tail)))
