"""config.json of a teacher: RoPE and sizes against transformers' own classes; every key used, harmless, or named."""

import copy
import dataclasses
import json
import logging

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_hylo.config import ConfigError, RopeScaling, interleaved
from megatron_hylo.convert import hf_keys
from megatron_hylo.convert.hf_config import hf_config_from_model, model_config_from_hf
from megatron_hylo.convert.hf_rope import rope_from_hf, rope_to_hf
from megatron_hylo.kernels.rope import rope_frequencies

CLASSES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
           "qwen3_moe": transformers.Qwen3MoeConfig}  # fmt: skip
SIZES = {"vocab_size": 160, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip
BASE = {"rope_type": "default", "rope_theta": 1e6}
READ_ALIKE = {
    "nothing": {},
    "theta": {"rope_theta": 5e5},
    "rope_parameters": {"rope_parameters": BASE},
    "type in place of rope_type": {"rope_parameters": {"rope_theta": 5e5, "type": "linear", "factor": 2.0}},
    "theta beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    "two thetas": {"rope_parameters": BASE, "rope_theta": 5e5},
    "rope_scaling wins": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": YARN},
    "rope_scaling wins with its theta": {"rope_parameters": BASE, "rope_scaling": YARN | {"rope_theta": 1e6}},
    "rope_scaling wins, theta beside": {"rope_parameters": BASE, "rope_scaling": YARN, "rope_theta": 1e6},
    "empty rope_scaling": {"rope_parameters": BASE, "rope_scaling": {}},
    "null rope_scaling": {"rope_parameters": BASE, "rope_scaling": None},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e6},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama3 without original": {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}, "rope_theta": 5e5},
    "llama3 with original at the top": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 4096},
    "yarn": {"rope_scaling": YARN},
    "yarn without original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn with original at the top": {"rope_scaling": YARN, "original_max_position_embeddings": 512},
    "yarn whose factor is another than the lengths' ratio": {"rope_scaling": YARN | {"factor": 3.0}},
    "yarn with factor null": {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 1024}},
    "yarn not truncated": {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 1e6},
    "yarn truncated null": {"rope_scaling": YARN | {"truncate": None}, "rope_theta": 1e6},
    "yarn betas": {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
    "yarn betas null and 0": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
    "yarn attention_factor": {"rope_scaling": YARN | {"attention_factor": 0.9}},
    "yarn mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    "yarn one mscale": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn mscale and attention_factor": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 2}},
}


def transformers_rope(values: dict) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor of the module that transformers makes of a config.json."""
    config = transformers.LlamaConfig.from_dict(copy.deepcopy(values))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def assert_same_rope(values: dict, expected: tuple[torch.Tensor, float]) -> None:
    base, scaling = rope_from_hf(copy.deepcopy(values))
    torch.testing.assert_close(rope_frequencies(values["head_dim"], base, scaling), expected[0], rtol=1e-6, atol=0)
    assert scaling.cos_sin_multiplier == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("case", READ_ALIKE)
def test_rope_of_a_config_is_that_of_transformers(case: str) -> None:
    values = SIZES | READ_ALIKE[case]
    assert_same_rope(values, transformers_rope(values))


@pytest.mark.parametrize("case", READ_ALIKE)
def test_rope_that_is_written_is_read_alike_by_transformers_and_by_us(case: str) -> None:
    """All spellings together, and each of them alone: transformers 4 reads rope_scaling, 5 may read rope_parameters."""
    expected = transformers_rope(SIZES | READ_ALIKE[case])
    written = rope_to_hf(*rope_from_hf(SIZES | READ_ALIKE[case]))
    for keys in (written, ["rope_parameters"], ["rope_theta", "rope_scaling"]):
        values = SIZES | {key: written[key] for key in keys}
        assert_same_rope(values, expected)
        found, multiplier = transformers_rope(values)
        assert torch.equal(found, transformers_rope(SIZES | written)[0]) and multiplier == pytest.approx(expected[1], rel=1e-12)


REFUSED_ALIKE = {  # transformers raises, too
    "theta null": ({"rope_theta": None}, "rope_theta is None"),
    "yarn without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "type yarn lacks factor"),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, "type linear lacks factor"),
    "llama3 without bounds": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "freq" not in k}},
        "lacks low_freq_factor, high_freq_factor",
    ),
    "original null": ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "embeddings is None"),
    "factor as text": ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'"),
    "unknown kind": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type 'su' is not supported; use default, linear"),
    "kind null": ({"rope_scaling": {"type": None, "factor": 2.0}}, "rope_type None"),
    "a list": ({"rope_scaling": [2.0]}, "one mapping"),
}
REFUSED = {
    "a kind of each layer type": ({"rope_parameters": {"full_attention": BASE, "sliding_attention": BASE}}, "one mapping"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "longrope": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'longrope'"),
    "theta lost": ({"rope_parameters": BASE, "rope_scaling": YARN}, "would use rope_theta 10000 and not its 1000000.0"),
    "two kinds": ({"rope_scaling": YARN | {"type": "linear"}}, "'yarn' and type 'linear'"),
    "some channels": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "some channels, inside": ({"rope_parameters": BASE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    "factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor >= 1, got 0.5"),
}


@pytest.mark.parametrize("case", [*REFUSED_ALIKE, *REFUSED])
def test_rope_that_cannot_be_taken_over_is_refused(case: str) -> None:
    change, message = (REFUSED_ALIKE | REFUSED)[case]
    with pytest.raises(ConfigError, match=message):
        rope_from_hf(SIZES | change)
    if case in REFUSED_ALIKE:
        with pytest.raises(Exception):  # noqa: B017 each kind in its own way
            transformers_rope(SIZES | change)


FAMILY_CASES = [
    *((family, {}, ()) for family in CLASSES),
    ("llama", {}, ("num_key_value_heads", "head_dim", "max_position_embeddings")),
    ("llama", {"num_key_value_heads": None, "head_dim": None}, ()),
    ("qwen2", {"num_attention_heads": 64, "hidden_size": 1024}, ("num_key_value_heads", "head_dim", "max_position_embeddings")),
    ("qwen3", {"num_attention_heads": 64}, ("num_key_value_heads", "head_dim", "max_position_embeddings")),
    ("qwen3", {"num_key_value_heads": None, "hidden_act": "swish", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, ()),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, ()),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, ()),
    ("qwen2", {"layer_types": ["full_attention"] * 2, "sliding_window": 8, "attention_bias": False}, ()),
    (
        "qwen3_moe",
        {"num_attention_heads": 64, "hidden_size": 1024},
        ("num_key_value_heads", "head_dim", "max_position_embeddings"),
    ),
]


@pytest.mark.parametrize(("family", "changes", "without"), FAMILY_CASES)
def test_sizes_and_defaults_are_those_of_transformers(family: str, changes: dict, without: tuple) -> None:
    values = {k: v for k, v in (SIZES | {"model_type": family} | changes).items() if k not in without}
    config = model_config_from_hf(copy.deepcopy(values))
    theirs = CLASSES[family].from_dict(copy.deepcopy(values))
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert set(getattr(theirs, "layer_types", ["full_attention"])) == {"full_attention"}
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (
        theirs.num_attention_heads, theirs.num_key_value_heads, head_dim,
    )  # fmt: skip
    assert (config.hidden_size, config.ffn_hidden_size, config.num_hidden_layers, config.vocab_size) == (
        theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.vocab_size,
    )  # fmt: skip
    assert (config.max_position_embeddings, config.layernorm_epsilon, config.untie_embeddings_and_output_weights) == (
        theirs.max_position_embeddings, theirs.rms_norm_eps, not theirs.tie_word_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"sliding_window": 4096}, "sliding_window is 4096, which a llama does not have; set model_type to mistral"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "class of a llama does not read"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer 1 is 'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "1 entries, num_hidden_layers is 2"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "there is no window; set use_sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "sliding_window is 0"),
        ("mistral", {"sliding_window": "64"}, "sliding_window is '64'; it must be a whole number"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None; it must be"),
        ("qwen2", {"layer_types": 7}, "layer_types is 7; it must be a list"),
        (
            "mistral",
            {"sliding_window": 4096, "layer_types": ["full_attention"] * 2},
            "it would take sliding_window 4096 in all",
        ),
        ("smollm3", {}, "every fourth of its layers has no rotary positions"),
        ("gemma3_text", {}, "five of six of its layers attend to a sliding window"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 3}}}, "per_layer_config"),
        ("llama", {"num_local_experts": 8}, "num_local_experts 8"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias True"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            "class of a qwen3_moe does not read",
        ),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_local_experts 4 and num_experts 8 differ"),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 8}, "moe_router_topk 8 is more than num_moe_experts 4"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "its router learns nothing"),
        ("qwen3_moe", {"decoder_sparse_step": 3}, "leave no layer of 2 with experts; such a model is of model_type qwen3"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]; it must list layers from 0 to 1"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ("qwen2_moe", {}, "an expert that all tokens share"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only language models"),
        ("llama", {"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        ("llama", {"num_attention_heads": 6.0}, "num_attention_heads is 6.0"),
        ("llama", {"head_dim": 0}, "head_dim is 0"),
        ("qwen3", {"head_dim": None}, "head_dim is None"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(SIZES | {"model_type": family} | changes)


def test_a_mistral_without_a_window_is_a_llama_with_another_name() -> None:
    values = SIZES | {"model_type": "mistral", "sliding_window": None}
    config = model_config_from_hf(values)
    assert config.replace(model_family="llama") == model_config_from_hf(SIZES | {"model_type": "llama", "rms_norm_eps": 1e-6})
    assert model_config_from_hf(values | {"sliding_window": 8192}) == config  # as long as all positions
    written = hf_config_from_model(config, "float32")
    assert written["sliding_window"] is None and written["architectures"] == ["MistralForCausalLM"]


WINDOWS = [
    ("mistral", {}, "WW", 4096),
    ("mistral", {"sliding_window": 100}, "WW", 100),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, "*W", 100),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "WW", 4096),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, "W*", 4096),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 28}, "WW", 100),
]


@pytest.mark.parametrize(("family", "changes", "mixers", "window"), WINDOWS)
def test_windows_and_their_layers_are_those_of_transformers(family: str, changes: dict, mixers: str, window: int) -> None:
    """The class of transformers has the same window in the same layers, and again after the way back."""
    values = SIZES | {"model_type": family} | changes
    config = model_config_from_hf(copy.deepcopy(values))
    assert (config.mixers, config.attention_window) == (mixers, window)
    written = hf_config_from_model(config, "float32")
    assert model_config_from_hf(copy.deepcopy(written)) == config
    kinds = {"*": "full_attention", "W": "sliding_attention"}
    for given in (values, written):
        theirs = (CLASSES | {"mistral": transformers.MistralConfig})[family].from_dict(copy.deepcopy(given))
        assert theirs.sliding_window == window
        assert getattr(theirs, "layer_types", None) in (None, [kinds[symbol] for symbol in mixers])


@pytest.mark.parametrize(("family", "mixers"), [("llama", "WW"), ("mistral", "W*"), ("qwen3_moe", "*W")])
def test_windows_that_a_familys_class_cannot_have_are_written_as_our_own(family: str, mixers: str) -> None:
    config = model_config_from_hf(SIZES | {"model_type": family, "sliding_window": None})
    pattern = interleaved(mixers, config.mlps)
    written = hf_config_from_model(config.replace(hybrid_layer_pattern=pattern, attention_window=5), "float32")
    assert written["model_type"] == "hylo" and written["hylo"]["attention_window"] == 5


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="lacks intermediate_size"):
        model_config_from_hf({k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"model_type": "llama"})


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_of_transformers_class_is_classified(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """A field that a later transformers adds must be looked at, and put among the used or the harmless ones."""
    known = hf_keys.USED | hf_keys.HARMLESS | set(hf_keys.NEUTRAL)
    config = CLASSES[family](**SIZES)
    assert {f.name for f in dataclasses.fields(config)} | set(config.to_dict()) <= known
    values = config.to_dict() | {"model_type": family, "attention_dropout": 0.1, "pretraining_tp": 2, "eos_token_id": [1, 2]}
    with caplog.at_level(logging.WARNING):
        model_config_from_hf(values)
        assert not caplog.records
        model_config_from_hf(values | {"my_setting": 3})
    assert "ignored, as transformers'" in caplog.text and "my_setting" in caplog.text


def test_every_key_of_transformers_4_is_classified(transformers4) -> None:
    program = """
import json, transformers
names = ("LlamaConfig", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig")
print(json.dumps({name: sorted(getattr(transformers, name)().to_dict()) for name in names}))
"""
    known = hf_keys.USED | hf_keys.HARMLESS | set(hf_keys.NEUTRAL)
    for name, keys in json.loads(transformers4(program)).items():
        assert not set(keys) - known, name


def test_a_hybrid_whose_standard_fields_contradict_its_description_is_refused() -> None:
    config = model_config_from_hf(SIZES | {"model_type": "llama"})
    values = hf_config_from_model(config.replace(hybrid_layer_pattern="G-*-", linear_num_heads=2, linear_key_head_dim=18,
                                                 linear_value_head_dim=36), "float32")  # fmt: skip
    assert model_config_from_hf(values).hybrid_layer_pattern == "G-*-"
    with pytest.raises(ConfigError, match="vocab_size is 200, its description under hylo says 160"):
        model_config_from_hf(values | {"vocab_size": 200})


def test_linear_frequencies_match_transformers() -> None:
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"))
    assert torch.equal(rope_frequencies(64, 5e5, RopeScaling("linear", 4.0)), expected)


def test_experts_and_their_layers_are_those_of_transformers() -> None:
    """Defaults too: 128 experts of which 8, not normalised, in every layer."""
    small = {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 40}
    for changes in ({}, small, small | {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3]}):
        values = SIZES | {"model_type": "qwen3_moe", "hidden_size": 48, "head_dim": 8} | changes
        config, theirs = model_config_from_hf(values), transformers.Qwen3MoeConfig.from_dict(copy.deepcopy(values))
        assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size, config.moe_router_pre_softmax) == (
            theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size, not theirs.norm_topk_prob,
        )  # fmt: skip
        with torch.device("meta"):
            layers = transformers.AutoModelForCausalLM.from_config(theirs).model.layers
        assert config.mlps == "".join("E" if type(layer.mlp).__name__ == "Qwen3MoeSparseMoeBlock" else "-" for layer in layers)
        assert model_config_from_hf(hf_config_from_model(config, "float32")) == config
