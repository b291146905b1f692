"""Null in a recipe, a command line or a mapping is a group's defaults, or a value of the option's own type."""

from dataclasses import fields, is_dataclass

import pytest
import yaml
from jsonargparse import ArgumentError

from megatron_hylo.config import ConfigError, RopeScaling, TeacherWindow
from megatron_hylo.config.settings_parser import SettingsParser
from megatron_hylo.config.train import OptimizerSettings, TrainConfig

BASE = {"stage": "distil", "model": "m", "teacher": "t", "data": "d", "output": "o"}
DEFAULT = TrainConfig(**BASE)
GROUPS = [field.name for field in fields(TrainConfig) if is_dataclass(getattr(DEFAULT, field.name))]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.fixture(scope="module")
def parser() -> SettingsParser:
    made = SettingsParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_class_arguments(TrainConfig, as_group=False)
    return made


def config(parser: SettingsParser, parsed) -> TrainConfig:
    made = parser.instantiate(parsed)
    return TrainConfig(**{field.name: made[field.name] for field in fields(TrainConfig)})


def words(tmp_path, *recipes: dict, options: str = "") -> list[str]:
    """A command line with recipes, the first one over `BASE`."""
    files = []
    for number, recipe in enumerate((BASE | recipes[0], *recipes[1:])):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        files.append(f"--config={file}")
    return [*files, *options.split()]


@pytest.mark.parametrize("group", GROUPS)
def test_a_null_group_has_the_defaults_of_its_dataclass(parser, tmp_path, group):
    assert config(parser, parser.parse_object(BASE | {group: None})) == DEFAULT
    assert config(parser, parser.parse_args(words(tmp_path, {group: None}))) == DEFAULT
    assert config(parser, parser.parse_args(words(tmp_path, {}, options=f"--{group} null"))) == DEFAULT


@pytest.mark.parametrize("null", ["--teacher_window.rope_scaling null", "--teacher_window.rope_scaling=~"])
def test_a_null_group_drops_what_came_before_and_not_what_comes_after(parser, tmp_path, null):
    recipe = {"teacher_window": {"mode": "rope", "rope_scaling": YARN}, "optimizer": {"lr": 1.0, "mixer_lr": 2.0}}
    options = f"--teacher_window.mode windows {null} --optimizer null --optimizer.mixer_lr 3"
    made = config(parser, parser.parse_args(words(tmp_path, recipe, options=options)))
    assert made.teacher_window == TeacherWindow("windows") and made.optimizer == OptimizerSettings(mixer_lr=3.0)
    over = {"teacher_window": {"rope_scaling": None}, "optimizer": None}
    made = config(parser, parser.parse_args(words(tmp_path, recipe, over, options="--optimizer.lr 5")))
    assert made.teacher_window == TeacherWindow("rope") and made.optimizer == OptimizerSettings(lr=5.0)


def test_null_is_a_value_where_the_type_has_it(parser):
    given = {"rope_scaling": None, "rotary_base": None, "recall": {"kl_within": None}, "distil": {"kl_top_k": None}}
    made = config(parser, parser.parse_object(BASE | given))
    assert made.rope_scaling is None and made.rotary_base is None and made.recall.kl_within is None
    assert config(parser, parser.parse_object(BASE | {"rope_scaling": YARN})).rope_scaling == RopeScaling(**YARN)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seed": None}, "seed is null; give a value, or leave it out for its default 1234"),
        ({"optimizer": {"lr": None}}, "optimizer.lr is null; give a value, or leave it out for its default 6e-05"),
        ({"text": {"blend": None}}, "text.blend is null"),
        ({"rope_scaling": {"factor": None}}, "rope_scaling.factor is null; give a value, or leave it out for its default 1.0"),
        ({"text": {"blend": [{"data": "a", "weight": None}]}}, "text.blend.weight is null"),
        ({"optimizer": 3}, "optimizer must be a mapping of settings, got 3"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling: yarn needs factor >= 1, got 0.5"),
        (
            {"teacher_window": {"mode": "windows", "rope_scaling": YARN}},
            "rope alone takes teacher_window.rope_scaling (yarn by 4), got mode windows; set teacher_window.rope_scaling null",
        ),
        (
            {"teacher_window": {"rope_scaling": YARN, "rotary_base": 1e6}},
            "set teacher_window.rope_scaling and teacher_window.rotary_base null, which drops a recipe's",
        ),
    ],
)
def test_other_nulls_and_values_that_cannot_work_are_refused_by_name(parser, tmp_path, given, sentence):
    for parsed in (parser.parse_object(BASE | given), parser.parse_args(words(tmp_path, given))):
        with pytest.raises((ConfigError, ArgumentError)) as error:
            config(parser, parsed)
        assert sentence in str(error.value)


@pytest.mark.parametrize("scaling", [("rope_scaling",), ("teacher_window", "rope_scaling")])
@pytest.mark.parametrize(
    ("given", "key", "mistake"),
    [
        ({"factor": "far"}, "factor", "Got value: far"),
        ({"attention_factor": "far"}, "attention_factor", "Given value: far"),
        ({"rope_type": "yran"}, "rope_type", "Got value: yran"),
    ],
)
def test_a_wrong_value_is_named_alike_in_a_group_and_in_one_that_may_be_null(parser, scaling, given, key, mistake):
    values = given
    for name in reversed(scaling):
        values = {name: values}
    with pytest.raises(ArgumentError) as error:
        parser.parse_object(BASE | values)
    said = str(error.value)
    assert said.startswith(f'Parser key "{".".join(scaling)}.{key}":') and said.endswith(mistake)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rope_scaling": {"factors": 2}}, "Group 'rope_scaling' does not accept option 'factors'"),
        ({"text": {"blend": [{"data": "a", "weigh": 2}]}}, "Group 'text.blend' does not accept option 'weigh'"),
        ({"text": {"blend": [{"data": "a", "weight": "heavy"}]}}, 'Parser key "text.blend.weight":'),
    ],
)
def test_a_mistake_inside_an_option_of_settings_is_named_with_the_option(parser, given, sentence):
    with pytest.raises(ArgumentError) as error:
        parser.parse_object(BASE | given)
    assert str(error.value).startswith(sentence)
