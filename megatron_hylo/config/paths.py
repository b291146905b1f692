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


HUGGING_FACE = "hf:"  # before the path of a Hugging Face folder that is read in place of a model folder


def hugging_face_folder(given: str) -> Path | None:
    """The folder of `hf:PATH`, `~` expanded; None for anything else."""
    return expand_home(given.removeprefix(HUGGING_FACE)) if given.startswith(HUGGING_FACE) else None


def plain_path(given: str) -> str:
    """The path of `hf:PATH`; anything else as it is."""
    return str(hugging_face_folder(given) or given)


def short_names(folders: Sequence[str | Path]) -> list[str]:
    """The shortest ends of paths that tell them apart: ["a/code", "b/code"] as they are, of ["a/code", "b/prose"] the last."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
