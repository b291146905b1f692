"""A sweep: cells of settings, each of which makes a student and trains it in a folder of its own.

SPEC.yaml:

    output: runs/sweep              # students/, cells/NAME/, results.parquet, report.md
    recipe: RECIPE.yaml             # settings of `hylo train` that all cells begin with; may be left out
    teacher: models/teacher         # of the students, and of training
    student: {calibration: models/calibration, linear: G, mla: 8}   # settings of `hylo upcycle`
    train: {data: data/text, sequence_length: 2048}                 # settings of `hylo train`, over the recipe's
    grid:                           # all combinations
      student.mla: [4, 8, [0, 5, 9]]          # number of MLA layers, evenly spread, or which ones
      train.train_tokens: [250_000, 1_000_000]
    cells:                          # besides, or instead
      - {student.overrides.kv_lora_rank: 64, train.recall.share: 0.2}
    retries: 1                      # times that a failed cell is started again
    at_once: 4                      # cells that run side by side on this machine, or tasks of the Slurm array
    gpus: 2                         # GPUs of this machine over which those are spread

`student` may be left out where `train` has a model or a scratch. A cell's name has a hash of its settings: what is done stays
done when the grid grows.
"""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import expand_pattern, get_layout, hybrid_config, uniform_mixers
from megatron_hylo.config.mixers import MLA_SYMBOL
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.eval.runs import read_run, run_state
from megatron_hylo.plan.job import read_settings, shape
from megatron_hylo.plan.yaml_files import read_yaml

SPEC_KEYS = ("output", "recipe", "teacher", "student", "train", "grid", "cells", "retries", "at_once", "gpus")
STOPPED = 3  # exit status of a cell that a signal ended
KINDS: dict[str, tuple[type, str]] = {
    "output": (str, "a path"), "recipe": (str, "a path"), "teacher": (str, "a path"), "student": (dict, "settings by name"),
    "train": (dict, "settings by name"), "grid": (dict, "lists of values by name"), "cells": (list, "a list of settings"),
}  # fmt: skip
CELL_GROUPS = ("teacher", "student", "train")
State = Literal["waiting", "running", "finished", "stopped", "failed", "killed"]


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep.

    Args:
        number: its place in the grid.
        name: of its folder.
        folder: of its run and notes.
        varied: settings that tell it from the others, by name.
        train: settings of its run.
        upcycle: settings of its student; None where the run has a model already.
    """

    number: int
    name: str
    folder: Path
    varied: dict[str, Any]
    train: TrainConfig
    upcycle: UpcycleConfig | None

    @property
    def run(self) -> Path:
        """Run folder: `run`, or `run_N` where the task N of a Slurm array made it."""
        return next(iter(sorted(self.folder.glob("run_*"))), self.folder / "run")

    def state(self) -> tuple[State, str]:
        """State of its run, and the words with which it ended."""
        if not (self.run / "config.json").is_file():
            failed = [attempt for attempt in self.attempts() if attempt["code"] not in (0, STOPPED)]
            return ("failed", failed[-1].get("message", "")) if failed else ("waiting", "")
        return run_state(read_run(self.run, self.name))

    def attempts(self) -> list[dict[str, Any]]:
        """Starts of this cell on this machine that ended, oldest first: {code, seconds, message}."""
        file = self.folder / "attempts.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@dataclass(frozen=True)
class Sweep:
    """All cells of a specification.

    Args:
        file: the specification.
        output: folder of everything.
        cells: in the order of the grid, then those of the list.
        retries: times that a failed cell is started again.
        at_once: cells side by side.
        gpus: GPUs of this machine that they are spread over.
    """

    file: Path
    output: Path
    cells: list[Cell]
    retries: int
    at_once: int
    gpus: int = 1


def read_sweep(file: Path) -> Sweep:
    """Read a specification and check the settings of every cell, before any is started.

    Raises:
        ConfigError: not a specification, or settings of a cell that cannot work; the message names the cell.
    """
    if not file.is_file():
        raise ConfigError(f"there is no {file}; write a specification as docs/scaling.md has it")
    spec = read_yaml(file.read_text(), file, f"its keys are {', '.join(SPEC_KEYS)}")
    if unknown := sorted(set(spec) - set(SPEC_KEYS)):
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}; known keys: {', '.join(SPEC_KEYS)}")
    for name, (kind, words) in KINDS.items():
        if spec.get(name) is not None and not isinstance(spec[name], kind):
            raise ConfigError(f"{file}: {name} must be {words}, got {spec[name]!r}")
    if not spec.get("output") or not (spec.get("grid") or spec.get("cells")):
        raise ConfigError(f"{file} needs output, and grid or cells")
    base = _base(spec, file)
    retries, at_once = _count(spec, "retries", 1, 0), _count(spec, "at_once", 1, 1)
    points = [*_grid(spec.get("grid") or {}, file), *(spec.get("cells") or [])]
    output = Path(spec["output"]).expanduser()
    cells, known = [], set()
    for number, varied in enumerate(points):
        try:
            cell = _cell(number, base, varied, output)
        except ConfigError as error:
            raise ConfigError(f"{file}: cell {number} {varied}: {error}") from error
        if cell.name in known:
            raise ConfigError(f"{file}: cell {number} {varied} is there twice; leave one out")
        known.add(cell.name)
        cells.append(cell)
    return Sweep(file, output, cells, retries, at_once, _count(spec, "gpus", 1, 1))


def _base(spec: dict[str, Any], file: Path) -> dict[str, Any]:
    base: dict[str, Any] = {"teacher": spec.get("teacher"), "student": spec.get("student"), "train": {}}
    if recipe := spec.get("recipe"):
        path = next((p for p in (Path(recipe).expanduser(), file.parent / recipe) if p.is_file()), None)
        if path is None:
            raise ConfigError(f"{file}: there is no recipe {recipe}")
        base["train"] = read_yaml(path.read_text(), path, "write keys as megatron_hylo/recipes has them")
        base["train"].pop("output", None)  # of another run
    base["train"] = _merged(base["train"], spec.get("train") or {})
    return base


def _count(spec: dict[str, Any], name: str, default: int, least: int) -> int:
    value = spec.get(name, default)
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _grid(grid: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: grid.{name} must be a list of values, got {values!r}")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings; those above win."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _cell(number: int, base: dict[str, Any], varied: dict[str, Any], output: Path) -> Cell:
    settings = base
    if not isinstance(varied, dict):
        raise ConfigError("a cell must be settings by name, as {student.mla: 4, train.seed: 1}")
    for name, value in varied.items():
        first, *rest = str(name).split(".")
        if first not in CELL_GROUPS or (first == "teacher") == bool(rest):
            raise ConfigError(f"{name!r} must be teacher, student.SETTING (of `hylo upcycle`) or train.SETTING")
        for key in reversed(rest):
            value = {key: value}
        settings = _merged(settings, {first: value})
    if given := next((group for group in ("student", "train") if "output" in (settings[group] or {})), None):
        raise ConfigError(f"{given}.output must be left out: each cell has a folder of its own below output")
    name = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
    folder = output.absolute() / "cells" / name
    train = dict(settings["train"]) | {"output": str(folder / "run")}
    upcycle = None
    if settings["student"] is not None:
        upcycle = _student(settings, output)
        train["model"] = upcycle.output
    if settings["teacher"] and train.get("stage") != "pretrain":
        train.setdefault("teacher", settings["teacher"])
    for key in ("data", "stage"):
        if key not in train:
            raise ConfigError(f"train.{key} is missing")
    if train["stage"] != "pretrain" and not train.get("model"):
        raise ConfigError("give student (settings of `hylo upcycle`), or train.model")
    return Cell(number, name, folder, varied, read_settings(train, "train"), upcycle)


def _student(settings: dict[str, Any], output: Path) -> UpcycleConfig:
    """Settings of `hylo upcycle`; `mla` and `linear` become its pattern. Cells of equal settings share a student."""
    chosen = dict(settings["student"])
    if not settings["teacher"]:
        raise ConfigError("student needs a teacher, a model folder")
    linear, mla = chosen.pop("linear", "G"), chosen.pop("mla", None)
    if mla is not None:
        if chosen.get("pattern") or chosen.get("layout"):
            raise ConfigError("give student.mla, student.pattern or student.layout, not two of them")
        if not all(type(one) is int for one in (mla if isinstance(mla, list) else [mla])):
            raise ConfigError(f"student.mla must be a number of layers or a list of layers, got {mla!r}")
        layers = shape(settings["teacher"]).num_hidden_layers
        if isinstance(mla, int):
            chosen["pattern"] = uniform_mixers(layers, mla, linear)
        else:
            if outside := [one for one in mla if not 0 <= one < layers]:
                raise ConfigError(f"student.mla {outside[0]} is no layer; the teacher has {layers}, counted from 0")
            chosen["pattern"] = "".join(MLA_SYMBOL if layer in mla else linear for layer in range(layers))
    identity = json.dumps(chosen | {"teacher": settings["teacher"]}, sort_keys=True, default=str)
    name = hashlib.sha256(identity.encode()).hexdigest()[:10]
    values = chosen | {"teacher": settings["teacher"], "output": str(output.absolute() / "students" / name)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(UpcycleConfig, as_group=False)
    try:
        made = UpcycleConfig(**vars(parser.instantiate(parser.parse_object(values))))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"student: {' '.join(str(error).split())}") from error
    student_shape(made)
    return made


def student_shape(settings: UpcycleConfig) -> ModelConfig:
    """Shape of the hybrid that `hylo upcycle` would make; a calibrated one's rotary components are left out.

    Raises:
        ConfigError: no layout, or a pattern that does not fit the teacher.
    """
    teacher = shape(settings.teacher)
    if settings.layout:
        return get_layout(settings.layout).config
    if settings.pattern is None:
        raise ConfigError("a student needs layout, pattern or mla")
    pattern = expand_pattern(settings.pattern, teacher.num_hidden_layers, teacher.mlps)
    sizes: dict[str, Any] = dict(settings.overrides or {})
    return hybrid_config(teacher, pattern, shapes=settings.mixer_shapes, **sizes)


def recipe_of(cell: Cell) -> str:
    """Recipe of a cell's run as YAML, without the paths that a Slurm script gives: settings that are not defaults."""
    default = dataclasses.asdict(TrainConfig("pretrain", "-", "-", scratch="-"))
    given = dataclasses.asdict(cell.train)
    left_out = ("data", "output", "model", "teacher")
    kept = {k: v for k, v in given.items() if k == "stage" or (v != default[k] and k not in left_out)}
    return yaml.safe_dump(kept, sort_keys=False)


def settings_of(cell: Cell) -> dict[str, Any]:
    """All settings of a cell, flat, for its row of the results."""
    student = flatten(dataclasses.asdict(cell.upcycle), "student.") if cell.upcycle else {}
    return student | flatten(dataclasses.asdict(cell.train), "train.")
