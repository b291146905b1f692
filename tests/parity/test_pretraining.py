"""Pretraining under every parallelism makes the losses, gradients and weights that one rank makes, for every mixer.

What is compared is in measured.py, how it is measured in conftest.py and worker.py.
"""

import pytest
import torch

from tests.parity.cases import MODELS
from tests.parity.measured import (
    assert_caught,
    assert_equals_hf_start,
    assert_equals_one_rank,
    cases,
    file_of,
    parametrize,
    parametrize_faults,
)

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(1800)]  # the first case waits for all

CASES = [
    *cases("normed", "pretrain", "tp2 tp2_sp dp2 cp2_gather cp2_a2a cp3 cp4 pp2 pp2_vp2"),
    *cases("normed", "pretrain", "tp2_pp2 pp2_cp2 tp2_sp_cp2 tp2_sp_pp2_cp2"),
    *cases("normed", "packed", "tp2_sp cp2_gather cp2_a2a cp3 pp2 pp2_vp2 tp2_sp_cp2"),
    *cases("mixed", "pretrain", "tp2 cp2_gather cp2 cp2_dp2 dp2_plain dp4 pp2_given pp4 pp2_vp2_tp2_sp"),
    *cases("mixed", "packed", "cp2_dp2 cp4 pp2_cp2"),
    *cases("tied", "pretrain", "tp2 tp2_sp dp2 cp2_gather pp2 pp2_vp2 pp4 tp2_pp2"),
    *cases("aligned", "pretrain", "tp2 tp2_sp cp2_gather cp2_a2a pp2 tp2_sp_cp2"),
    *cases("aligned", "packed", "cp2_gather cp2_a2a tp2_sp_cp2"),
    *cases("wide", "pretrain", "tp2 tp2_sp_cp2_a2a cp4_a2a"),
    *cases("wide", "packed", "tp2_sp_cp2_a2a cp4_a2a"),
    *cases("kda", "pretrain packed", "tp2 tp2_sp cp2_gather cp2_a2a pp2 tp2_sp_cp2"),
    *cases("windowed", "packed", "tp2_sp cp2_gather"),
    *cases("experts", "pretrain", "tp2_sp ep2 ep2_plain cp2_ep2 pp2 pp2_ep2 tp2_sp_ep2 ep2_dp2"),
    *cases("experts", "packed", "ep2"),
    *cases("odd", "pretrain", "tp4"),
    *cases("odd_tied", "pretrain", "tp2_pp2"),
]
# `mixed` is `normed` without q/k-norms and biases; a tied head under these is that of cp2_gather, pp2 and tp2; one case for
# eight ranks
SLOW = [
    *cases("normed", "packed", "tp2_sp_pp2_cp2"),
    *cases("mixed", "pretrain", "tp2_sp dp2 cp2_a2a pp2 pp2_vp2"),
    *cases("mixed", "packed", "pp2"),
    *cases("tied", "pretrain", "cp2_a2a cp4 pp2_cp2"),
    *cases("windowed", "pretrain", "tp2_sp cp2_gather cp2_a2a cp3 pp2 pp2_vp2 tp2_sp_cp2"),
    *cases("windowed", "packed", "cp2_a2a cp3 pp2"),
]


@parametrize(CASES, SLOW)
def test_pretraining_equals_one_rank(measured, record_property, model, stage, parallelism):
    assert_equals_one_rank(measured, (model, stage, parallelism), record_property)


@pytest.mark.parametrize("source", ["hf"])
@pytest.mark.parametrize(
    ("model", "stage", "parallelism"),
    [("odd_tied", "pretrain", "tp2_pp2"), ("kda", "pretrain", "tp2_sp"), ("experts", "pretrain", "pp2_ep2")],
)
def test_a_hugging_face_folder_starts_the_run_of_its_model_folder(measured, model, stage, parallelism, source):
    """Fused projections of every mixer, experts, a tied head on another stage, a vocabulary that the ranks do not divide."""
    assert_equals_hf_start(measured, (model, stage, parallelism))


@parametrize_faults("pretrain", CASES)
def test_a_fault_planted_in_pretraining_is_caught(measured, record_property, fault):
    assert_caught(measured, fault, record_property)


@pytest.mark.parametrize(("model", "stage"), [("normed", "pretrain")])
@pytest.mark.parametrize(("parallelism", "ranks"), [("cp2_gather", 2), ("cp4", 4), ("tp2_sp_cp2", 2)])
def test_context_parallelism_moves_what_the_formulas_say(measured, model, stage, parallelism, ranks):
    """Bytes of each mixer's forward passes, fp32, against docs/parallelism.md."""
    c, (passes, length), tp = MODELS["normed"], (2, 24), 2 if parallelism.startswith("tp2") else 1
    part, taps = length // ranks, c.linear_conv_kernel_dim - 1
    gdn_heads, keys, values = c.linear_num_heads // tp, c.linear_key_head_dim, c.linear_value_head_dim
    heads, groups = c.mamba_num_heads // tp, c.num_query_groups // tp
    numbers = {
        "G": gdn_heads * keys * (keys + values) + taps * gdn_heads * (2 * keys + values),
        "+": part // tp * (c.kv_lora_rank + c.qk_pos_emb_head_dim),  # each tensor-parallel rank its piece
        "M": heads * (c.mamba_head_dim * c.mamba_state_dim + 1)
        + taps * (groups * (c.mamba_head_dim + c.mamba_state_dim) + heads * c.mamba_state_dim),
        "*": part * 2 * groups * c.kv_channels,
    }  # fmt: skip
    queries = part // 2 * c.num_attention_heads // tp  # traded, and their outputs: a half of them
    traded = {"+": queries * (c.qk_head_dim + c.qk_pos_emb_head_dim + c.v_head_dim), "*": queries * 2 * c.kv_channels}
    found = torch.load(file_of(measured, (model, stage, parallelism)))["received"]
    assert found == [4 * passes * ((ranks - 1) * numbers[symbol] + traded.get(symbol, 0)) for symbol in c.mixers]


@pytest.mark.parametrize(("model", "stage"), [("wide", "pretrain")])
@pytest.mark.parametrize(("parallelism", "ranks", "tp"), [("cp4_a2a", 4, 1), ("tp2_sp_cp2_a2a", 2, 2)])
def test_trading_sequence_for_heads_moves_what_the_formulas_say(measured, model, stage, parallelism, ranks, tp):
    """A rank keeps its share of the heads of its own tokens and gets that of the others' tokens, there and back."""
    c, passes, share = MODELS["wide"], 2, 24 // ranks / ranks / tp
    gdn_value = c.linear_num_heads * c.linear_value_head_dim
    mamba_inner = c.mamba_num_heads * c.mamba_head_dim
    query_head = c.qk_head_dim + c.qk_pos_emb_head_dim
    widths = {
        "G": c.linear_num_heads * (2 * c.linear_key_head_dim + 2) + gdn_value + gdn_value,
        "+": c.num_attention_heads * (query_head + c.v_head_dim),
        "M": c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim)
        + c.mamba_num_heads * (c.mamba_state_dim + 1) + mamba_inner,
        "*": (2 * c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels,
    }  # fmt: skip
    latents = 24 // ranks // tp * (c.kv_lora_rank + c.qk_pos_emb_head_dim)
    numbers = {symbol: share * width + (latents if symbol == "+" else 0) for symbol, width in widths.items()}
    found = torch.load(file_of(measured, (model, stage, parallelism)))["received"]
    assert found == [4 * passes * (ranks - 1) * numbers[symbol] for symbol in c.mixers]
