"""Whole students: what is copied, from where, in which order, and what does not fit."""

import hashlib

import numpy as np
import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES, LAYOUTS, hybrid_config
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, get_mixer
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.initialise.registry import get_initialiser
from megatron_hylo.upcycle.assemble import Source, assembled, layer_generator, upcycled
from tests.conftest import EXPERTS


def _made(read, config):
    return {name: read(name) for name in tensor_names(config)}


def _upcycle(state, teacher_config, student, **arguments):
    config = hybrid_config(teacher_config, student) if isinstance(student, str) else student
    return _made(upcycled(state.__getitem__, teacher_config, config, **arguments), config)


def _shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_scaled_down_layout_has_exactly_the_tensors_of_tensor_names(name, make_state):
    layout = LAYOUTS[name]
    experts = dict(num_moe_experts=8, moe_ffn_hidden_size=4)
    base = BASES[layout.base].replace(hidden_size=64, ffn_hidden_size=48, kv_channels=8, vocab_size=32, **experts)
    config = hybrid_config(base, layout.config.mixers)
    state = make_state(base)
    made = _upcycle(state, base, config)
    assert list(_shapes(made).items()) == list(tensor_names(config).items())  # order too
    assert all(tensor.is_contiguous() and tensor.isfinite().all() for tensor in made.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backbone_and_attention_layers_equal_teacher_bit_by_bit(teacher_config, make_state, dtype):
    state = make_state(teacher_config, dtype=dtype)
    made = _upcycle(state, teacher_config, "G+*M")
    for name, tensor in state.items():
        if ".self_attn." not in name or ".layers.2." in name:
            assert made[name].dtype == dtype and torch.equal(made[name], tensor), name
    replaced = [name for name in made if name not in state and name != "lm_head.weight"]
    assert replaced and all(made[name].dtype == torch.float32 for name in replaced)


def test_experts_are_the_teachers_and_others_are_refused(teacher_config, make_state):
    config = teacher_config.replace(hybrid_layer_pattern="*E*-*E*E", **EXPERTS)
    state = make_state(config)
    made = _upcycle(state, config, "G+*M")
    experts = [name for name in state if ".mlp." in name]
    assert len(experts) == 3 * (1 + 6 * 3) + 3 and all(torch.equal(made[name], state[name]) for name in experts)
    student = hybrid_config(config, "G+*M")
    for change in (dict(moe_router_topk=3), dict(hybrid_layer_pattern="GE+E*EME")):
        with pytest.raises(ConfigError, match="a student keeps its teacher's backbone"):
            upcycled(state.__getitem__, config, student.replace(**change))
    with pytest.raises(ConfigError, match="has the MLPs ----, the base model E-EE, which are copied: leave them out"):
        hybrid_config(config, "G-+-*-M-")


def test_all_attention_tied_student_equals_teacher(teacher_config, make_state):
    state = make_state(teacher_config)
    made = _upcycle(state, teacher_config, teacher_config)
    assert list(made) == list(state) and all(torch.equal(made[name], state[name]) for name in state)


def test_head_of_tied_teacher_is_a_copy_of_its_embedding(teacher_config, make_state):
    state = make_state(teacher_config)
    made = _upcycle(state, teacher_config, "G+GM")
    embedding = state["model.embed_tokens.weight"]
    assert torch.equal(made["lm_head.weight"], embedding)
    assert made["lm_head.weight"].data_ptr() != embedding.data_ptr()


def test_head_of_untied_teacher_is_its_own(teacher_config, make_state):
    teacher_config = teacher_config.replace(untie_embeddings_and_output_weights=True)
    state = make_state(teacher_config)
    assert torch.equal(_upcycle(state, teacher_config, "G+GM")["lm_head.weight"], state["lm_head.weight"])


def test_mixers_equal_the_registered_initialiser_of_their_layer(teacher_config, make_state):
    state = make_state(teacher_config)
    config = hybrid_config(teacher_config, "G+MG")
    made = _upcycle(state, teacher_config, config, seed=7)
    for layer, symbol in enumerate("G+MG"):
        prefix = f"model.layers.{layer}."
        attention = {name.removeprefix("self_attn."): state[prefix + name] for name in get_mixer("*").tensors(teacher_config)}
        initialise = get_initialiser("paper", symbol)
        wanted = initialise(attention, config, teacher_config, layer_generator(7, layer), None)
        assert all(torch.equal(made[prefix + name], tensor) for name, tensor in wanted.items())


def test_layer_is_independent_of_the_pattern_of_other_layers(teacher_config, make_state):
    state = make_state(teacher_config)
    one, other = (_upcycle(state, teacher_config, pattern, seed=1) for pattern in ("GGMG", "+*MG"))
    shared = [name for name in one if name.startswith(("model.layers.2.", "model.layers.3."))]
    assert len(shared) == 5 + 8 + 5 + 13
    assert all(torch.equal(one[name], other[name]) for name in shared)


def test_same_seed_repeats_and_seeds_and_layers_differ(teacher_config, make_state):
    state = make_state(teacher_config)
    first, again, other = (_upcycle(state, teacher_config, "GGMM", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    step = "model.layers.{}.linear_attn.g_proj.weight"
    assert not torch.equal(first[step.format(0)], other[step.format(0)])
    assert not torch.equal(first[step.format(0)], first[step.format(1)])


def test_layer_generator_draws_equal_numpys_mersenne_twister():
    # a change here changes every model made from a seed
    seed = int.from_bytes(hashlib.sha256(b"11:3").digest()[:4], "little")
    raw = np.random.RandomState(seed)._bit_generator.random_raw(5)
    wanted = torch.tensor([(int(bits) % 2**24) / 2**24 for bits in raw])
    assert torch.equal(torch.empty(5).uniform_(generator=layer_generator(11, 3)), wanted)


def test_layers_are_read_one_at_a_time(teacher_config, make_state):
    state, read = make_state(teacher_config), []

    def logged(name):
        read.append(name)
        return state[name]

    student = hybrid_config(teacher_config, "G+GM")
    read_student = upcycled(logged, teacher_config, student)
    for name in tensor_names(student):
        read_student(name)
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            assert not any(r.startswith(f"model.layers.{later}.") for r in read for later in range(layer + 1, 4))
    assert set(read) == set(state)


def test_statistics_reach_the_initialiser_of_their_layer(teacher_config, make_state, monkeypatch):
    from megatron_hylo.initialise import registry

    seen, paper = [], get_initialiser("paper", "G")

    def spy(teacher, config, teacher_config, generator, statistics):
        seen.append(statistics)
        return paper(teacher, config, teacher_config, generator, statistics)

    monkeypatch.setitem(registry._INITIALISERS, ("spy", "G"), spy)
    measured = {1: {"x": torch.ones(1)}}
    _upcycle(make_state(teacher_config), teacher_config, "GGGG", initialiser="spy", statistics=measured)
    assert seen == [None, measured[1], None, None]


def test_initialiser_that_makes_a_wrong_shape_is_named(teacher_config, make_state, monkeypatch):
    from megatron_hylo.initialise import registry

    monkeypatch.setitem(registry._INITIALISERS, ("broken", "G"), lambda *_: {"linear_attn.q_proj.weight": torch.zeros(2, 3)})
    with pytest.raises(ConfigError, match=r"'broken' for `G` made linear_attn.q_proj.weight \(2, 3\)"):
        _upcycle(make_state(teacher_config), teacher_config, "GGGG", initialiser="broken")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 32}, "hidden_size is 24 .* 32"),
        ({"ffn_hidden_size": 48}, "ffn_hidden_size is 40 .* 48"),
        ({"vocab_size": 51}, "vocab_size is 50 .* 51"),
        ({"hybrid_layer_pattern": "G-+-*-"}, "num_hidden_layers is 4 .* 3"),
        ({"kv_channels": 16}, "kv_channels is 8 .* 16"),
        ({"add_qkv_bias": True}, "add_qkv_bias is False .* True"),
    ],
)
def test_student_that_does_not_fit_is_refused_before_reading(teacher_config, changes, message):
    student = hybrid_config(teacher_config, "G+*M").replace(**changes)
    with pytest.raises(ConfigError, match=message):
        upcycled({}.__getitem__, teacher_config, student)


def test_tied_student_of_untied_teacher_is_refused(teacher_config):
    student = hybrid_config(teacher_config, "G+GG", untie_embeddings_and_output_weights=False)
    with pytest.raises(ConfigError, match="untie_embeddings_and_output_weights"):
        upcycled({}.__getitem__, teacher_config.replace(untie_embeddings_and_output_weights=True), student)


def test_hybrid_teacher_and_unknown_initialiser_are_refused(teacher_config):
    hybrid = hybrid_config(teacher_config, "G+GG")
    with pytest.raises(ConfigError, match="teacher must be attention"):
        upcycled({}.__getitem__, hybrid, hybrid)
    with pytest.raises(ConfigError, match="unknown initialiser 'magic'"):
        upcycled({}.__getitem__, teacher_config, hybrid, initialiser="magic")


def test_teacher_tensor_of_wrong_shape_is_named(teacher_config, make_state):
    state = make_state(teacher_config)
    state["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 24)
    with pytest.raises(ConfigError, match=r"model.layers.1.self_attn.k_proj.weight has shape \[8, 24\].*\[16, 24\]"):
        _upcycle(state, teacher_config, "GGGG")


def _source(config, value):
    shapes = tensor_names(config)
    return Source(config, lambda name: torch.full(shapes[name], value))


@pytest.mark.parametrize("linear", [*LINEAR_SYMBOLS])
def test_assembled_layers_come_whole_from_their_model_and_the_rest_from_the_base(teacher_config, linear):
    mla, pure = hybrid_config(teacher_config, "++++"), hybrid_config(teacher_config, linear * 4)
    target = hybrid_config(teacher_config, f"{linear}+{linear}+")
    read = assembled(_source(mla, 1.0), _source(pure, 2.0), _source(teacher_config, 3.0), target)
    made = _made(read, target)
    assert list(_shapes(made).items()) == list(tensor_names(target).items())
    for name, tensor in made.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        wanted = 3.0 if layer is None else (2.0, 1.0)[layer % 2]
        assert tensor.eq(wanted).all(), name


def test_assembled_upcycled_models_equal_directly_upcycled_hybrid(teacher_config, make_state):
    state = make_state(teacher_config)
    pure = {}
    for pattern in ("++++", "GGGG"):
        pure[pattern] = Source(hybrid_config(teacher_config, pattern), _upcycle(state, teacher_config, pattern).__getitem__)
    base, target = Source(teacher_config, state.__getitem__), hybrid_config(teacher_config, "G++G")
    read = assembled(pure["++++"], pure["GGGG"], base, target)
    made = _made(read, target)
    wanted = _upcycle(state, teacher_config, "G++G")
    assert list(made) == list(wanted) and all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_assemble_refuses_models_that_do_not_fit(teacher_config):
    mla, gdn, base = (hybrid_config(teacher_config, p) for p in ("++++", "GGGG", "G+*G"))
    sources = [_source(c, 0.0) for c in (mla, gdn, teacher_config)]
    with pytest.raises(ConfigError, match=r"layer 2 of the target is attention"):
        assembled(*sources, base)
    with pytest.raises(ConfigError, match="layer 1 of the target is `M`, but of the linear model it is `G`"):
        assembled(*sources, hybrid_config(teacher_config, "GM++"))
    with pytest.raises(ConfigError, match=r"q_a_proj.weight is \(24, 24\) in the MLA model, \(16, 24\) in the target"):
        assembled(*sources, hybrid_config(teacher_config, "G+++", q_lora_rank=16))
    with pytest.raises(ConfigError, match="vocab_size is 50 .* 64"):
        assembled(*sources, hybrid_config(teacher_config, "G+++", vocab_size=64))
