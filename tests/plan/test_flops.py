"""FLOPs as torch's counter finds them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import get_layout
from megatron_hylo.config.mixers import MIXERS, get_mixer
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.flops import flops_by_layer, forward_flops_per_token

LENGTH = 64


@pytest.mark.parametrize("symbol", list(MIXERS))
def test_products_and_attention_are_counted_as_torch_counts_them(symbol, one_rank):
    """Matrix products of a model of one kind of mixer; attention, which torch counts as if it were not causal, twice."""
    config = get_layout("smollm2-135m-8mla22gdn").config.replace(hybrid_layer_pattern=f"{symbol}-" * 2, vocab_size=512, mamba_num_heads=9,
                                             mamba_head_dim=64, mamba_state_dim=64, kda_decay_rank=32)  # fmt: skip
    model = build_model(config, params_dtype=torch.float32).eval()
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    print(counted)
