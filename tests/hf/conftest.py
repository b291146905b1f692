"""Tiny random HyLo models for transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.models.checkpoint import save_model
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


def save_tokenizer(folder):
    """One token a letter; the other ids up to the tiny vocabulary's 160 stand for characters that no prompt holds."""
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    vocabulary |= {chr(0x100 + i): i for i in range(len(vocabulary), 160) if chr(0x100 + i) != "Ġ"}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} answer"
    fast.save_pretrained(folder)


def export(model: HyloModel, folder: Path, tokenizer: Path | None = None) -> None:
    """Export a model as `hylo export` does, to FOLDER/hf from FOLDER/model; tests compare it themselves."""
    save_model(model, folder / "model", tokenizer)
    convert_megatron_to_hf(folder / "model", folder / "hf", verify=False)


@pytest.fixture(scope="session")
def save_hybrid(one_rank) -> Callable[[Path, ModelConfig], None]:
    """save(folder, config): a random hybrid as FOLDER/model, its export FOLDER/hf, and their tokenizer FOLDER/tokenizer."""

    def save(folder: Path, config: ModelConfig) -> None:
        save_tokenizer(folder / "tokenizer")
        save_model(random_megatron_model(config), folder / "model", tokenizer=folder / "tokenizer")
        convert_megatron_to_hf(folder / "model", folder / "hf")

    return save


@pytest.fixture
def ids():
    """Random tokens [2, 75], longer than the kernels' chunk of 64."""
    return torch.randint(160, (2, 75))
