"""Packages that evaluations need and that are installed on request alone."""

import importlib.util

from megatron_hylo.config import ConfigError


def require_lm_eval(what: str) -> None:
    """Refuse what needs lm-eval where it is not installed; looks for it without importing it.

    Args:
        what: needs it, for the sentence.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{what} needs lm-eval, which is not installed; pip install 'megatron-hylo[eval]'")
