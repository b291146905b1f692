"""Inputs of a plan: a recipe with the shapes of its student and teacher, read without their weights and without torch."""

import copy
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from megatron_hylo.config import ConfigError, ModelConfig, from_dict, interleaved
from megatron_hylo.config.layouts import BASES, LAYOUTS, get_layout
from megatron_hylo.config.paths import hugging_face_folder, plain_path
from megatron_hylo.config.recipe_families import FAMILIES, STAGES
from megatron_hylo.config.recipes import DEFAULT_LAYOUT, recipe
from megatron_hylo.config.settings_parser import SettingsParser
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import read_json
from megatron_hylo.plan.yaml_files import read_yaml

GIVEN_LATER = "-"  # stands for a path that a recipe leaves out


@dataclass(frozen=True)
class Job:
    """A training run to plan.

    Args:
        name: recipe or layout.
        config: its settings.
        student, teacher: shapes; no teacher where it is not on the student's GPUs.
        student_name, teacher_name: names of these.
        remote_teacher: a teacher whose output head alone is on the student's GPUs.
    """

    name: str
    config: TrainConfig
    student: ModelConfig
    teacher: ModelConfig | None
    student_name: str
    teacher_name: str | None
    remote_teacher: bool = False


def read_job(
    what: str, stage: str = "stage3_ctx64k", student: str | None = None, teacher: str | None = None, **changes: Any
) -> Job:
    """Read a recipe, or make the recipe of a layout.

    Args:
        what: recipe file, or a named layout.
        stage: of the layout's recipe, a key of `config.recipe_families.STAGES`.
        student, teacher: layout, base model or model folder; by default those of the recipe's paths, else of its name.
        changes: settings that override the recipe's.

    Raises:
        ConfigError: no such file or layout, settings that cannot work, or a student that is not named.
    """
    if (Path(what).expanduser() / "hylo.json").is_file():
        raise ConfigError(f"{what} is a model folder; give a recipe or a layout, and the folder as --student")
    text, name = recipe_text(what, stage), recipe_name(what, stage)
    if not _is_file(what):
        student = student or what
    values = read_yaml(text, what, "write keys as megatron_hylo/recipes has them") | changes
    config, named = read_settings(values, what), _named(name)
    student = student or _given(values, "model", "scratch") or named
    if student is None:
        raise ConfigError(f"{what} names no student: give --student LAYOUT (or a model folder)")
    ours, elsewhere = shape(student), bool(config.teacher_store or config.teacher_address)
    theirs = teacher or _given(values, "teacher") or _usual_teacher(student, ours, config)
    if config.stage == "pretrain" or elsewhere:
        return Job(name, config, ours, None, student, theirs if elsewhere else None, elsewhere)
    if theirs is None:
        raise ConfigError(f"{what} names no teacher: give --teacher BASE (one of {', '.join(BASES)}) or a model folder")
    return Job(name, config, ours, shape(theirs), student, theirs)


def _is_file(what: str) -> bool:
    return Path(what).suffix in (".yaml", ".yml")


def recipe_name(what: str, stage: str) -> str:
    """Name of a recipe: STAGE_LAYOUT, or the file's."""
    return Path(what).stem if _is_file(what) else f"{stage}_{what}"


def recipe_text(what: str, stage: str) -> str:
    """Text of a recipe file, or of a layout's recipe.

    Raises:
        ConfigError: neither is there.
    """
    file = Path(what).expanduser()
    if _is_file(what):
        if not file.is_file():
            raise ConfigError(f"there is no recipe {what}; give a YAML file, or a layout: {', '.join(LAYOUTS)}")
        return file.read_text()
    if what in BASES:
        raise ConfigError(f"{what} is a base model without a recipe; give a layout ({', '.join(LAYOUTS)}) or a recipe file")
    return recipe(what, stage)


def folder_shape(file: Path) -> ModelConfig:
    """Configuration in hylo.json of a model folder, whose other files need not be there.

    Raises:
        ConfigError: a key that is unknown or missing, or another kind of value.
        DamagedError: no JSON with a model.
    """
    return from_dict(ModelConfig, read_json(file, ("model",))["model"], str(file))


def shape(name: str) -> ModelConfig:
    """Configuration of a layout, a base model, a model folder or `hf:PATH`; "NAME:GGMM..." has these mixers, not its own.

    Raises:
        ConfigError: neither.
    """
    if hugging_face_folder(name) is not None:
        from megatron_hylo.convert.hf_start import read_model_config

        return read_model_config(name)
    name, _, mixers = name.partition(":")
    if name in BASES:
        found = BASES[name]
    elif (folder := Path(name).expanduser() / "hylo.json").is_file():
        found = folder_shape(folder)
    elif name in LAYOUTS or not Path(name).exists():
        found = get_layout(name).config
    else:
        raise ConfigError(f"{name} is not a model folder: it has no hylo.json; `hylo convert` makes one")
    return replace(found, hybrid_layer_pattern=interleaved(mixers, found.mlps)) if mixers else found


def read_settings(values: dict[str, Any], what: str) -> TrainConfig:
    """Settings of a recipe; paths that it leaves out are filled in, since a plan reads none of them.

    Args:
        values: keys of the recipe.
        what: name of the recipe, for messages.

    Raises:
        ConfigError: a key or value that `hylo train` would refuse.
    """
    paths = {"data": GIVEN_LATER, "output": GIVEN_LATER}
    if values.get("stage") == "pretrain":
        paths |= {} if values.get("model") or values.get("scratch") else {"scratch": GIVEN_LATER}
    else:
        paths["model"] = GIVEN_LATER
        paths |= {} if values.get("teacher_store") or values.get("teacher_address") else {"teacher": GIVEN_LATER}
    parser = settings_parser(TrainConfig)
    try:
        parsed = parser.instantiate(parser.parse_object(copy.deepcopy(paths | values)))  # jsonargparse changes lists in it
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error
    return TrainConfig(**vars(parsed))


@functools.cache
def settings_parser(settings: type) -> SettingsParser:
    """Parser of a dataclass's fields that raises; made once, since a sweep has hundreds of runs to check."""
    parser = SettingsParser(exit_on_error=False)
    parser.add_class_arguments(settings, as_group=False)
    return parser


def _given(values: dict[str, Any], *names: str) -> str | None:
    """First path of these that is a shape on this machine."""
    found = [str(values[name]) for name in names if values.get(name)]
    return next((one for one in found if one in BASES or one in LAYOUTS or _is_model(one)), None)


def _is_model(path: str) -> bool:
    """Whether a model folder, or the Hugging Face folder of `hf:PATH`, is there."""
    described = "hylo.json" if hugging_face_folder(path) is None else "config.json"
    return (Path(plain_path(path)).expanduser() / described).is_file()


def _named(name: str) -> str | None:
    """Layout in the name of a recipe, STAGE_LAYOUT or STAGE_BASE."""
    rest = re.sub(f"^({'|'.join(STAGES)})_", "", name)
    if rest in LAYOUTS:
        return rest
    return (
        DEFAULT_LAYOUT
        if rest == LAYOUTS[DEFAULT_LAYOUT].base
        else next((n for n, one in LAYOUTS.items() if one.base == rest), None)
    )


def _is_like(a: ModelConfig, b: ModelConfig) -> bool:
    return (a.vocab_size, a.hidden_size, a.has_experts) == (b.vocab_size, b.hidden_size, b.has_experts)


def _usual_teacher(student: str, ours: ModelConfig, config: TrainConfig) -> str | None:
    """Teacher that the family's recipes name: the base itself in stage 1."""
    base = (
        LAYOUTS[student].base
        if student in LAYOUTS
        else next((name for name, base in BASES.items() if _is_like(base, ours)), None)
    )
    if base is None or config.stage == "align" or base not in FAMILIES:
        return base
    return FAMILIES[base].teacher[1]
