"""Descriptions of model folders, hylo.json; PyTorch is not imported, so that a folder that is none is refused at once."""

from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError, ModelConfig, from_dict
from megatron_hylo.io import has_manifest, read_verified_json

FORMAT, VERSION = "megatron_hylo.model", 1


def read_description(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the whole of hylo.json of a model folder.

    Raises:
        ConfigError: not a model folder, or one of another format version.
    """
    file = Path(path) / "hylo.json"
    if not file.is_file():
        raise ConfigError(f"{path} is not a megatron_hylo model folder: it has no hylo.json{suggestion(Path(path))}")
    description = read_verified_json(path, "hylo.json")
    if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise ConfigError(
            f"{file}: format {description.get('format')} {description.get('version')}, expected {FORMAT} {VERSION}"
        )
    return from_dict(ModelConfig, description["model"], str(file)), description


def suggestion(path: Path) -> str:
    """Say what was probably meant by a folder without hylo.json: a run's model, or a Hugging Face folder; empty for neither."""
    for places in ("model", "checkpoints/step_*", "*/model", "*/checkpoints/step_*"):
        found = [folder for folder in path.glob(places) if (folder / "hylo.json").is_file() and has_manifest(folder)]
        if found:
            newest = max(found, key=lambda folder: ((folder / "hylo.json").stat().st_mtime, folder.name))
            return f"; did you mean {newest}?"
    if (path / "config.json").is_file():
        return (
            f"; a Hugging Face folder is read by `hylo train` as hf:{path}, by other commands once `hylo convert` has read it"
        )
    return "" if path.exists() else "; there is no such folder"
