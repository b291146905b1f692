"""Paths of models, looked at before PyTorch is imported, so that one at which there is no model is refused at once."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io.folder_kinds import hint, is_a
from megatron_hylo.io.gguf_file import gguf_file
from megatron_hylo.models.description import read_description


def check_source(path: str | Path) -> None:
    """Refuse a path that is neither a folder with a config.json nor a .gguf file or a folder with one; no weight is read.

    Raises:
        ConfigError: there is nothing, no config.json, or one that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists()
        fetch = f"; if it is a name on the Hub, `hf download {path} --local-dir FOLDER` fetches it" if hub else ""
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder or a .gguf file{fetch}")
    if gguf_file(path) is None:
        read_hf_config(path)


def check_model(path: str | Path) -> None:
    """`check_source` of verbs that take model folders and training checkpoints as well.

    Raises:
        ConfigError: as `check_source`, or a model folder of another format version.
        DamagedError: hylo.json is not what the folder's manifest says.
    """
    path = Path(path)
    if (path / "hylo.json").is_file():
        read_description(path)
    elif path.is_dir() and gguf_file(path) is None and (not (path / "config.json").is_file() or is_a(path, "run")):
        raise ConfigError(
            f"{path} holds no model: it has no config.json{_of_a_model(path)} and no hylo.json{hint(path, 'model')}"
        )
    else:
        check_source(path)


def check_hf_folder(folder: Path) -> None:
    """Refuse a folder of `hf:PATH` that holds no model of safetensors; no weight is read.

    Raises:
        ConfigError: a name on the Hub, a GGUF file, a model folder, or no config.json.
    """
    if not folder.exists():
        raise ConfigError(
            f"hf:{folder}: there is no such folder; hf: takes a folder on this machine and downloads nothing (`hf download "
            f"{folder} --local-dir FOLDER` fetches a model)"
        )
    if (folder / "hylo.json").is_file():
        raise ConfigError(f"hf:{folder} is a model folder of megatron_hylo; give {folder} without hf:")
    if not folder.is_dir() or (gguf_file(folder) is not None and not (folder / "config.json").is_file()):
        raise ConfigError(f"hf:{folder} is no Hugging Face folder with safetensors; `hylo convert` reads GGUF files")
    read_hf_config(folder)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face folder.

    Raises:
        ConfigError: the folder or the file is not there, or is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file() or is_a(folder, "run"):
        meant = hint(folder, "Hugging Face")
        meant += "; give the folder that has config.json and the weights" if folder.exists() else ""
        raise ConfigError(f"{folder} is not a Hugging Face folder: it has no config.json{_of_a_model(folder)}{meant}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error


def _of_a_model(folder: Path) -> str:
    """Tell the config.json that a folder has not from the one that it has: a run's holds settings."""
    return " of a model" if (folder / "config.json").is_file() else ""
