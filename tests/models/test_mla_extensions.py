"""MLA's aligned form: equal to the attention it replaces at full rank; against a float64 reference; its settings.

At full rank every pair of every KV head is rotary: slot (j, c) holds r_{j,c} = sum_g U_j[g,c] k_{g,j} with an orthogonal
U_j, and a query of KV head g meets it with U_j[g,c] q_{h,j}. The sum over c undoes U_j, so scores are the teacher's.
"""

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_hylo.config import ConfigError, ModelConfig, RopeScaling, from_dict
from megatron_hylo.config.layouts import hybrid_config, parameter_count
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.kernels.rope import rope_frequencies
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train.optimizer import build_training_state, choose_trainable
from megatron_hylo.upcycle.run import assemble_folder
from tests.conftest import fill_model, tiny_config
from tests.kernels.compare import relative_error
from tests.models.mixers import TOKENS, TOLERANCE, Oracle, Weights, errors, random_mixer

FAMILIES = {
    "llama": dict(rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "qwen2": dict(model_family="qwen2", add_qkv_bias=True),
    "qwen3": dict(model_family="qwen3", qk_layernorm=True),
    "bias and norm": dict(add_qkv_bias=True, qk_layernorm=True),
}


def exact_mla(teacher: dict[str, Tensor], c: ModelConfig, rotations: Tensor) -> dict[str, Tensor]:
    """Canonical tensors of the MLA that equals an attention layer.

    Args:
        teacher: the attention's, without their prefix.
        c: of the MLA; mla_rotary_pairs has every pair once a KV head, the n-th time for component n.
        rotations: U, [pairs, KV heads, components].
    """
    dh, dr, heads, groups = c.kv_channels, c.qk_pos_emb_head_dim, c.num_attention_heads, c.num_query_groups
    pairs = c.mla_rotary_pairs[0]
    component = [pairs[:i].count(j) for i, j in enumerate(pairs)]
    share = rotations[list(pairs), :, component].T  # [g, slot]

    def rows(part: str) -> Tensor:  # [heads, dh, d + 1], the bias as the last column
        weight = teacher[f"{part}_proj.weight"]
        bias = teacher.get(f"{part}_proj.bias", torch.zeros(len(weight)))
        return torch.cat([weight, bias[:, None]], 1).unflatten(0, (-1, dh))

    def slots(x: Tensor) -> Tensor:  # channels (j, j + dh / 2) of dimension -2, for every slot -> (2 i, 2 i + 1)
        return torch.stack([x[..., list(pairs), :], x[..., [j + dh // 2 for j in pairs], :]], -2).flatten(-3, -2)

    query, key, value = rows("q"), rows("k"), rows("v")
    of_head = share.repeat_interleave(heads // groups, 0).repeat_interleave(2, 1)
    rotary_query = slots(query) * of_head[..., None]
    rotary_key = (slots(key) * share.repeat_interleave(2, 1)[..., None]).sum(0)
    scale = math.sqrt((dh + dr) / dh)  # MLA's softmax divides by sqrt(dh + dr)
    query = torch.cat([query, rotary_query], 1) * (1 if c.qk_layernorm else scale)
    latent = torch.eye(c.hidden_size, c.hidden_size + 1)
    key_value = torch.cat([torch.zeros_like(value), value], 1)
    affine = {"q_b_proj": query.flatten(0, 1), "kv_a_proj_with_mqa": torch.cat([latent, rotary_key]),
              "kv_b_proj": key_value.flatten(0, 1)}  # fmt: skip
    tensors = {"q_a_proj.weight": torch.eye(c.hidden_size), "o_proj.weight": teacher["o_proj.weight"]}
    tensors |= {f"{name}.weight": x[:, :-1] for name, x in affine.items()}
    if c.mla_bias:
        tensors |= {f"{name}.bias": x[:, -1] for name, x in affine.items()}
    if c.qk_layernorm:
        norms = {p: torch.cat([w, slots(w[:, None])[:, 0]]) for p, w in ((p, teacher[f"{p}_norm.weight"]) for p in "qk")}
        tensors |= {"q_norm.weight": norms["q"] * scale, "k_norm.weight": norms["k"], "k_norm.rotary_mix": share}
    return {f"self_attn.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fully_rotary_mla_equals_the_attention_it_is_made_of(family, one_rank):
    settings = FAMILIES[family]
    base = tiny_config("*-", **settings)
    dh, groups = base.kv_channels, base.num_query_groups
    slots = torch.arange(dh // 2).repeat(groups)[torch.randperm(groups * dh // 2)]  # pair numbers in any order
    config = base.replace(
        hybrid_layer_pattern="+-", q_lora_rank=base.hidden_size, kv_lora_rank=base.hidden_size, qk_head_dim=dh, v_head_dim=dh,
        qk_pos_emb_head_dim=groups * dh, mla_rotary_pairs=[slots.tolist()], mla_bias=base.add_qkv_bias,
        mla_rope_scaling=base.rope_scaling,
    )  # fmt: skip
    attention = random_mixer(base)
    teacher, student = (build_model(c) for c in (base, config))
    teacher.mixer_layers()[0][0].self_attention.load_state_dict(attention.state_dict())
    tensors = dict(hf_tensors(teacher))
    layer = {n.split("self_attn.")[1]: t for n, t in tensors.items() if "self_attn." in n}
    mixer = exact_mla(layer, config, torch.linalg.qr(torch.randn(dh // 2, groups, groups))[0])
    assert {n: tuple(t.shape) for n, t in mixer.items()} == get_mixer("+").tensors(config)
    fill_model(student, (tensors | {f"model.layers.0.{n}": t for n, t in mixer.items()}).__getitem__)

    x = torch.randn(TOKENS, 2, base.hidden_size)
    results, cotangent = [], torch.randn(TOKENS, 2, base.hidden_size)
    for module in (attention, student.mixer_layers()[0][0].self_attention):
        leaf = x.clone().requires_grad_()
        out = module(leaf)[0]
        results.append((out, *torch.autograd.grad((out * cotangent).sum(), leaf)))
    found = [relative_error(ours, theirs) for theirs, ours in zip(*results)]
    print(f"{family}: output {found[0]:.1e}, input gradient {found[1]:.1e}")
    assert max(found) < TOLERANCE, found


def base_frequencies(c: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies of a whole head, float64, and the factor on cos and sin: by the formula, YaRN's by transformers."""
    scaling, exponents = c.mla_rope_scaling, torch.arange(c.kv_channels // 2, dtype=torch.float64)
    if scaling.rope_type == "yarn":
        parameters = {"rope_type": "yarn", "rope_theta": c.rotary_base, "factor": scaling.factor,
                      "original_max_position_embeddings": scaling.original_max_position_embeddings}  # fmt: skip
        llama = LlamaConfig(head_dim=c.kv_channels, rope_parameters=parameters)
        frequencies, multiplier = ROPE_INIT_FUNCTIONS["yarn"](llama, "cpu")
        return frequencies.double(), multiplier
    frequencies = c.rotary_base ** (-2 * exponents / c.kv_channels)
    return (torch.zeros_like(frequencies) if scaling.rope_type == "nope" else frequencies), 1.0


def reference(c: ModelConfig) -> Oracle:
    """Aligned MLA head by head and slot by slot in float64; rotations as complex products."""
    nope, rope, v_dim, groups = c.qk_head_dim, c.qk_pos_emb_head_dim, c.v_head_dim, c.num_query_groups
    pairs = c.mla_rotary_pairs[0] if c.mla_rotary_pairs else range(rope // 2)
    frequency, multiplier = base_frequencies(c)
    frequency = frequency[list(pairs)]

    def rotated(x: Tensor) -> Tensor:
        turn = torch.polar(torch.tensor([multiplier], dtype=torch.float64), torch.arange(x.shape[1])[:, None] * frequency)
        slots = torch.view_as_complex(x[..., nope:].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([x[..., :nope], torch.view_as_real(slots * turn).flatten(-2)], -1)

    def scale(whole: Tensor) -> Tensor:
        return 1 / (whole.square().mean(-1, keepdim=True) + c.layernorm_epsilon).sqrt()

    def affine(w: Weights, name: str, x: Tensor) -> Tensor:
        return x @ w[f"linear_{name}_proj.weight"].T + w.get(f"linear_{name}_proj.bias", 0.0)

    def oracle(w: Weights, x: Tensor) -> Tensor:
        queries = affine(w, "q_up", affine(w, "q_down", x)).split(nope + rope, -1)
        latent, rotary = affine(w, "kv_down", x).split([c.kv_lora_rank, rope], -1)
        keys_values = affine(w, "kv_up", latent).split(nope + v_dim, -1)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        heads = []
        for head, query in enumerate(queries):
            group = head // (c.num_attention_heads // groups)
            plain, value = keys_values[group].split([nope, v_dim], -1)
            channels = list(plain.unbind(-1))
            key = torch.cat([plain, rotary], -1)
            if c.qk_layernorm:
                for slot, j in enumerate(pairs):
                    for half in (0, 1):
                        channel, share = j + half * nope // 2, w["k_layernorm.rotary_mix"][group, slot]
                        channels[channel] = channels[channel] + share * rotary[..., 2 * slot + half]
                key = scale(torch.stack(channels, -1)) * w["k_layernorm.weight"] * key
                query = scale(query[..., :nope]) * w["q_layernorm.weight"] * query
            scores = (rotated(query) @ rotated(key).transpose(1, 2) / math.sqrt(nope + rope)).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ value)
        return torch.cat(heads, -1) @ w["linear_proj.weight"].T

    return oracle


CASES = {
    "pairs": dict(mla_rotary_pairs=[[5, 0, 5]]),
    "pairs, yarn": dict(mla_rotary_pairs=[[3, 1, 7]], mla_rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "pairs, theta": dict(mla_rotary_pairs=[[3, 1, 7]], rotary_base=3e5),
    "pairs, NoPE, norm": dict(
        mla_rotary_pairs=[[3, 1, 7]], mla_rope_scaling=RopeScaling("nope"), qk_layernorm=True, qk_head_dim=16
    ),
    "bias": dict(mla_bias=True, qk_pos_emb_head_dim=16),
    "norm, standard table": dict(qk_layernorm=True, qk_head_dim=16, qk_pos_emb_head_dim=16),
    "norm, pairs": dict(qk_layernorm=True, qk_head_dim=16, mla_rotary_pairs=[[7, 2, 7]]),
    "all three": dict(qk_layernorm=True, qk_head_dim=16, mla_rotary_pairs=[[1, 1, 1]], mla_bias=True),
}


@pytest.mark.parametrize("case", CASES)
def test_aligned_mla_matches_float64_reference(case, one_rank):
    config = tiny_config("+-", v_head_dim=14, **CASES[case])
    found = errors(random_mixer(config), reference(config), dtype=torch.float64)
    assert max(found.values()) < TOLERANCE, found


def test_bf16_forward_is_near_fp32(one_rank):
    config = tiny_config("+-", **CASES["all three"])
    narrow, wide = random_mixer(config, torch.bfloat16), random_mixer(config)
    wide.load_state_dict({name: p.float() for name, p in narrow.named_parameters()}, strict=False)
    x = torch.randn(TOKENS, 2, config.hidden_size).bfloat16()
    out = narrow(x)[0]
    print(f"{relative_error(out, wide(x.float())[0]):.1e}")
    assert {p.dtype for p in narrow.parameters()} == {out.dtype} == {torch.bfloat16}
    assert relative_error(out, wide(x.float())[0]) < 2e-2


def test_pairs_in_order_are_the_standard_table(one_rank):
    config = tiny_config("+-", qk_pos_emb_head_dim=16, mla_rope_scaling=RopeScaling("yarn", 4.0, 32))
    standard = random_mixer(config)
    same, other = (random_mixer(config.replace(mla_rotary_pairs=[p])) for p in (tuple(range(8)), tuple(range(8))[::-1]))
    x = torch.randn(TOKENS, 2, config.hidden_size)
    for mixer in (same, other):
        mixer.load_state_dict(standard.state_dict())
    assert torch.equal(same(x)[0], standard(x)[0])
    assert relative_error(other(x)[0], standard(x)[0]) > 0.1


def test_every_layer_turns_with_its_own_pairs(one_rank):
    """Megatron counts MLPs as layers too: layer l of ours is number 2 l + 1 of its."""
    pairs = [[], [6, 0, 0], [], [3, 4, 5]]
    config = tiny_config("G-+-*-+-", mla_rotary_pairs=pairs)
    model = build_model(config)
    base = rope_frequencies(config.kv_channels, config.rotary_base)
    mixers = [mixer.self_attention for mixer, _ in model.mixer_layers()]
    for layer in (1, 3):
        cos, sin = mixers[layer]._rotary_table(5)
        angles = torch.arange(5)[:, None] * base[pairs[layer]]
        assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())
    x = torch.randn(TOKENS, 2, config.hidden_size)
    for layer in (1, 3):
        alone = random_mixer(tiny_config("+-", mla_rotary_pairs=[pairs[layer]]))
        mixers[layer].load_state_dict(alone.state_dict())
        assert torch.equal(mixers[layer](x)[0], alone(x)[0])


SIZES = CASES | {
    "standard": {},
    "HyLo's norm": dict(qk_layernorm=True),
    "HyLo's norm, bias": dict(qk_layernorm=True, mla_bias=True),
}


@pytest.mark.parametrize("case", SIZES)
def test_counts_and_names_are_the_models(case, one_rank):
    config = tiny_config("+-", **SIZES[case])
    model = build_model(config)
    mixer = model.mixer_layers()[0][0].self_attention
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    assert sum(p.numel() for p in mixer.parameters()) == get_mixer("+").parameters(config)
    assert {name: tuple(t.shape) for name, t in hf_tensors(model)} == tensor_names(config)


def test_biases_come_right_after_their_weights():
    names = [n.removeprefix("self_attn.") for n in get_mixer("+").tensors(tiny_config("+-", **CASES["all three"]))]
    assert names == ["q_a_proj.weight", "q_b_proj.weight", "q_b_proj.bias", "kv_a_proj_with_mqa.weight",
                     "kv_a_proj_with_mqa.bias", "kv_b_proj.weight", "kv_b_proj.bias", "o_proj.weight", "q_norm.weight",
                     "k_norm.weight", "k_norm.rotary_mix"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mla_rotary_pairs=[[0, 1, 2]]), "has 1 entries, the model 2 layers"),
        (dict(mla_rotary_pairs=[[], [0, 1]]), r"layer 1 `\+` has 2 numbers, it needs 3"),
        (dict(mla_rotary_pairs=[[0, 1, 2], [0, 1, 2]]), "layer 0 `G` has 3 numbers, it needs 0"),
        (dict(mla_rotary_pairs=[[], [0, 1, 8]]), "layer 1 holds 8; use whole numbers from 0 to 7"),
        (dict(mla_rotary_pairs=[[], [0, -1, 2]]), "layer 1 holds -1"),
        (dict(mla_rotary_pairs=[[], [0, 1.0, 2]]), "layer 1 holds 1.0"),
        (dict(mla_rotary_pairs=[0, 1]), r"one list of whole numbers a layer, got \[0, 1\]"),
        (dict(qk_layernorm=True, qk_head_dim=12), "12 and qk_pos_emb_head_dim 6 do not suit kv_channels 16"),
        (dict(qk_layernorm=True, qk_head_dim=16), "mla_rotary_pairs given or qk_pos_emb_head_dim equal to it"),
        (dict(qk_layernorm=True, qk_head_dim=12, mla_rotary_pairs=[[], [0, 1, 2]]), "either their sum must equal it"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("G-+-", **changes)


def test_lists_of_json_become_tuples_and_back():
    config = tiny_config("G-+-", mla_rotary_pairs=[[], [2, 2, 0]], mla_bias=True)
    assert config.mla_rotary_pairs == ((), (2, 2, 0)) and hash(config)
    values = config.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert from_dict(ModelConfig, values, "test") == config
    older = tiny_config("G-+-").to_dict()  # as files written before these fields
    del older["mla_rotary_pairs"], older["mla_bias"]
    assert from_dict(ModelConfig, older, "test") == tiny_config("G-+-")


def test_hybrids_take_pairs_as_an_override():
    base = tiny_config("*-*-", qk_layernorm=True)
    config = hybrid_config(base, "G+", qk_head_dim=16, qk_pos_emb_head_dim=4, mla_rotary_pairs=[[], [3, 3]], mla_bias=True)
    assert config.mla_whole_head_norm and config.mla_rotary_pairs == ((), (3, 3))
    assert not hybrid_config(base, "G+").mla_whole_head_norm


def test_assembled_hybrids_keep_the_pairs_of_their_mla_layers(one_rank, tmp_path):
    patterns = {"mla": "+-+-", "linear": "G-G-", "base": "*-*-"}
    for name, pattern in patterns.items():
        pairs = dict(mla_rotary_pairs=[[0, 1, 2], [5, 5, 0]]) if name == "mla" else {}
        save_model(build_model(tiny_config(pattern, **pairs)), tmp_path / name)
    config = assemble_folder(*(tmp_path / name for name in patterns), tmp_path / "hybrid", pattern="G+")
    assert config.mla_rotary_pairs == ((), (5, 5, 0))
    assert load_model(tmp_path / "hybrid").config.hylo == config


def test_rotary_mix_trains_as_a_norm_does(one_rank):
    """With the mixers, and without weight decay, which would shrink what is a rotation."""
    optimizer = OptimizerSettings(lr=1e-3, mixer_lr=2e-3, weight_decay=0.1, use_distributed_optimizer=False)
    settings = TrainConfig(
        stage="pretrain", data="-", output="-", scratch="-", sequence_length=8, global_batch_size=1, train_tokens=80,
        precision="fp32", trainable="mixers", optimizer=optimizer,
    )  # fmt: skip
    model = build_model(tiny_config("+-", **CASES["all three"]))
    choose_trainable([model], settings)
    mixer = model.mixer_layers()[0][0].self_attention
    names = {id(p): name for name, p in mixer.named_parameters()}
    groups = build_training_state([model], settings).optimizer.param_groups
    decay = {names[id(p)]: (group["lr"], group["wd_mult"]) for group in groups for p in group["params"]}
    assert set(decay) == set(names.values())
    for name, (rate, factor) in decay.items():
        assert (rate, factor) == (2e-3, 0 if "norm" in name or name.endswith("bias") else 1), name
