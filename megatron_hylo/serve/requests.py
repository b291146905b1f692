"""Checks of prompts and of settings of generation, before PyTorch is imported."""

import json
from typing import Any

from megatron_hylo.config import ConfigError


def check_prompt(prompt: str) -> None:
    """Refuse a prompt with half surrogate pairs, which invalid bytes of a command line become: no tokenizer takes them.

    An empty one is refused once it is tokenised: a chat template, or a token that begins every text, makes a prompt of it.

    Raises:
        ConfigError: it has some.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not text: invalid bytes, or half a surrogate pair, at character {error.start:,}; give it in UTF-8"
        ) from error


def check_settings(max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: one is.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ConfigError(
            f"need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0, got {max_new_tokens}, "
            f"{temperature}, {top_p} and {repetition_penalty}"
        )


def read_prompts(lines: str) -> list[dict[str, Any]]:
    """Read prompts out of JSON Lines: a string, or an object with `prompt` and what else its result is to have, a line.

    Returns:
        An object with a `prompt` a line.

    Raises:
        ConfigError: a line that is neither, or whose prompt is empty or `check_prompt` refuses; none at all.
    """
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f'line {number} of the prompts is not JSON: {error}; give {{"prompt": "..."}} a line, and a file as - < FILE'
            ) from error
        one = found if isinstance(found, dict) else {"prompt": found}
        if not isinstance(one.get("prompt"), str):
            raise ConfigError(f'line {number} of the prompts is no string and no object with a string "prompt"')
        if not one["prompt"]:
            raise ConfigError(f"line {number} of the prompts: the prompt is empty")
        try:
            check_prompt(one["prompt"])
        except ConfigError as error:
            raise ConfigError(f"line {number} of the prompts: {error}") from error
        prompts.append(one)
    if not prompts:
        raise ConfigError('there are no prompts; give {"prompt": "..."} a line')
    return prompts
