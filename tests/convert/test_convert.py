"""Conversion against transformers: logits, bit-exact round trips, and every way an input can be bad."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_start import model_identity
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.convert.verify_hashes import verify_hashes
from megatron_hylo.io import DamagedError
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import tiny_config, tiny_hf_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
KINDS = ("sliding", "full", "sliding")  # of layers
CASES = {
    "llama-tied": ("llama", True, {}),
    "llama-untied-llama3-rope": ("llama", False, {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", True, {"rope_parameters": YARN}),
    "qwen2-bias": ("qwen2", True, {}),
    "qwen3-qk-norm": ("qwen3", False, {}),
    "qwen3-yarn": ("qwen3", True, {"rope_parameters": YARN}),
    "mistral": ("mistral", False, {"sliding_window": None}),
    "mistral-window": ("mistral", False, {"sliding_window": 9}),
    "qwen3-windows": (
        "qwen3",
        False,
        {"use_sliding_window": True, "sliding_window": 11, "layer_types": [f"{k}_attention" for k in KINDS]},
    ),
    "qwen3_moe-window": ("qwen3_moe", False, {"use_sliding_window": True, "sliding_window": 13}),
    "llama-one-kv-head": ("llama", True, {"num_key_value_heads": 1}),
    "qwen3_moe": ("qwen3_moe", False, {}),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        True,
        {
            "norm_topk_prob": False,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers_and_round_trip_is_bit_exact(case, one_rank, tmp_path):
    family, tied, changes = CASES[case]
    tiny_hf_model(family, tied, **changes).save_pretrained(tmp_path / "hf")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    result = verify_conversion(tmp_path / "hf", tmp_path / "megatron", tokens=100)
    assert result.ok and result.max_logit_difference < 2e-5, result
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again).__name__.lower().startswith(family.replace("_", ""))
    ids = torch.randint(160, (2, 20))
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(original(ids).logits, again(ids).logits)


def test_a_folder_with_another_programs_manifest_is_converted(one_rank, tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").write_text('{"name": "a model", "files": ["model.safetensors"]}')
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert verify_hashes(tmp_path / "hf", tmp_path / "megatron").ok
    assert len(model_identity(f"hf:{tmp_path / 'hf'}")) == 64


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_bfloat16_round_trip_is_bit_exact(family, one_rank, tmp_path):
    tiny_hf_model(family).bfloat16().save_pretrained(tmp_path / "hf")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(before[n], after[n]) for n in before)


def test_hybrid_with_aligned_mla_round_trips_bit_exact(one_rank, tmp_path):
    """Biases, rotary pairs and the key norm's mix; a folder's configuration comes back too."""
    config = tiny_config(
        "+-*-G-+-", qk_layernorm=True, qk_head_dim=16, mla_bias=True, mla_rotary_pairs=[[5, 0, 5], [], [], [1, 2, 3]]
    )  # fmt: skip
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    save_model(model, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert convert_hf_to_megatron(tmp_path / "hf", tmp_path / "again") == config
    again = load_model(tmp_path / "again")
    assert again.config.hylo == config
    before, after = (dict(m.named_parameters()) for m in (model, again))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    convert_megatron_to_hf(tmp_path / "again", tmp_path / "back")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    assert {n: tuple(t.shape) for n, t in before.items()} == tensor_names(config)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_sharded_checkpoint_equals_whole_one(one_rank, tmp_path):
    model = tiny_hf_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        convert_hf_to_megatron(tmp_path / name, tmp_path / f"{name}-megatron")
    one, many = (dict(load_model(tmp_path / f"{n}-megatron").named_parameters()) for n in ("one", "many"))
    assert all(torch.equal(one[n], many[n]) for n in one)


def test_verify_names_the_one_weight_that_was_changed(one_rank, tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "hf")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify_conversion(tmp_path / "hf", tmp_path / "megatron")
    assert not result.ok
    assert len(result.differing) == 1 and result.differing[0].startswith(
        "model.layers.1.self_attn.k_proj.weight: max |delta| 2.5"
    )
    assert result.max_logit_difference > 1e-4


@pytest.fixture
def hf_folder(tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    return tmp_path / "hf"


def refused(folder, message, tmp_path, error=ConfigError):
    with pytest.raises(error, match=message):
        convert_hf_to_megatron(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def shard(folder, number=2):
    return sorted(folder.glob("model-*.safetensors"))[number]


def test_missing_shard(one_rank, hf_folder, tmp_path):
    name = shard(hf_folder).name
    shard(hf_folder).unlink()
    refused(hf_folder, f"{name} is missing", tmp_path)


def test_corrupt_shard(one_rank, hf_folder, tmp_path):
    file = shard(hf_folder)
    file.write_bytes(file.read_bytes()[:-100])
    refused(hf_folder, f"{file.name} is corrupt or cut short", tmp_path)


def test_unknown_architecture(one_rank, hf_folder, tmp_path):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma9"}))
    refused(hf_folder, "unknown architecture: model_type 'gemma9'.*supported: hylo, llama, mistral, qwen2, qwen3", tmp_path)


def test_shape_that_config_does_not_ask_for(one_rank, hf_folder, tmp_path):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(hf_folder, r"mlp.gate_proj.weight has shape \[112, 48\], config.json asks for \[128, 48\]", tmp_path)


def test_no_such_folder_and_no_checkpoint(one_rank, tmp_path):
    (tmp_path / "hf").mkdir()
    refused(tmp_path / "nowhere", "does not exist", tmp_path)
    refused(tmp_path / "hf", "has no config.json", tmp_path)


def test_damaged_model_folder_is_named(one_rank, hf_folder, tmp_path):
    convert_hf_to_megatron(hf_folder, tmp_path / "megatron")
    file = next((tmp_path / "megatron" / "weights").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match=file.name):
        load_model(tmp_path / "megatron")


def test_a_source_is_not_mapped_into_memory(hf_folder):
    """Pages read of a mapped file count as memory of the process."""
    source = SafetensorsSource(hf_folder)
    kept = [source.read(name) for name in source.shard_of]
    assert kept and str(hf_folder) not in Path("/proc/self/maps").read_text()
