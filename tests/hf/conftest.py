"""Tiny random HyLo models for transformers."""

import pytest
import torch

from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.models.hylo_model import HyloModel, build_model
from tests.conftest import tiny_config

# no two sizes that meet in a product are equal, but for v_head_dim, which nothing ties to the others
SIZES = dict(num_attention_heads=4, v_head_dim=14, mamba_num_heads=4, mamba_head_dim=20, mamba_state_dim=12)
# the aligned form of MLA: two layers that turn with different frequencies, one of them twice
PAIRS = dict(qk_pos_emb_head_dim=4, mla_rotary_pairs=[[], [0, 5], [], [3, 3]])
ALIGNED = {
    "G+*+ pairs, bias": dict(**PAIRS, mla_bias=True),
    "G+*+ pairs, bias, aligned q/k-norm": dict(**PAIRS, mla_bias=True, qk_layernorm=True, qk_head_dim=16),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}


def serve_config(mixers: str, **changes):
    """ModelConfig of tiny layers with 4 query heads on 2 KV heads."""
    return tiny_config("".join(m + "-" for m in mixers), **(SIZES | changes))


def random_model(config, dtype: torch.dtype = torch.float64) -> HyloForCausalLM:
    """Weights large enough that every part of the model changes the logits."""
    model = HyloForCausalLM(HyloConfig(hylo=config.to_dict()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("D", "bias")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                parameter.uniform_(-3, 1)
            elif "conv1d" in name:
                parameter.uniform_(-0.5, 0.5)
            else:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def random_megatron_model(config) -> HyloModel:
    """A Megatron model, every parameter moved off its trivial start; needs the fixture one_rank."""
    model = build_model(config, backend="local").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("_proj.bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def ids():
    """Random tokens [2, 75], longer than the kernels' chunk of 64."""
    return torch.randint(160, (2, 75))
