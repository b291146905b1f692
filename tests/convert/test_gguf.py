"""GGUF files: logits against the transformers model that the file was written from; RoPE against the file's own data."""

import gguf
import pytest
import torch
import transformers

from megatron_hylo.config import ConfigError, RopeScaling
from megatron_hylo.convert import gguf_reader
from megatron_hylo.convert.gguf_reader import GgufSource
from megatron_hylo.convert.gguf_rope import rope_from_gguf
from megatron_hylo.convert.hf_reader import load_transformers_model
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.io.gguf_file import gguf_token_ids, open_gguf, parsed_once
from megatron_hylo.kernels.rope import rope_frequencies
from megatron_hylo.models.checkpoint import load_model
from tests.conftest import tiny_hf_model
from tests.convert.gguf_files import llama3_factors, write_gguf

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
SHORT = LLAMA3 | {"original_max_position_embeddings": 40, "low_freq_factor": 0.5, "high_freq_factor": 16.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
CASES = {  # family, changes to its configuration, keys of the file, whether rope_freqs.weight is there
    "llama": ("llama", {}, {}, False),
    "llama untied, rope_freqs of Llama 3": ("llama", {"rope_parameters": SHORT, "tied": False}, {}, True),
    "llama yarn": ("llama", {"rope_parameters": YARN}, YARN_KEYS, False),
    "llama yarn with betas": (
        "llama",
        {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 1.0},
        False,
    ),
    "llama linear": ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, False),
    "llama linear without a type": ("llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}, False),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN, "head_dim": 8}, YARN_KEYS, False),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN, "tied": False}, YARN_KEYS, False),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(120)[None] % 160).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_transformers_model_that_was_written(case: str, one_rank, tmp_path) -> None:
    """Both readers: ours by way of Megatron, and transformers' with the configuration that ours gives it."""
    family, changes, keys, has_factors = CASES[case]
    source = tiny_hf_model(family, **changes)
    factors = {"rope_freqs.weight": llama3_factors(changes["rope_parameters"], 16)} if has_factors else {}
    file = write_gguf(tmp_path / "model.gguf", source, keys, factors)
    convert_hf_to_megatron(file, tmp_path / "megatron")
    model = load_model(tmp_path / "megatron", params_dtype=torch.float32, backend="local").eval()
    with torch.no_grad():
        ours = model.logits(model((torch.arange(120)[None] % 160).to(one_rank))).cpu()
    expected = logits(source)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(load_transformers_model(file)), expected, rtol=0, atol=2e-5)
    assert verify_conversion(file, tmp_path / "megatron").ok


@pytest.mark.parametrize("rope", [LLAMA3, LLAMA3 | {"factor": 32.0}, SHORT], ids=["3.1", "3.2", "other numbers"])
@pytest.mark.parametrize("dim", [64, 128])
def test_llama3_parameters_are_recovered_from_rope_freqs(rope: dict, dim: int) -> None:
    factors = llama3_factors(rope, dim)
    base, scaling = rope_from_gguf({"rope.freq_base": rope["rope_theta"]}, factors, dim, 131072)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    torch.testing.assert_close(rope_frequencies(dim, base, scaling).double(), plain / factors.double(), rtol=1e-5, atol=0)
    found = (scaling.factor, scaling.low_freq_factor / scaling.original_max_position_embeddings,
             scaling.high_freq_factor / scaling.original_max_position_embeddings)  # fmt: skip
    wanted = (rope["factor"], *(rope[f"{n}_freq_factor"] / rope["original_max_position_embeddings"] for n in ("low", "high")))
    assert found == pytest.approx(wanted, rel=1e-3)
    if rope is not SHORT:  # the numbers of released models come back as they are
        assert (scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor) == (8192, 1.0, 4.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_transformers_reads(family: str, tmp_path) -> None:
    """Quantised ones, bit for bit: transformers has its own mapping of names and its own order of Llama's rows."""
    q8 = gguf.GGMLQuantizationType.Q8_0
    source = tiny_hf_model(family, tied=False, hidden_size=96, intermediate_size=160)
    file = write_gguf(tmp_path / "model.gguf", source, quantize=q8)
    theirs = load_transformers_model(file).state_dict()
    ours = GgufSource(file)
    assert set(ours._stored) == set(theirs)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in theirs.items())
    assert not torch.equal(theirs["model.embed_tokens.weight"], source.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "rope.scaling.type 'longrope' is not supported"),
        (YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor 0.5"),
        (YARN_KEYS | {"rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor 0.5"),
        (YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier 0.5"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8 is not supported; heads have 16 channels"),
        ({"attention.value_length": 8}, "attention.value_length 8"),
        ({"attention.sliding_window": 64}, "llama.attention.sliding_window 64 is not supported"),
        ({"attention.scale": 0.5}, "llama.attention.scale 0.5"),
        ({"logit_scale": 8.0}, "llama.logit_scale 8.0"),
        ({"expert_count": 8}, "llama.expert_count 8"),
        ({"attention.head_count": [6, 6, 3]}, "layers with different llama.attention.head_count"),
        ({"my_setting": 1}, "llama.my_setting 1 is not known here"),
        ({"/split.count": 3}, "one of 3 parts; merge them"),
        ({"/general.type": "adapter"}, "holds a adapter, not a model"),
    ],
)
def test_keys_that_would_change_the_model_are_refused_by_name(keys: dict, message: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        GgufSource(write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), keys))


def test_keys_that_change_nothing_are_accepted(tmp_path) -> None:
    keys = {"expert_count": 0, "attention.sliding_window": 128, "attention.scale": 0.25, "logit_scale": 1.0, "pooling_type": 0,
            "attention.head_count": [6, 6, 6], "tensor_data_layout": "Meta AI original pth", "/general.type": "model",
            "rope.scaling.type": "none", "rope.scaling.factor": 4.0, "/mradermacher.quantize_version": "2"}  # fmt: skip
    ones = {"rope_freqs.weight": torch.ones(8)}
    source = GgufSource(write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), keys, ones))
    assert source.config == GgufSource(write_gguf(tmp_path / "plain.gguf", tiny_hf_model("llama"))).config


@pytest.mark.parametrize(
    ("tensors", "without", "keys", "message"),
    [
        ({"blk.0.attn_q.bias": torch.ones(96)}, (), {}, "tensor blk.0.attn_q.bias is not part of a llama"),
        ({"rope_factors_long.weight": torch.ones(8)}, (), {}, "tensor rope_factors_long.weight is not part"),
        ({"rope_freqs.weight": torch.linspace(1, 9, 8)}, (), {}, "no parameters of Llama 3's RoPE scaling give its rope_freqs"),
        ({"rope_freqs.weight": torch.full((4,), 2.0)}, (), {}, r"8 positive numbers, got shape \[4\]"),
        ({"rope_freqs.weight": llama3_factors(SHORT, 16)}, (), YARN_KEYS, "together with rope.scaling.type 'yarn'"),
        ({}, ("blk.1.ffn_up.weight",), {}, "has no tensor blk.1.ffn_up.weight"),
        ({}, ("context_length",), {}, "lacks the key llama.context_length"),
        (
            {},
            (),
            {"feed_forward_length": 128},
            r"blk.0.ffn_gate.weight has shape \[112, 48\], its description asks for \[128, 48\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tensors, without, keys, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        GgufSource(write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), keys, tensors, without))


def test_other_architectures_and_broken_files_are_refused(tmp_path) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"))
    data = file.read_bytes()
    for name, content in (("cut.gguf", data[: len(data) // 2]), ("text.gguf", b"this is no model file"), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} is not a whole GGUF file"):
            GgufSource(tmp_path / name)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="unknown architecture: model_type 'gemma9'"):
        GgufSource(tmp_path / "other.gguf")


def test_frequencies_other_than_the_files_are_found(tmp_path, monkeypatch) -> None:
    """The comparison in load_transformers_model does not rely on the reader having taken the scaling over."""
    source = tiny_hf_model("llama", rope_parameters=SHORT)
    file = write_gguf(tmp_path / "model.gguf", source, tensors={"rope_freqs.weight": llama3_factors(SHORT, 16)})
    load_transformers_model(file)
    monkeypatch.setattr(gguf_reader, "rope_from_gguf", lambda *_: (SHORT["rope_theta"], RopeScaling()))
    with pytest.raises(ConfigError, match="transformers turns channels with frequencies"):
        load_transformers_model(file)


def test_all_tokens_that_end_a_turn_are_kept(tmp_path) -> None:
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 2, "padding": 3}
    keys = {f"/tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    file = write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), keys)
    assert gguf_token_ids(file) == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}
    assert GgufSource(file).hf_config["eos_token_id"] == [2, 5]
    assert isinstance(load_transformers_model(file), transformers.LlamaForCausalLM)


def test_quick_reader_matches_the_gguf_packages_own(tmp_path) -> None:
    """All fields, part by part, of a file with a vocabulary, and its tensors; a file that ends in the vocabulary is refused."""
    keys = {
        "/tokenizer.ggml.tokens": ["a", "", "ß€", *(f"token {n}" for n in range(300))], "/tokenizer.ggml.scores": [0.5, -1.25],
        "/tokenizer.ggml.token_type": [1, 3, 1, 6], "/tokenizer.ggml.pairs": [[1, 2], [3, 4]], "/general.tags": ["x"],
        "/general.flags": [True, False],
    }  # fmt: skip
    file = write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), keys)
    theirs, ours = gguf.GGUFReader(file), open_gguf(file)
    assert list(ours.fields) == list(theirs.fields) and type(ours) is not type(theirs)
    for name, field in theirs.fields.items():
        found = ours.fields[name]
        assert (found.types, found.data, found.offset) == (field.types, field.data, field.offset), name
        assert [(part.dtype, part.tolist()) for part in found.parts] == [(p.dtype, p.tolist()) for p in field.parts], name
        assert name == "tokenizer.ggml.pairs" or found.contents() == field.contents()
    assert [(t.name, t.data_offset, t.data.tobytes()) for t in ours.tensors] == [
        (t.name, t.data_offset, t.data.tobytes()) for t in theirs.tensors
    ]
    for name in ("tokens", "scores"):
        cut = tmp_path / f"{name}.gguf"
        cut.write_bytes(file.read_bytes()[: theirs.fields[f"tokenizer.ggml.{name}"].offset + 52])
        with pytest.raises(ConfigError, match=r"not a whole GGUF file \(an array ends at byte"):
            open_gguf(cut)


def test_transformers_parses_no_header_of_its_own(tmp_path, monkeypatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"))
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    source = GgufSource(file)
    monkeypatch.setattr(reader, "_build_fields", lambda *_: pytest.fail("parsed again"))
    with pytest.raises(ZeroDivisionError), parsed_once():
        assert gguf.GGUFReader(str(file)).tensors[0].name in source._stored.values()
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        raise ZeroDivisionError
    load_transformers_model(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
