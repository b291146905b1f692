"""Errors of a setting that cannot work and of a run that failed, and dataclasses out of mappings."""

import dataclasses
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what to do."""


class RunFailure(RuntimeError):
    """A failure of a run that the same command may not meet again: a rank that died, a machine that is slow."""


def from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from a mapping, refusing unknown keys.

    Args:
        cls: a dataclass type; fields that are dataclasses themselves may be given as mappings.
        values: field name -> value.
        where: what to call the source in an error message (a file name, an option).

    Raises:
        ConfigError: an unknown key, or a required one that is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    types: dict[str, Any] = {name: field.type for name, field in fields.items()}
    nested = {k: from_dict(types[k], v, f"{where}.{k}") if isinstance(v, Mapping) else v for k, v in values.items()}
    try:
        return cls(**nested)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
