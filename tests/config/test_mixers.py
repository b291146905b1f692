"""A mixer is described in one place: nothing else branches on symbols, and no table or estimate misses one."""

import ast
import dataclasses
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layouts import get_layout, kv_elements, parameter_count
from megatron_hylo.config.mixers import MIXERS, complete
from megatron_hylo.config.mlps import MLPS
from megatron_hylo.config.tensor_names import layer_tensor_names, tensor_names
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.flops import forward_flops_per_token
from megatron_hylo.plan.memory import activations, kept_numbers

PACKAGE = Path(__file__).parents[2] / "megatron_hylo"
ALLOWED = {"hf/configuration_hylo.py": 2}  # exported beside the weights, without the descriptions
# exported as well; `hf/__init__.py` checks their tables
CHECKED_ELSEWHERE = ("hf/cache_hylo.py", "hf/layers_hylo.py", "hf/modeling_hylo.py", "hf/pretrained_hylo.py")


def symbols_of(node: ast.AST) -> set[str]:
    """Mixer symbols written out in a string, or in the strings of a set, tuple or list."""
    if isinstance(node, (ast.Set, ast.Tuple, ast.List)):
        return set().union(*map(symbols_of, node.elts))
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return set(text) if text and set(text) <= set(MIXERS) else set()


def branches(source: str) -> list[int]:
    """Lines with a comparison or membership test with written-out symbols, or an unchecked dictionary by symbol.

    A dictionary whose name is given to `complete` in the same file is no branch: a mixer that it misses fails at import.
    """
    tree, found = ast.parse(source), []
    checked = {
        argument.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "complete"
        for argument in call.args[:1]
        if isinstance(argument, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(symbols_of, [node.left, *node.comparators])):
            found.append(node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(key is not None and symbols_of(key) for key in node.value.keys):
                found += [node.lineno] if not {getattr(target, "id", "") for target in targets} & checked else []
    return found


def test_nothing_outside_the_descriptions_branches_on_symbols():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if not name.startswith("config/mixers/") and name not in CHECKED_ELSEWHERE and (lines := branches(file.read_text())):
            found[name] = len(lines)
    assert found == ALLOWED


def test_a_planted_branch_is_found():
    assert branches("if symbol == 'G':\n    pass") == [1]
    assert branches("x = 1\nif set(c.mixers) != {'*'} or symbol in 'MG': pass") == [2, 2]
    assert branches("SIZES = {'M': 1, 'G': 2}") == [1]
    assert branches("SIZES = {'M': 1, 'G': 2}\ncomplete(SIZES, 'here')") == []
    assert branches("if action == 'save' and text != '-': pass") == []


def test_a_table_that_misses_a_mixer_or_has_another_is_refused():
    complete(MIXERS, "here")
    with pytest.raises(RuntimeError, match=r"here has no entry for mixer 'K'; see \"Add a mixer\""):
        complete(set(MIXERS) - {"K"}, "here")
    with pytest.raises(RuntimeError, match="here has an entry for 'X', which is no mixer"):
        complete({*MIXERS, "X"}, "here")


@pytest.mark.parametrize("symbol", [*MIXERS, *MLPS])
def test_a_description_has_what_the_interface_leaves_to_it_and_names_fields_of_a_model(symbol):
    description, fields = (MIXERS | MLPS)[symbol], {field.name for field in dataclasses.fields(ModelConfig)}
    assert (description.symbol, type(description.name)) == (symbol, str)
    assert {*description.tensor_parallel_fields, *description.size_fields} <= fields


CONFIG = get_layout("smollm2-135m-8mla22gdn").config
ESTIMATES = {
    "parameters": parameter_count,
    "KV cache": lambda config: kv_elements(config, 128),
    "FLOPs": lambda config: forward_flops_per_token(config, 128),
    "memory": lambda config: activations(
        TrainConfig("pretrain", "-", "-", model="-", sequence_length=128, global_batch_size=1), config, None
    ),
    "memory of a layer": lambda config: kept_numbers(config, "X"),
    "tensors": tensor_names,
    "tensors of a layer": lambda config: layer_tensor_names(config, "X", "-"),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_an_unknown_symbol_is_refused_by_every_estimate(estimate, monkeypatch):
    """None takes it for some other mixer or for nothing, even where the model's own check has let it through."""
    monkeypatch.setattr(ModelConfig, "mixers", "GX")
    with pytest.raises(ConfigError, match="unknown mixer symbol 'X'; known mixers: "):
        ESTIMATES[estimate](CONFIG)


def test_an_unknown_symbol_is_refused_in_a_pattern():
    with pytest.raises(ConfigError, match="must alternate a mixer out of"):
        CONFIG.replace(hybrid_layer_pattern="X-" * 30)
