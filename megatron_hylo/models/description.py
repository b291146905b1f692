"""Descriptions of model folders, hylo.json; PyTorch is not imported, so that a folder that is none is refused at once."""

from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError, ModelConfig, from_dict
from megatron_hylo.io import read_verified_json
from megatron_hylo.io.folder_kinds import KINDS, hint

FORMAT, VERSION = "megatron_hylo.model", 1


def read_description(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the whole of hylo.json of a model folder.

    Raises:
        ConfigError: not a model folder, or one of another format version.
    """
    file = Path(path) / "hylo.json"
    if not file.is_file():
        meant = hint(path, "model")
        if meant.endswith(KINDS["Hugging Face"].words):
            meant = f"; a Hugging Face folder is read by `hylo train` as hf:{path}, by others once `hylo convert` has read it"
        raise ConfigError(f"{path} is not a megatron_hylo model folder: it has no hylo.json{meant}")
    description = read_verified_json(path, "hylo.json")
    if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise ConfigError(
            f"{file}: format {description.get('format')} {description.get('version')}, expected {FORMAT} {VERSION}"
        )
    return from_dict(ModelConfig, description["model"], str(file)), description
