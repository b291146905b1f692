"""A sweep: cells of settings, each of which makes a student, trains it in one stage or several, and measures it.

SPEC.yaml:

    base: OTHER.yaml                # a specification whose keys this one adds to; its grid and cells are replaced by those here
    output: runs/sweep              # students/, stages/, cells/NAME/, results.parquet, report.md
    recipe: RECIPE.yaml             # settings of `hylo train` that all cells begin with; may be left out
    teacher: models/teacher         # of the students, and of training
    student: {calibration: models/calibration, linear: G, mla: 8}   # settings of `hylo upcycle`
    train: {data: data/text, sequence_length: 2048}                 # settings of `hylo train`, over the recipe's
    stages:                         # one after the other, over train; without them a cell is one run
      align: {stage: align, train_tokens: 600_000}
      8k: {recipe: STAGE.yaml, sequence_length: 8192}               # a recipe is under train here as well
    evaluate:                       # of each stage's result, as `hylo eval` does
      text: {suites: [ppl, recall], lengths: [1024, 8192]}          # data: that of train
      ruler: {suites: [ruler], limit: 20, after: [8k]}
    grid:                           # all combinations
      student.mla: [4, 8, [0, 5, 9]]          # number of MLA layers, evenly spread, or which ones
      train.train_tokens: [250_000, 1_000_000]
    cells:                          # besides, or instead
      - {label: small latents, student.overrides.kv_lora_rank: 64, train.recall.share: 0.2}
      - {student.mla: {selection: runs/select, count: 8}}           # layers that `hylo select` chose
      - {stages.align: null}                                        # without that stage
      - {label: the teacher, student: null, stages: null, train.model: models/teacher}   # only measured
    retries: 1                      # times that a failed cell is started again
    at_once: 4                      # cells that run side by side on this machine, or tasks of the Slurm array
    gpus: 2                         # of this machine's, over which those are spread; by default all that are visible

`student` may be left out where `train` has a model or a scratch. A cell's name has a hash of its settings, and a stage's one of
all settings up to it: what is done stays done when the grid or the stages grow, and cells that begin alike share that.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import expand_pattern, get_layout, hybrid_config, uniform_mixers
from megatron_hylo.config.mixers import MLA_SYMBOL
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.io import read_json
from megatron_hylo.plan.job import read_settings, settings_parser, shape
from megatron_hylo.plan.sweep_cells import STOPPED, Cell, Measurement, Stage, digest
from megatron_hylo.plan.sweep_spec import grid_points, merged, read_measurements, read_spec, whole_number

__all__ = ["STOPPED", "Cell", "Measurement", "Stage", "Sweep", "read_sweep", "settings_of", "student_shape"]
CELL_GROUPS = ("teacher", "student", "train", "stages")


@dataclass(frozen=True)
class Sweep:
    """All cells of a specification.

    Args:
        file: the specification.
        output: folder of everything.
        cells: in the order of the grid, then those of the list.
        retries: times that a failed cell is started again.
        at_once: cells side by side.
        gpus: how many of this machine's they are spread over; None for all.
    """

    file: Path
    output: Path
    cells: list[Cell]
    retries: int
    at_once: int
    gpus: int | None = None


def read_sweep(file: Path) -> Sweep:
    """Read a specification and check the settings of every cell, before any is started.

    Raises:
        ConfigError: not a specification, or settings of a cell that cannot work; the message names the cell.
    """
    spec = read_spec(file)
    if not spec.get("output") or not (spec.get("grid") or spec.get("cells")):
        raise ConfigError(f"{file} needs output, and grid or cells")
    base = {name: spec.get(name) for name in CELL_GROUPS} | {"train": spec.get("train") or {}}
    if spec.get("stages") is None:
        del base["stages"]
    base = _spelt_out(base)
    measurements = read_measurements(spec, file)
    retries, at_once = whole_number(spec, file, "retries", 1, 0), whole_number(spec, file, "at_once", 1, 1)
    points = [*grid_points(spec.get("grid") or {}, file), *(spec.get("cells") or [])]
    output = Path(spec["output"]).expanduser()
    cells, known = list[Cell](), set[str]()
    for number, varied in enumerate(points):
        try:
            cell = _cell(number, base, varied, output, measurements)
        except ConfigError as error:
            raise ConfigError(f"{file}: cell {number} {varied}: {error}") from error
        # two selections may come to the same layers, which then share a cell's folder
        own = digest({name: value for name, value in varied.items() if name != "label"})
        if own in known:
            raise ConfigError(f"{file}: cell {number} {varied} is there twice; leave one out")
        known.add(own)
        cells.append(cell)
    gpus = whole_number(spec, file, "gpus", 1, 1) if "gpus" in spec else None
    return Sweep(file, output, cells, retries, at_once, gpus)


def _settings(base: dict[str, Any], varied: dict[str, Any]) -> dict[str, Any]:
    """Settings of a cell by group: those of the specification with what the cell varies."""
    if not isinstance(varied, dict):
        raise ConfigError("a cell must be settings by name, as {student.mla: 4, train.seed: 1}")
    settings = base
    for name, value in varied.items():
        first, *rest = str(name).split(".")
        if name == "label":
            continue
        dropped = not rest and value is None and first in ("student", "stages")
        if first not in CELL_GROUPS or not (dropped or (first == "teacher") != bool(rest)):
            raise ConfigError(
                f"{name!r} must be label, teacher, student.SETTING (of `hylo upcycle`), train.SETTING or stages.STAGE.SETTING"
                f"; student and stages may be null"
            )
        if first == "stages" and rest and rest[0] not in (base.get("stages") or {}):
            raise ConfigError(f"{name!r} is of no stage; the stages are {', '.join(base.get('stages') or {}) or 'not given'}")
        for key in reversed(rest):
            value = {key: value}
        settings = merged(settings, _spelt_out({first: value}))
    for group, given in (("student", settings["student"]), ("train", settings["train"])):
        if "output" in (given or {}):
            raise ConfigError(f"{group}.output must be left out: each cell has a folder of its own below output")
    student = settings["student"]
    if student is not None and isinstance(student.get("mla"), dict):
        settings = settings | {"student": student | {"mla": selected_layers(student["mla"])}}
    return settings


def _spelt_out(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by cell group, where null in place of a group of `hylo train`'s settings is its defaults."""
    parser = settings_parser(TrainConfig)
    found = dict(settings)
    if isinstance(found.get("train"), dict):
        found["train"] = parser.spelt_out(found["train"])
    if isinstance(found.get("stages"), dict):
        found["stages"] = {
            name: parser.spelt_out(own) if isinstance(own, dict) else own for name, own in found["stages"].items()
        }
    return found


def _cell(number: int, base: dict[str, Any], varied: dict[str, Any], output: Path, measurements: list[Measurement]) -> Cell:
    settings = _settings(base, varied)
    name = digest(settings)
    folder = output.absolute() / "cells" / name
    upcycle = None if settings["student"] is None else _student(settings, output)
    model = settings["train"].get("model") if upcycle is None else upcycle.output
    if "stages" not in settings:
        train = _train(settings, {}, model, folder / "run")
        stages = [Stage("", folder, train, folder / "run" / "model", tuple(measurements))]
    else:
        stages = _chain(settings, model, output.absolute() / "stages", measurements)
    return Cell(number, name, folder, varied, stages, upcycle)


def _chain(settings: dict[str, Any], model: str | None, output: Path, measurements: list[Measurement]) -> list[Stage]:
    """Stages of a cell, each from the model of the one before; their folders are named by all settings so far."""
    if model is None:
        raise ConfigError("give student (settings of `hylo upcycle`), or train.model")
    so_far: list[Any] = [settings["teacher"], settings["student"] or model]
    given = {name: own for name, own in (settings["stages"] or {}).items() if own is not None}
    stages = []
    for name, own in given.items():
        so_far.append(_of_stage(settings, own))
        folder = output / f"{name}-{digest(so_far)}"
        train = _train(settings, own, model, folder / "run")
        model = f"{folder}/run/model"
        chosen = tuple(one for one in measurements if one.after is None or name in one.after)
        stages.append(Stage(str(name), folder, train, Path(model), chosen))
    if not stages:
        stages = [Stage("start", output / f"start-{digest(so_far)}", None, Path(model), tuple(measurements))]
    return stages


def _of_stage(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Settings of a stage: its own over those of all stages over its recipe's."""
    return merged(merged(own.get("recipe") or {}, settings["train"]), {k: v for k, v in own.items() if k != "recipe"})


def _train(settings: dict[str, Any], own: dict[str, Any], model: str | None, run: Path) -> TrainConfig:
    """Settings of one run, checked."""
    train = _of_stage(settings, own) | {"output": str(run)}
    if model is not None:
        train["model"] = model
    if settings["teacher"] and train.get("stage") != "pretrain":
        train.setdefault("teacher", settings["teacher"])
    for key in ("data", "stage"):
        if key not in train:
            raise ConfigError(f"train.{key} is missing")
    if train["stage"] != "pretrain" and not train.get("model"):
        raise ConfigError("give student (settings of `hylo upcycle`), or train.model")
    return read_settings(train, "train")


def selected_layers(given: dict[str, Any]) -> list[int]:
    """MLA layers that `hylo select` chose, for as many as it was asked for or, in its order, fewer or more.

    Args:
        given: {selection: output folder of `hylo select`, count: number of layers}.

    Raises:
        ConfigError: no such folder, or a count that its choice does not tell.
    """
    if sorted(given) != ["count", "selection"] or type(given["count"]) is not int:
        raise ConfigError(f"student.mla as settings must have selection (a folder of `hylo select`) and count, got {given}")
    file, count = Path(given["selection"]).expanduser() / "selection.json", given["count"]
    if not file.is_file():
        raise ConfigError(f"there is no {file}; `hylo select ... --output {file.parent}` makes it")
    found = read_json(file, needs=("method", "order", "mla_layers", "pattern"))
    chosen, order, depth = found["mla_layers"], found["order"], len(found["pattern"])
    if found["method"] == "greedy" and 1 <= count <= len(order):
        return sorted(order[:count])
    if found["method"] == "backward" and 1 <= depth - count <= len(order):
        return sorted(set(range(depth)) - set(order[: depth - count]))
    if count != len(chosen):
        told = {"greedy": f"1 to {len(chosen)}", "backward": f"{len(chosen)} to {depth - 1}"}.get(found["method"], len(chosen))
        raise ConfigError(f"{file} ({found['method']}) tells the layers for {told} MLA layers, not for {count}")
    return list(chosen)


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
    name = digest(chosen | {"teacher": settings["teacher"]})
    values = chosen | {"teacher": settings["teacher"], "output": str(output.absolute() / "students" / name)}
    parser = settings_parser(UpcycleConfig)
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


def settings_of(cell: Cell, stage: Stage) -> dict[str, Any]:
    """All settings of a cell's stage, flat, for its row of the results."""
    student = flatten(dataclasses.asdict(cell.upcycle), "student.") if cell.upcycle else {}
    return student | (flatten(dataclasses.asdict(stage.train), "train.") if stage.train else {})
