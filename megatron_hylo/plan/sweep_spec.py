"""Files of sweep specifications (`plan.sweep` has their keys): a base, recipes, a grid, evaluations."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.plan.sweep_cells import Measurement
from megatron_hylo.plan.yaml_files import read_yaml

KINDS: dict[str, tuple[type, str]] = {
    "base": (str, "a path"), "output": (str, "a path"), "recipe": (str, "a path"), "teacher": (str, "a path"),
    "student": (dict, "settings by name"), "train": (dict, "settings by name"), "stages": (dict, "stages by name"),
    "evaluate": (dict, "evaluations by name"), "grid": (dict, "lists of values by name"), "cells": (list, "a list of settings"),
}  # fmt: skip
SPEC_KEYS = (*KINDS, "retries", "at_once", "gpus")


def read_spec(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Content of a specification over that of its `base`, with recipes in place of their names.

    Args:
        file: the specification.
        above: those whose base it is, which it cannot have for its own.

    Raises:
        ConfigError: not a specification, or a file that it names is not there.
    """
    if not file.is_file():
        raise ConfigError(f"there is no {file}; write a specification as docs/scaling.md has it")
    spec = read_yaml(file.read_text(), file, f"its keys are {', '.join(SPEC_KEYS)}")
    if unknown := sorted(set(spec) - set(SPEC_KEYS)):
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}; known keys: {', '.join(SPEC_KEYS)}")
    for name, (kind, words) in KINDS.items():
        if spec.get(name) is not None and not isinstance(spec[name], kind):
            raise ConfigError(f"{file}: {name} must be {words}, got {spec[name]!r}")
    if recipe := spec.pop("recipe", None):
        spec["train"] = merged(_recipe(recipe, file), spec.get("train") or {})
    for name, settings in (spec.get("stages") or {}).items():
        if settings is not None and not isinstance(settings, dict):
            raise ConfigError(f"{file}: stages.{name} must be settings of `hylo train` by name, or null, got {settings!r}")
        if settings and isinstance(settings.get("recipe"), str):
            spec["stages"][name] = settings | {"recipe": _recipe(settings["recipe"], file)}
    if (base := spec.pop("base", None)) is None:
        return spec
    path = _beside(base, file)
    if path is None or path.resolve() in above:
        raise ConfigError(f"{file}: there is no base {base}" if path is None else f"{file} is its own base, by way of {base}")
    below = read_spec(path, (*above, file.resolve()))
    points = {name: spec[name] for name in ("grid", "cells") if name in spec}
    if points:
        below = {name: value for name, value in below.items() if name not in ("grid", "cells")}
    both = merged(below, spec)
    if below.get("stages") and spec.get("stages"):
        both["stages"] = {
            name: both["stages"][name] for name in _stage_order(list(below["stages"]), list(spec["stages"]), file)
        }
    return both


def _stage_order(below: list[str], above: list[str], file: Path) -> list[str]:
    """Order of the stages of a base and of a specification, one of which must name all."""
    if set(above) <= set(below):
        return below
    if set(below) <= set(above):
        return above
    raise ConfigError(f"{file}: stages must name all of its base's ({', '.join(below)}) beside its own, in their order")


def _recipe(recipe: str, file: Path) -> dict[str, Any]:
    path = _beside(recipe, file)
    if path is None:
        raise ConfigError(f"{file}: there is no recipe {recipe}")
    values = read_yaml(path.read_text(), path, "write keys as megatron_hylo/recipes has them")
    values.pop("output", None)  # of another run
    return values


def _beside(name: str, file: Path) -> Path | None:
    """The file of that name, as it is or in the folder of another one."""
    return next((path for path in (Path(name).expanduser(), file.parent / name) if path.is_file()), None)


def read_measurements(spec: dict[str, Any], file: Path) -> list[Measurement]:
    """Evaluations of `evaluate`, on the runs' own held-out text where they name none.

    Raises:
        ConfigError: settings that `hylo eval` does not have, or a stage that is none; the message names the evaluation.
    """
    found = []
    for name, given in (spec.get("evaluate") or {}).items():
        if given is None:
            continue
        values = dict(given) if isinstance(given, dict) else {"": given}
        after = values.pop("after", None)
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(SuiteSettings)})
        if unknown or not values.get("suites"):
            known = ", ".join(f.name for f in dataclasses.fields(SuiteSettings))
            raise ConfigError(f"{file}: evaluate.{name} must have suites, and settings out of {known}, after; got {given!r}")
        strangers = [stage for stage in after or () if stage not in (spec.get("stages") or {})]
        if strangers:
            raise ConfigError(f"{file}: evaluate.{name}.after has {strangers[0]!r}, which is none of stages")
        values.setdefault("data", (spec.get("train") or {}).get("data"))
        try:
            settings = SuiteSettings(**values)
        except ConfigError as error:
            raise ConfigError(f"{file}: evaluate.{name}: {error}") from error
        found.append(Measurement(str(name), settings, None if after is None else tuple(after)))
    return found


def whole_number(spec: dict[str, Any], file: Path, name: str, default: int, least: int) -> int:
    """Return a key of a specification that is a whole number of at least `least`.

    Args:
        spec: the specification.
        file: it is from, for messages.
        name: the key.
        default: its value where it is not there.
        least: smallest value.

    Raises:
        ConfigError: it is something else.
    """
    value = spec.get(name, default)
    if type(value) is not int or value < least:
        raise ConfigError(f"{file}: {name} must be a whole number of at least {least}, got {value!r}")
    return value


def grid_points(grid: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """List all combinations of a grid's values, each as settings by name; the last name varies fastest.

    Args:
        grid: name -> list of values; empty for no combinations.
        file: the specification, for messages.

    Raises:
        ConfigError: something else than a list of values, or an empty one.
    """
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: grid.{name} must be a list of values, got {values!r}")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge nested settings; those above win."""
    both = dict(below)
    for name, value in above.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
