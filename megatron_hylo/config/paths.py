"""Paths as users write them."""

from pathlib import Path

from megatron_hylo.config.errors import ConfigError


def expand_home(path: str | Path) -> Path:
    """The path with `~` and `~user` at its start replaced by the home folder.

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder; write the path in full") from error
