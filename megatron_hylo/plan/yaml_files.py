"""Settings in YAML files that users write."""

from pathlib import Path
from typing import Any

import yaml

from megatron_hylo.config import ConfigError


def read_yaml(text: str, file: str | Path, advice: str) -> dict[str, Any]:
    """Settings by name in the text of a YAML file.

    Raises:
        ConfigError: not YAML, or no settings; the message names the file and gives the advice.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no settings; {advice}")
    return values
