"""Checks of prompts and of settings of generation, before PyTorch is imported."""

from megatron_hylo.config import ConfigError


def check_prompt(prompt: str) -> None:
    """Refuse a prompt with half surrogate pairs, which invalid bytes of a command line become: no tokenizer takes them.

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
