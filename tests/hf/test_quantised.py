"""Quantised exports against the rounded weights, and maps with FP8 weights; every way to lose a scale is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.convert import quantise
from megatron_hylo.convert.gptq import FORMATS
from megatron_hylo.convert.gptq import quantise as round_weight
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.convert.quantise import export_quantised, round_weights
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.hf import HyloConfig, HyloForCausalLM, fused_hylo
from megatron_hylo.hf.decode_hylo import join_projections
from megatron_hylo.hf.quantised_hylo import HyloScaledLinear, check_declared, keep_weights_in_fp8, quantised_linears
from megatron_hylo.kernels.matvec import matvec
from megatron_hylo.serve.generate import generate_text
from tests.cli.test_cli import run
from tests.conftest import tiny_hf_model
from tests.hf.conftest import random_model, save_tokenizer, serve_config

WIDTHS = dict(hidden_size=64, ffn_hidden_size=96, q_lora_rank=32, v_head_dim=16, mamba_head_dim=16, linear_value_head_dim=32)
CONFIG = serve_config("G+M*K", **WIDTHS)
GROUPS = {"fp8": None, "int8": None, "int4": 32}


@pytest.fixture(scope="session")
def needs_compressed_tensors():
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install megatron-hylo[quantize]")


@pytest.fixture(scope="session")
def exports(needs_compressed_tensors, tmp_path_factory):
    """A random hybrid in bf16 as FOLDER/hf, and exported in each format as FOLDER/fp8 and so on."""
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    random_model(CONFIG, torch.bfloat16).save_pretrained(folder / "hf")
    save_tokenizer(folder / "hf")
    for name in FORMATS:
        export_quantised(folder / "hf", folder / name, name)
    return folder


def rounded(folder, name):
    """The hybrid of a folder with its weights rounded one by one, and their names."""
    model = HyloForCausalLM.from_pretrained(folder).eval()
    linears = quantised_linears(model, FORMATS[name].keeps)
    with torch.no_grad():
        for linear in linears.values():
            values, scales = round_weight(linear.weight, FORMATS[name], GROUPS[name])
            linear.weight.copy_(values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1))
    return model, linears


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_the_loaded_folder_is_the_rounded_model(exports, name, ids, tmp_path):
    expected, linears = rounded(exports / "hf", name)
    assert len(linears) == 5 * 3 + 5 + (4 if name == "fp8" else 3) + 2 + 4 + 5  # MLPs, G, +, M, *, K
    model = HyloForCausalLM.from_pretrained(exports / name).eval()
    assert model.state_dict().keys() == expected.state_dict().keys() and not hasattr(model.config, "quantization_config")
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    for module in model.modules():
        assert type(module._parameters) is dict and "forward" not in vars(module)  # nothing is wrapped
    assert torch.equal(model.model(ids).last_hidden_state, expected.model(ids).last_hidden_state)
    whole = model(ids).logits
    assert torch.equal(whole, expected(ids).logits)
    original = HyloForCausalLM.from_pretrained(exports / "hf")(ids).logits
    error = (whole.float() - original.float()).norm() / original.float().norm()
    assert error < {"fp8": 0.5, "int8": 0.15, "int4": 0.9}[name]  # random weights; the largest decides a row's step
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(HyloForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, whole)


def test_sizes_and_the_card(exports):
    sizes = {name: (exports / name / "model.safetensors").stat().st_size for name in ("hf", *FORMATS)}
    for name, form in FORMATS.items():
        numbers = sum(linear.weight.numel() for linear in quantised_linears(random_model(CONFIG), form.keeps).values())
        saved = sizes["hf"] - sizes[name]
        assert saved == pytest.approx(numbers * (2 - form.bits / 8), rel=0.15), name  # less scales
        assert "quantised" in (card := (exports / name / "README.md").read_text()) and "compressed-tensors" in card
        assert "vllm serve" not in card


@pytest.mark.slow
@torch.no_grad()
def test_transformers_4_loads_the_same_model(exports, transformers4, ids):
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(eval(sys.argv[1]))
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto")
    print("LOGITS", model(ids).logits.float().double().norm().item())
"""
    ids = ids[:, :12]
    printed = transformers4(program, ids.tolist(), *(exports / name for name in FORMATS))
    found = [float(line.split()[1]) for line in printed.splitlines() if line.startswith("LOGITS")]
    expected = [HyloForCausalLM.from_pretrained(exports / name)(ids).logits.double().norm().item() for name in FORMATS]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_planted_wrong_scale_is_found_before_the_folder_appears(exports, tmp_path, monkeypatch):
    right = quantise.Compressor.state_dict

    def wrong(*args):
        tensors = right(*args)
        tensors["model.layers.1.mlp.up_proj.weight_scale"][3] *= 2
        return tensors

    monkeypatch.setattr(quantise.Compressor, "state_dict", wrong)
    with pytest.raises(ConfigError, match="transformers reads other weights .*: model.layers.1.mlp.up_proj.weight and 0 more"):
        export_quantised(exports / "hf", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_folders_whose_scales_would_not_be_read_are_refused(exports, tmp_path):
    values, tensors = (
        json.loads((exports / "fp8" / "config.json").read_text()),
        load_file(exports / "fp8" / "model.safetensors"),
    )
    scale = "model.layers.0.mlp.up_proj.weight_scale"

    def write(config, weights):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    write({name: value for name, value in values.items() if name != "quantization_config"}, tensors)
    with pytest.raises(ValueError, match=r"weight_scale and 34 more tensors .* config.json does not say how to read them"):
        HyloForCausalLM.from_pretrained(tmp_path)
    write(values, {name: tensor for name, tensor in tensors.items() if name != scale})
    with pytest.raises(ValueError, match=f"the folder is quantised, but {scale} is not in it"):
        HyloForCausalLM.from_pretrained(tmp_path)
    for method, said in (("modelopt", "nvidia-modelopt"), ("other", "the method 'other'")):
        with pytest.raises(ValueError, match=f"quantised by {said}, whose scales transformers does not read"):
            HyloForCausalLM(HyloConfig(hylo=CONFIG.to_dict(), quantization_config={"quant_method": method}))
    check_declared({"quant_method": "bitsandbytes", "load_in_8bit": True})
    check_declared({"quant_method": "compressed-tensors"})


def test_bad_exports_are_refused(exports, tmp_path, monkeypatch, capsys):
    random_model(serve_config("G+", hidden_size=48)).save_pretrained(tmp_path / "odd")
    save_tokenizer(tmp_path / "odd")
    with pytest.raises(
        ConfigError, match="int4 has one scale for 128, 64, 32 neighbouring weights, but .* has rows of 48; use"
    ):
        export_quantised(tmp_path / "odd", tmp_path / "out", "int4")
    tiny_hf_model("llama").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    with pytest.raises(ConfigError, match="is a plain Transformer"):
        export_quantised(tmp_path / "dense", tmp_path / "out", "fp8")
    model = random_model(CONFIG, torch.bfloat16)
    model.config.hylo = model.config.hylo | {"hybrid_layer_pattern": "GE+-M-*-K-"}
    monkeypatch.setattr(quantise, "open_model", lambda _: (model, None))
    with pytest.raises(ConfigError, match="has layers with experts, which are not quantised yet"):
        export_quantised(exports / "hf", tmp_path / "out", "fp8")
    with pytest.raises(ConfigError, match="quantize 'int3' is no format; use one of fp8, int8, int4"):
        export_quantised(exports / "hf", tmp_path / "out", "int3")
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.compressors", None)
    with pytest.raises(ConfigError, match=r"needs compressed-tensors, .* pip install 'megatron-hylo\[quantize\]'"):
        export_quantised(exports / "hf", tmp_path / "out", "fp8")
    code, said = run(capsys, "export", exports / "hf", tmp_path / "out", "--calibration_data", "d")
    assert code == 2 and "give --quantize fp8, int8 or int4 with it" in said and not (tmp_path / "out").exists()


def test_the_verbs_of_a_user(needs_compressed_tensors, save_hybrid, tmp_path, capsys):
    """Export of a model folder with calibration, then text out of it."""
    save_hybrid(tmp_path, CONFIG)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 90)
    (tmp_path / "more.txt").write_text("pack my box with five dozen liquor jugs " * 90)
    preprocess(tmp_path / "text.txt", tmp_path / "data", tmp_path / "tokenizer", 0.0, more_inputs=[tmp_path / "more.txt"])
    line = ["export", tmp_path / "model", tmp_path / "int4", "--quantize", "int4", "--calibration_data", tmp_path / "data"]
    code, said = run(capsys, *line, "--calibration_tokens", "2048")
    assert code == 0 and f"wrote {tmp_path}/int4" in said.replace("\n", ""), said
    assert "rounded by GPTQ on 2,048 tokens" in (tmp_path / "int4" / "README.md").read_text()
    found = generate_text(tmp_path / "int4", "the quick brown", max_new_tokens=6)
    model, tokenizer = open_model(tmp_path / "int4")
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert found.text == tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True) and found.new_tokens == 6


@torch.no_grad()
def test_gptq_on_text_is_nearer_to_the_model_than_nearest_values(ids):
    model = random_model(CONFIG, torch.bfloat16)
    windows = torch.randint(20, (8, 64))  # few tokens, so that inputs are alike
    whole, errors = model(windows[:2]).logits.float(), {}
    for text in (None, windows[2:]):
        changed = copy.deepcopy(model)
        found = round_weights(changed, FORMATS["int4"], 32, text)
        assert found.keys() == quantised_linears(model, {"q_a_proj"}).keys()
        for name, linear in quantised_linears(changed, {"q_a_proj"}).items():
            assert torch.equal(linear.weight, found[name].weight().to(torch.bfloat16))
        kept = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in found}
        assert all(torch.equal(changed.get_parameter(name), p) for name, p in kept.items())
        errors[text is None] = (changed(windows[:2]).logits.float() - whole).norm().item()
    assert errors[False] < 0.9 * errors[True], errors


@pytest.mark.parametrize("mixers", ["G+M", "*K"])
@torch.no_grad()
def test_fp8_weights_in_memory_are_the_exports(mixers, ids, monkeypatch):
    """Full forwards and products of one vector, joined and with SwiGLU and residual as on a GPU."""
    products = []
    model = random_model(serve_config(mixers, **WIDTHS), torch.float32)
    expected = copy.deepcopy(model)
    for linear in quantised_linears(expected).values():
        values, scales = round_weight(linear.weight, FORMATS["fp8"])
        linear.weight.copy_(values * scales)
    wanted = expected(ids[:1], use_cache=False).logits
    keep_weights_in_fp8(model)
    held = sum(m.weight.nbytes for m in model.modules() if isinstance(m, HyloScaledLinear))
    assert held == sum(linear.weight.numel() for linear in quantised_linears(expected).values())
    torch.testing.assert_close(model(ids[:1], use_cache=False).logits, wanted, rtol=0, atol=1e-4)
    again = copy.deepcopy(expected)
    keep_weights_in_fp8(again)
    for name, module in again.named_modules():
        if isinstance(module, HyloScaledLinear):  # rounding what is rounded changes nothing
            assert torch.equal(module.weight.float() * module.weight_scale[:, None], expected.get_parameter(f"{name}.weight"))
    monkeypatch.setattr(fused_hylo, "one_vector", lambda x: x.numel() == x.shape[-1])
    monkeypatch.setattr(fused_hylo, "matvec", lambda x, w, *args, **given: products.append(w) or matvec(x, w, *args, **given))
    monkeypatch.setattr(HyloScaledLinear, "forward", None)  # a step multiplies with the values as they are
    model.decodes_with_fixed_shapes = True
    join_projections(model)
    cache = expected.new_cache(1, 75)
    expected(ids[:1, :70], past_key_values=cache)
    logits = torch.cat([model(token, past_key_values=cache).logits for token in ids[:1, 70:].split(1, dim=1)], 1)
    torch.testing.assert_close(logits, wanted[:, 70:], rtol=0, atol=1e-4)
    wide = [w for w in products if w.element_size() == 1]
    assert len(wide) == 5 * sum({"G": 2, "K": 2, "+": 3, "M": 2, "*": 2}[m] + 2 for m in mixers)  # joined maps count once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mixers", ["G+M", "*K"])
@torch.no_grad()
def test_fp8_weights_decode_on_a_gpu_as_the_rounded_model_does(mixers, ids):
    """Steps of a captured CUDA graph, beside the same steps with the rounded weights in bf16, and both beside fp32."""
    sizes = dict(hidden_size=256, ffn_hidden_size=768, q_lora_rank=64, v_head_dim=16, mamba_head_dim=16)
    model = random_model(serve_config(mixers, **sizes), torch.bfloat16).cuda()
    for parameter in (p for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias", "D"))):
        parameter.data = parameter.data.float()
    keep_weights_in_fp8(model)
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, HyloScaledLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="cuda", dtype=torch.bfloat16)
            linear.weight.copy_(module.weight.float() * module.weight_scale[:, None])
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, linear)
    ids, found = ids[:1].cuda(), []
    for each in (model, plain):
        cache = each.new_cache(1, 75)
        each(ids[:, :64], past_key_values=cache)
        found.append(torch.cat([each(t, past_key_values=cache).logits for t in ids[:, 64:].split(1, dim=1)], 1).float())
        assert cache.graph is not None and cache.graph.graph is not None, cache.graph.failure
    exact = plain.float()(ids, use_cache=False).logits[:, 64:]
    errors = [((logits - exact).norm() / exact.norm()).item() for logits in found]
    assert errors[0] < 1.5 * errors[1] + 1e-3, errors
