"""FLOPs as torch's counter finds them in models of one kind of mixer."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import BASES, active_parameter_count, get_layout, parameter_count
from megatron_hylo.config.mixers import MIXERS, get_mixer
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.flops import flops_by_layer, forward_flops_per_token, mlp_flops

LENGTH, LAYERS = 64, 2


def model_of(symbol: str) -> ModelConfig:
    """Two layers of one mixer, eight heads each: numbers of rows that projections need not be padded to."""
    sizes = dict(
        hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8, num_query_groups=8, kv_channels=64, mamba_num_heads=8,
        mamba_head_dim=64, mamba_state_dim=64, linear_num_heads=8, linear_key_head_dim=32, linear_value_head_dim=64,
        kda_decay_rank=32, attention_window=LENGTH, q_lora_rank=256, kv_lora_rank=96, vocab_size=512,
    )  # fmt: skip
    return get_layout("smollm2-135m-8mla22gdn").config.replace(hybrid_layer_pattern=f"{symbol}-" * LAYERS, **sizes)


@pytest.mark.parametrize("symbol", list(MIXERS))
def test_products_and_attention_are_what_the_counter_finds(symbol, one_rank):
    """Two FLOPs a weight of each product, and attention's scores and sums, which the counter takes as not causal."""
    config, mixer = model_of(symbol), get_mixer(symbol)
    model = build_model(config, params_dtype=torch.float32).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(torch.arange(LENGTH)[None]))
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    others = {name: math.prod(shape) for name, shape in mixer.tensors(config).items() if len(shape) != 2}  # norms, convolutions
    found = flops_by_layer(config, LENGTH)
    attention = LAYERS * mixer.sequence_flops(config, LENGTH)
    products = sum(found.values()) - attention - 2 * LAYERS * sum(others.values())
    assert counted["aten.mm"] == LENGTH * products
    if not mixer.recurrent:
        assert counted["aten.bmm"] == 2 * LENGTH * attention  # a causal mean is half of what the counter takes
    assert sum(others.values()) < 0.02 * mixer.parameters(config)


def test_attention_of_a_window_counts_the_keys_that_queries_see():
    config, length, window = model_of("W").replace(attention_window=100), 1000, 100
    seen = sum(min(place + 1, window) for place in range(length)) / length
    a_key = get_mixer("*").sequence_flops(config, 2)  # of a sequence of two, a key a query in the mean
    assert get_mixer("W").sequence_flops(config, length) == pytest.approx(a_key * seen, rel=1e-3)


def test_products_of_experts_are_what_the_counter_finds(one_rank):
    """Router and the experts that tokens go through, of layers with and without; parameters are those of the model."""
    config = model_of("*").replace(
        hybrid_layer_pattern="*E*-*E",
        num_moe_experts=8,
        moe_ffn_hidden_size=128,
        moe_router_topk=3,
        moe_router_pre_softmax=True,
    )
    model = build_model(config, params_dtype=torch.float32).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(torch.arange(LENGTH)[None]))
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    found = flops_by_layer(config, LENGTH)
    attention = 3 * get_mixer("*").sequence_flops(config, LENGTH)
    assert counted["aten.mm"] == LENGTH * (sum(found.values()) - attention)
    assert found["E"] == 2 * 2 * (512 * 8 + 3 * 3 * 512 * 128) and found["E"] + found["-"] == mlp_flops(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    idle = 2 * (8 - 3) * 3 * 512 * 128
    assert active_parameter_count(config) == parameter_count(config) - idle


def test_the_counts_of_qwen3_30b_a3b_are_those_of_its_card():
    base = BASES["qwen3-30b-a3b"]
    assert parameter_count(base) == 30_532_122_624
    ends = 2 * base.vocab_size * base.hidden_size
    assert round(active_parameter_count(base) / 1e9, 1) == 3.4 and round((parameter_count(base) - ends) / 1e9, 1) == 29.9


def test_a_sum_of_its_parts():
    config = BASES["llama3.2-1b"]
    parts = flops_by_layer(config, 8192)
    assert sum(parts.values()) == forward_flops_per_token(config, 8192) and set(parts) == {"head", "-", "*"}
    assert forward_flops_per_token(config, 8192, with_head=False) == sum(parts.values()) - parts["head"]
