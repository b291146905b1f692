"""Settings of `hylo train` that have other names than in earlier versions: refused with the new name, or translated."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hylo.config.errors import ConfigError

RENAMED = {
    "kl_direction": "distil.kl_direction",
    "kl_temperature": "distil.kl_temperature",
    "kl_top_k": "distil.kl_top_k",
    "ce_weight": "distil.ce_weight",
    "mla_rope_scaling": "rope_scaling",
    "align_loss": "align.loss",
    "hidden_weight": "align.hidden_weight",
    "mixer_weight": "align.mixer_weight",
    "save_interval": "checkpoint.save_interval",
    "keep_checkpoints": "checkpoint.keep",
    "async_save": "checkpoint.async_save",
    "log_interval": "logging.log_interval",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
    "wandb_project": "logging.wandb_project",
}


def refuse_renamed(command_line: Sequence[str]) -> None:
    """Refuse keys of earlier versions, before a parser calls them unknown, naming each one's new name.

    Args:
        command_line: arguments of `hylo`, the verb first; verbs other than train are not looked at.

    Raises:
        ConfigError: an option, or a key of a recipe given by --config, has another name now.
    """
    if not command_line or command_line[0] != "train":
        return
    options = [argument[2:].split("=")[0] for argument in command_line if argument.startswith("--")]
    if found := [(name, RENAMED[first] + name[len(first) :]) for name in options if (first := name.split(".")[0]) in RENAMED]:
        raise ConfigError(_sentence("the command line", [(f"--{old}", f"--{new}") for old, new in found]))
    for recipe in recipes(command_line):
        if old_keys := [name for name in _keys(recipe) if name in RENAMED]:
            raise ConfigError(_sentence(recipe, [(name, RENAMED[name]) for name in old_keys]))


def translate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version kept them in config.json, under their present names; others are left as they are."""
    new = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items() if name not in RENAMED
    }
    for name in RENAMED.keys() & settings.keys():
        group, _, key = RENAMED[name].rpartition(".")
        (new.setdefault(group, {}) if group else new)[key] = settings[name]
    return new


def _sentence(where: str, names: Sequence[tuple[str, str]]) -> str:
    changes = ", ".join(f"{old} is now {new}" for old, new in names)
    return f"{where} has settings of an earlier version: {changes}; write the new names (in a recipe, the key below its group)"


def recipes(command_line: Sequence[str]) -> Iterator[str]:
    """Yield the values of --config of a command line, in both spellings."""
    for argument, following in zip(command_line, [*command_line[1:], ""]):
        if argument == "--config":
            yield following
        elif argument.startswith("--config="):
            yield argument.removeprefix("--config=")


def _keys(recipe: str) -> list[str]:
    """Top-level keys of a YAML file; none of one that cannot be read, which the parser answers for."""
    import yaml

    try:
        values = yaml.safe_load(Path(recipe).expanduser().read_text())
    except (OSError, ValueError, RuntimeError, yaml.YAMLError):
        return []
    return [name for name in values if isinstance(name, str)] if isinstance(values, dict) else []
