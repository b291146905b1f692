"""Chat data: conversations written out by a tokenizer's chat template, and which of their characters are answers.

Answers are the assistant's turns with the token that ends them. A template with `{% generation %}` marks them itself. Of
another one each turn is the difference of two renderings: the conversation up to it with the template's generation prompt, and
with it. Where one is not the beginning of the other, as with templates that rewrite former turns, the conversation is left out.
"""

import re
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import NoAnswerError, Spans, TextField

ROLE = "assistant"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_field(tokenizer: Any, key: str, answers_only: bool = False) -> TextField:
    """Conversations under `key`, each a list of {"role", "content"}, as the tokenizer's chat template writes them.

    Args:
        tokenizer: of transformers.
        key: of the conversation.
        answers_only: find the answers; conversations without any, or of which they cannot be told, give no document.

    Returns:
        A field whose function raises NoAnswerError for those that give none.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat_template, which chat data needs; give the folder of an instruct model")
    if not answers_only:
        return TextField(key, lambda messages: (_render(tokenizer, messages), None))
    find = _marked_answers if _MARKED.search(tokenizer.get_chat_template()) else _answers_by_difference

    def render(messages: Any) -> tuple[str, Spans | None]:
        """Return the text of a conversation and the spans of its answers; NoAnswerError without any."""
        text, spans = find(tokenizer, messages)
        if not spans:
            raise NoAnswerError("no answer to learn", f"no message of role {ROLE}")
        return text, spans

    return TextField(key, render)


def _render(tokenizer: Any, messages: Any, prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _marked_answers(tokenizer: Any, messages: Any) -> tuple[str, Spans]:
    """Text and what the template marks in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, marked = rendered
    return texts[0], tuple((int(start), int(stop)) for start, stop in marked[0] if stop > start)


def _answers_by_difference(tokenizer: Any, messages: Any) -> tuple[str, Spans]:
    """Text and the assistant's turns in it.

    Raises:
        NoAnswerError: a turn's rendering is not part of the whole one, or does not hold the message.
    """
    whole, spans = _render(tokenizer, messages), []
    for number, message in enumerate(messages):
        if message.get("role") != ROLE:
            continue
        before, after = _render(tokenizer, messages[:number], True), _render(tokenizer, messages[: number + 1])
        if not after.startswith(before) or not whole.startswith(after):
            raise NoAnswerError("answers cannot be told apart", f"the template rewrites turns before message {number + 1}")
        turn, content = after[len(before) :], message.get("content")
        if isinstance(content, str) and content.strip() not in turn:
            raise NoAnswerError("answers cannot be told apart", f"the template does not write message {number + 1} as it is")
        kept = len(turn.rstrip()) if not turn.endswith(str(content)) else len(turn)
        if kept:  # the template's own white space behind the token that ends a turn is nobody's to learn
            spans.append((len(before), len(before) + kept))
    return whole, tuple(spans)
