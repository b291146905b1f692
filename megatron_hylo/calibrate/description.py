"""Descriptions of calibration folders, calibration.json; PyTorch is not imported, so that another folder is refused at once."""

from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.io import read_verified_json
from megatron_hylo.io.folder_kinds import hint

FORMAT, VERSION = "megatron_hylo.calibration", 1


def read_calibration(path: str | Path) -> dict[str, Any]:
    """Read calibration.json of a calibration folder.

    Raises:
        ConfigError: not a calibration folder, or one of another format version.
        DamagedError: the file is not what the folder's manifest says.
    """
    file = Path(path) / "calibration.json"
    if not file.is_file():
        meant = hint(path, "calibration")
        raise ConfigError(f"{path} is not a calibration folder: it has no calibration.json{meant}; `hylo calibrate` makes one")
    description = read_verified_json(path, "calibration.json", ("teacher", "layers", "tokens", "sequence_length"))
    if (description.get("format"), description.get("version")) != (FORMAT, VERSION):
        raise ConfigError(f"{file}: format {description.get('format')}, expected {FORMAT} {VERSION}")
    return description
