"""Every tensor of a source is used, or known and harmless, or refused; the oracle is transformers' own loading."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_reader import open_source
from megatron_hylo.convert.safetensors_reader import INDEX, SINGLE, SafetensorsSource
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.models.checkpoint import load_model
from tests.conftest import tiny_hf_model

EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change(folder, **tensors):
    """Replace tensors (dots written as __; None removes one)."""
    stored = load_file(folder / SINGLE) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({n: t.clone() for n, t in stored.items() if t is not None}, folder / SINGLE, metadata={"format": "pt"})


def logits(folder, ids):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def refused(folder, message):
    with pytest.raises(ConfigError, match=message):
        open_source(folder)


# tied embeddings


@pytest.mark.parametrize("stored", ["another head", "the same head", "the head alone"])
def test_tied_embeddings_with_a_stored_head_match_transformers(stored, one_rank, folder, tmp_path):
    head = load_file(folder / SINGLE)[EMBEDDING] if stored == "the same head" else torch.randn(160, 48)
    change(folder, lm_head__weight=head, **({EMBEDDING: None} if stored == "the head alone" else {}))
    config = convert_hf_to_megatron(folder, tmp_path / "megatron", verify=False)
    assert config.untie_embeddings_and_output_weights == (stored == "another head")
    model, ids = load_model(tmp_path / "megatron", backend="local").eval(), torch.randint(160, (1, 30))
    with torch.no_grad():
        assert (model.logits(model(ids)) - logits(folder, ids)).abs().max() < 2e-5
    assert verify_conversion(folder, tmp_path / "megatron").ok


# dtypes

MIXTURES = {
    "bf16": ({}, torch.bfloat16, torch.bfloat16),
    "bf16 and fp16": ({DOWN: torch.float16}, torch.bfloat16, torch.float32),
    "bf16 and fp32": ({DOWN: torch.float32}, torch.bfloat16, torch.float32),
    "fp32 norms in fp16": ({"model.norm.weight": torch.float32}, torch.float16, torch.float32),
    "fp64 that fp32 holds": ({}, torch.float64, torch.float32),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_no_dtype_is_rounded(case, one_rank, folder, tmp_path):
    others, most, expected = MIXTURES[case]
    change(folder, **{n: t.to(others.get(n, most)) for n, t in load_file(folder / SINGLE).items()})
    convert_hf_to_megatron(folder, tmp_path / "megatron")
    assert load_model(tmp_path / "megatron").config.params_dtype == expected
    assert verify_conversion(folder, tmp_path / "megatron").ok
    source = SafetensorsSource(folder)
    assert all(torch.equal(source.read(n).double(), t.double()) for n, t in load_file(folder / SINGLE).items())


def test_values_that_would_be_rounded_or_are_no_numbers_are_refused(one_rank, folder, tmp_path):
    right = load_file(folder / SINGLE)[DOWN]
    for value, message in [
        (right.double() / 3, f"tensor {DOWN} is float64 and holds values that float32 does not"),
        (right / 0, f"tensor {DOWN} holds NaN or infinite values"),
        (right.int(), f"tensor {DOWN} is stored as I32; weights are BF16"),
        (right.to(torch.float8_e4m3fn), f"{DOWN} is stored as F8_E4M3, but neither"),
    ]:
        change(folder, **{DOWN: value})
        with pytest.raises(ConfigError, match=message):
            convert_hf_to_megatron(folder, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# names


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_tables_that_old_versions_stored_are_passed_over(name, folder):
    change(folder, **{name: torch.ones(8)})
    assert name in SafetensorsSource(folder).stored


LOST = {
    "model.layers.0.self_attn.q_proj.bias": "1 tensors that its configuration does not ask for .*q_proj.bias.* with biases",
    "model.layers.3.input_layernorm.weight": "configuration has 3 layers, the weights have layer 3; correct num_hidden_layers",
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": "they belong to an adapter; merge it",
    "model.layers.0.self_attn.q_norm.weight": r"q_norm.weight\): correct the configuration if the model was trained with them",
    "model.layers.0.self_attn.k_scale": "scales of weights that are not stored as 8-bit values",
}


@pytest.mark.parametrize("name", LOST)
def test_tensors_that_would_be_lost_are_refused(name, folder):
    change(folder, **{name: torch.ones(3)})
    refused(folder, LOST[name])


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"holds an adapter \(adapter_config.json\), which would be lost: merge it")


# files


@pytest.fixture
def shards(folder):
    """The same model in shards, with an index."""
    tiny_hf_model("llama").save_pretrained(folder.parent / "shards", max_shard_size="60KB")
    return folder.parent / "shards"


def test_single_file_beside_a_stale_index_matches_transformers(folder, shards, caplog):
    change(folder, **{DOWN: torch.randn(48, 112)})
    shutil.copy(folder / SINGLE, shards / SINGLE)
    with caplog.at_level(logging.WARNING, logger="megatron_hylo.convert"):
        source = SafetensorsSource(shards)
    assert "read is model.safetensors, as transformers does; not read: model-00001-of" in caplog.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shards).state_dict()
    assert torch.equal(source.read(DOWN), theirs[DOWN]) and torch.equal(source.read(DOWN), load_file(folder / SINGLE)[DOWN])


def test_index_entries_that_nobody_needs_are_passed_over_as_by_transformers(shards):
    index = json.loads((shards / INDEX).read_text())
    some = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = some
    (shards / INDEX).write_text(json.dumps(index))
    source, theirs = SafetensorsSource(shards), transformers.AutoModelForCausalLM.from_pretrained(shards).state_dict()
    assert all(torch.equal(source.read(name), theirs[name]) for name in tensor_names(source.config))


def test_shards_that_contradict_each_other_are_refused(shards):
    files = sorted(shards.glob("model-*.safetensors"))
    last, first = load_file(files[-1]), load_file(files[0])
    save_file(last | {EMBEDDING: torch.zeros(160, 48)}, files[-1], metadata={"format": "pt"})
    refused(shards, f"tensor {EMBEDDING} is in both {files[0].name} and {files[-1].name}; only one can count")
    save_file(last | {"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}, files[-1], metadata={"format": "pt"})
    refused(shards, "the weights have layer 7")  # transformers reads what shards hold, whatever the index says
    save_file(last, files[-1], metadata={"format": "pt"})
    save_file(first, shards / "model-00009-of-00009.safetensors", metadata={"format": "pt"})
    refused(shards, "model-00009-of-00009.safetensors is not named by model.safetensors.index.json")
    (shards / "model-00009-of-00009.safetensors").unlink()
    (shards / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    refused(shards, "'../model.safetensors', which is not a file of the folder")
    (shards / INDEX).write_text("{}")
    refused(shards, "is not an index of shards")


def test_other_weight_files_are_named_with_what_to_do(folder):
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    refused(folder, "it has no weights; if its download was interrupted, the same `hf download` command completes it")
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(
        folder, r"only safetensors checkpoints are read, not pytorch_model.bin: let transformers write one, AutoModel.*save_pre"
    )
    save_file(tensors, folder / "consolidated.safetensors")
    refused(folder, "not consolidated.safetensors")
    (folder / SINGLE).write_bytes(b"")
    refused(folder, "is corrupt or cut short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "consolidated.safetensors"}))
    refused(folder, "transformers_weights 'consolidated.safetensors'; read are model.safetensors")
