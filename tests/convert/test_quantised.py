"""Quantised folders: dequantised as the formula and transformers say, or refused in words."""

import json

import pytest
import torch
import transformers

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.oracle import open_oracle
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.models.checkpoint import load_model
from tests.conftest import tiny_hf_model
from tests.convert.quantised_folders import bitsandbytes, compressed_tensors, declare, float8, int8, quantise_folder

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
ONE, BF16 = torch.ones(()), torch.bfloat16
# 48 and 112 are what the model's matrices have; 32 divides neither evenly, 16 both
CASES = {
    "fp8-blocks": (float8("weight_scale_inv", (16, 16), BF16), FP8 | {"weight_block_size": [16, 16]}),
    "fp8-blocks-cut-off": (float8("weight_scale_inv", (32, 32)), FP8 | {"weight_block_size": [32, 32]}),
    "fp8-blocks-of-128-larger-than-all": (float8("weight_scale_inv", (128, 128)), FP8 | {"weight_block_size": [128, 128]}),
    "fp8-tensor-inv": (float8("weight_scale_inv", shape=(), activation_scale=ONE), FP8 | {"activation_scheme": "static"}),
    "autofp8-tensor": (float8("weight_scale", shape=(1,), input_scale=ONE), FP8 | {"activation_scheme": "static"}),
    "fbgemm-rows": (float8("weight_scale", (1, 1000)), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "compressed-fp8-rows": (float8("weight_scale", (1, 1000), BF16), compressed_tensors("float-quantized", strategy="channel")),
    "compressed-fp8-blocks": (
        float8("weight_scale", (32, 16)), compressed_tensors("float-quantized", strategy="block", block_structure=[32, 16]),
    ),
    "compressed-int8-rows": (int8(), compressed_tensors("int-quantized", strategy="channel")),
    "compressed-int8-zero-points": (int8(asymmetric=True), compressed_tensors("int-quantized", strategy="channel")),
    "compressed-int8-groups": (int8((1, 16)), compressed_tensors("int-quantized", strategy="group", group_size=16)),
    "bitsandbytes-int8": (bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "modelopt": (float8("weight_scale", shape=(), input_scale=ONE, k_scale=ONE), MODELOPT),
}  # fmt: skip
BY_TRANSFORMERS = ("fp8-blocks", "fp8-blocks-of-128-larger-than-all", "fp8-tensor-inv")


@pytest.mark.parametrize("case", CASES)
def test_dequantised_weights_match_the_formula_and_transformers(case, tmp_path):
    store, declared = CASES[case]
    tiny_hf_model("qwen3").bfloat16().save_pretrained(tmp_path)
    right = quantise_folder(tmp_path, store, declared)
    source = SafetensorsSource(tmp_path)
    assert source.dtype() == torch.float32
    for name, weight in right.items():
        found = source.read(name)
        if case == "bitsandbytes-int8":  # whose own two products round twice
            assert torch.allclose(found.float(), weight, rtol=3e-7, atol=0)
        else:
            assert torch.equal(found.float(), weight), name
    with open_oracle(source, tmp_path) as oracle:
        assert ("dequantised by it" in oracle.description) == (case in BY_TRANSFORMERS), oracle.description
        assert all(torch.equal(oracle.tensor(name), source.read(name).float()) for name in right)


def test_transformers_takes_cut_off_blocks_for_smaller_ones(tmp_path):
    """Why it is no oracle for them: a version that reads them rightly fails here, and the exception can go."""
    tiny_hf_model("qwen3").bfloat16().save_pretrained(tmp_path)
    right = quantise_folder(tmp_path, *CASES["fp8-blocks-cut-off"])
    name = "model.layers.0.mlp.gate_proj.weight"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()[name]
    assert not torch.equal(theirs, right[name])


@pytest.mark.parametrize("case", ["fp8-blocks", "compressed-int8-rows"])
def test_quantised_folder_converts_to_the_formula_and_is_verified(case, one_rank, tmp_path):
    tiny_hf_model("qwen3").bfloat16().save_pretrained(tmp_path / "hf")
    right = quantise_folder(tmp_path / "hf", *CASES[case])
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert all(torch.equal(tensor, right[name]) for name, tensor in hf_tensors(load_model(tmp_path / "megatron")))
    result = verify_conversion(tmp_path / "hf", tmp_path / "megatron")
    assert result.ok and result.tensors == len(right), result


def test_modelopt_declared_by_hf_quant_config_alone(tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path)
    right = quantise_folder(tmp_path, CASES["modelopt"][0], None)
    with pytest.raises(ConfigError, match=r"stored as F8_E4M3.*neither config.json .* nor hf_quant_config.json says"):
        SafetensorsSource(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="hf_quant_config.json is not ModelOpt's"):
        SafetensorsSource(tmp_path)
    declared = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(declared))
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(source.read(name), weight) for name, weight in right.items())


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'; convert the model's unquantised"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
    "4-bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes with 4 bits"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt's quant_algo NVFP4"),
    "packed": (compressed_tensors("pack-quantized", num_bits=4), "compressed-tensors format pack-quantized"),
    "rotated": (
        compressed_tensors("float-quantized", strategy="channel") | {"transform_config": {"config_groups": {"R1": {}}}},
        "transforms of the activations",
    ),
    "undeclared block": (
        FP8,
        r"mlp.down_proj.weight_scale_inv is F32 of shape \[3, 7\], which fits neither .* \(none is declared\)",
    ),
    "other block": (FP8 | {"weight_block_size": [128, 128]}, r"fits neither .* nor blocks of \[128, 128\]"),
    "no declaration": (None, "stored as F8_E4M3, but neither"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_dequantised_is_refused(case, tmp_path):
    declared, message = REFUSED[case]
    tiny_hf_model("llama").save_pretrained(tmp_path)
    quantise_folder(tmp_path, float8("weight_scale_inv", (16, 16)), declared)
    with pytest.raises(ConfigError, match=message):
        SafetensorsSource(tmp_path)


def test_weight_without_scale_and_scale_without_weight_are_refused(tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path)
    quantise_folder(tmp_path, lambda w: ({"weight": w.to(torch.float8_e4m3fn)}, w), FP8)
    with pytest.raises(ConfigError, match="with no scale; exactly one of weight_scale_inv, weight_scale, SCB"):
        SafetensorsSource(tmp_path)
    tiny_hf_model("llama").save_pretrained(tmp_path)
    quantise_folder(tmp_path, lambda w: ({"weight": w, "weight_scale": ONE}, w), FP8)
    with pytest.raises(ConfigError, match="scales of weights that are not stored as 8-bit values"):
        SafetensorsSource(tmp_path)


def test_unquantised_folder_that_declares_fp8_is_read_as_it_is(tmp_path):
    model = tiny_hf_model("llama")
    model.save_pretrained(tmp_path)
    declare(tmp_path, FP8 | {"weight_block_size": [128, 128]})
    source = SafetensorsSource(tmp_path)
    with open_oracle(source, tmp_path) as oracle:
        assert all(torch.equal(oracle.tensor(n), source.read(n)) for n in source.stored)
