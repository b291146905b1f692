"""The paper's MLA against linear algebra written another way."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import hybrid_config
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise.paper import mla_from_attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _student(teacher_config, **fields):
    return hybrid_config(teacher_config, "++++", **fields)


def _mla(layer, config, teacher_config):
    mixer = mla_from_attention(layer, config, teacher_config, torch.Generator(), None)
    assert {name: tuple(t.shape) for name, t in mixer.items()} == get_mixer("+").tensors(config)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in mixer.values())
    return {name.removeprefix("self_attn."): tensor for name, tensor in mixer.items()}


def _best_rank(weight, rank):
    """Best approximation of that rank: projection on the leading eigenvectors of W W^T, in float64."""
    weight = weight.double()
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -rank:]
    return vectors @ (vectors.T @ weight)


@pytest.mark.parametrize("nope, rope", [(4, 4), (6, 2)])
def test_full_rank_reproduces_teacher_query_rows(teacher_config, make_layer, nope, rope):
    config = _student(teacher_config, q_lora_rank=24, kv_lora_rank=24, qk_head_dim=nope, qk_pos_emb_head_dim=rope)
    layer = make_layer(teacher_config)
    mixer = _mla(layer, config, teacher_config)
    made = (mixer["q_b_proj.weight"] @ mixer["q_a_proj.weight"]).view(4, nope + rope, 24)
    for head in range(4):
        rows = layer["q_proj.weight"][head * 8 : head * 8 + 8]
        torch.testing.assert_close(made[head, :nope], rows[:nope], **TOLERANCE)
        torch.testing.assert_close(made[head, nope:], rows[-rope:], **TOLERANCE)


@pytest.mark.parametrize("nope, rope", [(4, 4), (6, 2)])
def test_full_rank_reproduces_teacher_key_and_value_rows(teacher_config, make_layer, nope, rope):
    config = _student(teacher_config, kv_lora_rank=24, qk_head_dim=nope, qk_pos_emb_head_dim=rope)
    layer = make_layer(teacher_config)
    mixer = _mla(layer, config, teacher_config)
    made = mixer["kv_b_proj.weight"] @ mixer["kv_a_proj_with_mqa.weight"][:24]
    for head in range(2):
        rows = made[head * (nope + 8) : (head + 1) * (nope + 8)]
        torch.testing.assert_close(rows[:nope], layer["k_proj.weight"][head * 8 : head * 8 + nope], **TOLERANCE)
        torch.testing.assert_close(rows[nope:], layer["v_proj.weight"][head * 8 : head * 8 + 8], **TOLERANCE)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_low_rank_query_error_is_eckart_young_tail(teacher_config, make_layer, rank):
    layer = make_layer(teacher_config)
    mixer = _mla(layer, _student(teacher_config, q_lora_rank=rank), teacher_config)
    weight = layer["q_proj.weight"].double()
    error = (weight - mixer["q_b_proj.weight"].double() @ mixer["q_a_proj.weight"].double()).norm()
    tail = torch.linalg.svdvals(weight)[rank:].norm()
    torch.testing.assert_close(error, tail, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_low_rank_latent_is_joint_projection_on_leading_eigenvectors(teacher_config, make_layer, rank):
    layer = make_layer(teacher_config)
    mixer = _mla(layer, _student(teacher_config, kv_lora_rank=rank), teacher_config)
    made = mixer["kv_b_proj.weight"] @ mixer["kv_a_proj_with_mqa.weight"][:rank]
    best = _best_rank(torch.cat([layer["k_proj.weight"], layer["v_proj.weight"]]), rank).float()
    keys, values = best[:16], best[16:]
    wanted = torch.cat([keys[0:4], values[0:8], keys[8:12], values[8:16]])
    torch.testing.assert_close(made, wanted, **TOLERANCE)


def test_singular_values_are_all_on_the_down_side(teacher_config, make_layer):
    layer = make_layer(teacher_config)
    mixer = _mla(layer, _student(teacher_config, q_lora_rank=16), teacher_config)
    up, down = mixer["q_b_proj.weight"], mixer["q_a_proj.weight"]
    torch.testing.assert_close(up.T @ up, torch.eye(16), **TOLERANCE)
    torch.testing.assert_close(down.norm(dim=1), torch.linalg.svdvals(layer["q_proj.weight"])[:16], **TOLERANCE)


def test_rotary_key_is_mean_of_key_heads_written_by_hand(teacher_config, make_layer):
    layer = make_layer(teacher_config)
    config = _student(teacher_config, kv_lora_rank=8, qk_head_dim=6, qk_pos_emb_head_dim=2)
    made = _mla(layer, config, teacher_config)["kv_a_proj_with_mqa.weight"]
    key = layer["k_proj.weight"]
    # rows 6, 7 of head 0 and 14, 15 of head 1
    torch.testing.assert_close(made[8], (key[6] + key[14]) / 2)
    torch.testing.assert_close(made[9], (key[7] + key[15]) / 2)
    assert made.shape[0] == 10


def test_output_and_qk_norm_equal_teacher_without_sharing_memory(teacher_config, make_layer):
    teacher_config = teacher_config.replace(model_family="qwen3", qk_layernorm=True)
    layer = make_layer(teacher_config)
    mixer = _mla(layer, _student(teacher_config), teacher_config)
    for name in ("o_proj.weight", "q_norm.weight", "k_norm.weight"):
        assert torch.equal(mixer[name], layer[name])
        assert mixer[name].data_ptr() != layer[name].data_ptr()


def test_qkv_biases_are_dropped_and_change_nothing(teacher_config, make_layer):
    biased = teacher_config.replace(model_family="qwen2", add_qkv_bias=True)
    layer = make_layer(biased)
    weights = {name: tensor for name, tensor in layer.items() if name.endswith("weight")}
    with_bias = _mla(layer, _student(biased), biased)
    without = _mla(weights, _student(teacher_config), teacher_config)
    assert all(torch.equal(with_bias[name], without[name]) for name in without)


def test_bfloat16_teacher_equals_its_fp32_values(teacher_config, make_layer):
    layer = make_layer(teacher_config, dtype=torch.bfloat16)
    config = _student(teacher_config)
    made = _mla(layer, config, teacher_config)
    wanted = _mla({name: tensor.float() for name, tensor in layer.items()}, config, teacher_config)
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_head_dim": 2}, "qk_head_dim 2 .*must be 4"),
        ({"qk_pos_emb_head_dim": 2}, "qk_head_dim 4 .*must be 6"),
        ({"v_head_dim": 16}, "v_head_dim 16 .*must be 8"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 .*must be 4"),
        ({"num_query_groups": 4}, "num_query_groups 4 .*must be 2"),
        ({"qk_layernorm": True}, "qk_layernorm True .*must be False"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused_by_name(teacher_config, make_layer, changes, message):
    config = _student(teacher_config, **changes)
    with pytest.raises(ConfigError, match=message):
        mla_from_attention(make_layer(teacher_config), config, teacher_config, torch.Generator(), None)
