"""The list of a model's tensors against the parameter counts of the released checkpoints."""

import math

import pytest

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import BASES, LAYOUTS, parameter_count
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.tensor_names import tensor_names

CONFIGS = {**BASES, **{name: layout.config for name, layout in LAYOUTS.items()}}

# HyLo model cards: exact sizes of released checkpoints
RELEASED = {
    "llama3.2-1b-4mla12gdn": 1_673_797_776,
    "llama3.2-1b-8mla8gdn": 1_613_437_024,
    "llama3.2-3b-6mla22gdn": 4_267_821_452,
    "llama3.2-3b-14mla14gdn": 3_971_381_500,
    "qwen3-1.7b-7mla21gdn": 2_284_173_820,
    "qwen3-1.7b-14mla14m2": 2_065_541_280,
    "qwen3-1.7b-14mla14gdn": 2_182_902_440,
}


def _size(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in tensor_names(config).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_sum_to_layouts_parameter_count(name: str) -> None:
    assert _size(CONFIGS[name]) == parameter_count(CONFIGS[name])


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_sum_to_released_checkpoint(name: str) -> None:
    assert _size(LAYOUTS[name].config) == RELEASED[name]


def test_qkv_bias_counted_as_layouts_parameter_count() -> None:
    config = BASES["smollm2-135m"].replace(model_family="qwen2", add_qkv_bias=True)
    assert _size(config) == parameter_count(config) == _size(BASES["smollm2-135m"]) + 30 * (9 + 3 + 3) * 64


def test_lm_head_is_listed_only_when_untied() -> None:
    base = BASES["smollm2-135m"]
    assert "lm_head.weight" not in tensor_names(base)
    assert tensor_names(base.replace(untie_embeddings_and_output_weights=True))["lm_head.weight"] == (49152, 576)


def test_unknown_mixer_symbol_is_refused() -> None:
    with pytest.raises(ConfigError, match="'X'"):
        get_mixer("X").tensors(BASES["smollm2-135m"])
