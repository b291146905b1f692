"""Errors of a setting that cannot work and of a run that failed, and dataclasses out of mappings."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value and what to do."""


class RunFailure(RuntimeError):
    """A failure of a run that the same command may not meet again: a rank that died, a machine that is slow."""


def from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from a mapping, refusing unknown keys.

    Args:
        cls: a dataclass type; fields that are dataclasses themselves, or lists of them, may be given as mappings.
        values: field name -> value.
        where: what to call the source in an error message (a file name, an option).

    Raises:
        ConfigError: no mapping, an unknown key, a required one that is missing, or a value that is none of its field's names.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of {cls.__name__}'s fields to values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
    nested = {name: _nested(fields[name].type, value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**nested)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _nested(kind: Any, value: Any, where: str) -> Any:
    """The value of a field; mappings become the dataclass that its type names, alone, in a union or in a list."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    names = [name for part in parts if get_origin(part) is Literal for name in get_args(part)]
    others = tuple(get_origin(part) or part for part in parts if get_origin(part) is not Literal)
    if names and value not in names and not isinstance(value, others):
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, names))}, got {value!r}")
    if not isinstance(value, (Mapping, list)):
        return value
    for choice in parts:
        if isinstance(value, Mapping) and isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return from_dict(choice, value, where)
        if isinstance(value, list) and get_origin(choice) is list:
            return [_nested(get_args(choice)[0], part, f"{where}[{number}]") for number, part in enumerate(value)]
    return value
