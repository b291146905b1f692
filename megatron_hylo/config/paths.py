"""Paths as users write them."""

import os
from collections.abc import Sequence
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


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: ["a/code", "b/code"] as they are, of ["a/code", "b/prose"] the last."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
