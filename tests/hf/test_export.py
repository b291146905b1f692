"""Exported folders against the Megatron model; test_export_elsewhere.py loads them where this project is absent."""

import re

import pytest
import torch

from megatron_hylo.config import RopeScaling
from megatron_hylo.convert.open_model import hf_model
from megatron_hylo.hf import HyloConfig, HyloForCausalLM, code_files
from megatron_hylo.hf.code_files import copy_modelling_code
from tests.conftest import EXPERTS
from tests.hf.conftest import ALIGNED, PAIRS, YARN, export, random_megatron_model, serve_config
from tests.kernels.compare import relative_error

NOPE = RopeScaling("nope")
BOTH_YARN = dict(rope_scaling=RopeScaling(**YARN), mla_rope_scaling=RopeScaling(**YARN))
CASES = {
    "+": serve_config("++"),
    "M": serve_config("MM"),
    "G": serve_config("GG"),
    "G+M*": serve_config("G+M*"),
    "K+*K": serve_config("K+*K"),
    "W+*W": serve_config("W+*W"),
    "G+M* q/k-norm, yarn": serve_config("G+M*", qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)),
    "G+*+ pairs, yarn, theta": serve_config("G+*+", **PAIRS, **BOTH_YARN, rotary_base=3e5),
    "G+*+ pairs, NoPE": serve_config("G+*+", **PAIRS, rope_scaling=NOPE, mla_rope_scaling=NOPE),
    "** NoPE": serve_config("**", rope_scaling=NOPE),
    "G+M* tied": serve_config("G+M*", untie_embeddings_and_output_weights=False),
    "G+M* experts, q/k-norm, yarn": serve_config(
        "G+M*", hybrid_layer_pattern="G-+EM-*E", **EXPERTS, qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)
    ),
    "+G experts not normalised": serve_config("+G", hybrid_layer_pattern="+EGE", **EXPERTS, moe_router_pre_softmax=True),
    **{name: serve_config("G+*+", **settings) for name, settings in ALIGNED.items()},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@torch.no_grad()
def test_logits_equal_the_megatron_models(config, one_rank, tmp_path, ids):
    megatron = random_megatron_model(config)
    export(megatron, tmp_path)
    model = HyloForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = megatron.logits(megatron(ids.to(one_rank))).cpu()
    assert expected.std() > 0.3
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert relative_error(logits, expected) < 1e-5
    in_memory = hf_model(megatron).to(ids.device).eval()(ids).logits  # as `hylo generate` opens model folders
    torch.testing.assert_close(in_memory, logits, rtol=0, atol=1e-6)


def test_all_files_that_are_imported_are_copied(tmp_path):
    names = {path.name for path in copy_modelling_code(tmp_path)}
    assert names == {path.name for path in tmp_path.iterdir()}
    kernels = {
        "attention.py", "attention_after_prefix.py", "blockwise_attention.py", "causal_conv1d.py",
        "decode_attention.py", "delta_rule_state_pass.py", "delta_rule_states.py", "elementwise.py",
        "flash_attention_3.py", "flash_attention_4.py", "fused_inputs.py", "gated_delta_rule.py", "implementations.py",
        "kda.py", "matvec.py", "norm.py", "quantised_latents.py", "recurrence_step.py", "registry.py", "rope.py", "ssd.py",
        "triton_causal_conv1d_step.py", "triton_decode_attention.py", "triton_matvec.py", "tuned.py",
        "window_attention.py",
    }  # fmt: skip
    parts = (
        "modeling", "layers", "attention", "inputs", "configuration", "cache", "decode", "fused", "pretrained", "quantised",
        "experts", "window", "generation", "recurrent", "attend", "pytree",
    )  # fmt: skip
    assert names == {f"{name}_hylo.py" for name in parts} | kernels


def test_the_models_file_names_every_other_as_transformers_4_wants(tmp_path):
    written = {path.stem for path in copy_modelling_code(tmp_path)}
    text = (tmp_path / "modeling_hylo.py").read_text()
    assert set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)) == written - {"modeling_hylo"}


def test_code_that_needs_more_of_ours_than_kernels_is_not_exported(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "modeling_hylo.py").write_text("from megatron_hylo.config import ModelConfig\n")
    monkeypatch.setattr(code_files, "MODELLING", tmp_path / "from")
    with pytest.raises(RuntimeError, match="modeling_hylo.py cannot be exported.*megatron_hylo.config import ModelConfig"):
        copy_modelling_code(tmp_path / "to")


def test_weights_of_modelopt_are_refused():
    """transformers warns, loads the numbers and leaves their scales out."""
    config = HyloConfig(hylo=serve_config("G+").to_dict(), quantization_config={"quant_method": "modelopt", "bits": 8})
    with pytest.raises(ValueError, match="quantised by nvidia-modelopt, whose scales transformers does not read"):
        HyloForCausalLM(config)
