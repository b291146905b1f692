"""config.json of Hugging Face <-> ModelConfig, one small adapter a family, registered by its model_type."""

from typing import Any, Callable

from megatron_hylo.config import ConfigError, ModelConfig, RopeScaling, from_dict

HYLO_MODEL_TYPE = "hylo"
TRANSFORMERS_VERSIONS = ("4.57.1", "5.17.0")  # oldest and newest that tests run; 4.51 to 4.56 ignore the factor of YaRN
_TO_MODEL_CONFIG: dict[str, Callable[[dict[str, Any]], ModelConfig]] = {}


def register_family(model_type: str) -> Callable:
    """Register `function(config.json as a dict) -> ModelConfig` for a model_type."""

    def add(function: Callable[[dict[str, Any]], ModelConfig]) -> Callable:
        _TO_MODEL_CONFIG[model_type] = function
        return function

    return add


def model_config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face config.

    Args:
        values: config.json as a mapping.

    Raises:
        ConfigError: an architecture this project does not convert, or a feature of it.
    """
    model_type = values.get("model_type")
    if model_type not in _TO_MODEL_CONFIG:
        architectures = ", ".join(values.get("architectures") or ["no architectures"])
        raise ConfigError(
            f"unknown architecture: model_type {model_type!r} ({architectures}); "
            f"supported: {', '.join(sorted(_TO_MODEL_CONFIG))}"
        )
    return _TO_MODEL_CONFIG[model_type](values)


def rope_from_hf(values: dict[str, Any]) -> tuple[float, RopeScaling]:
    """(rotary_base, scaling) out of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    base = float(rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind == "default":
        return base, RopeScaling()
    if kind not in ("llama3", "yarn"):
        raise ConfigError(f"rope_type {kind!r} is not supported; use default, llama3 or yarn")
    if rope.get("mscale_all_dim") not in (None, 0) or rope.get("mscale") not in (None, 1):
        raise ConfigError("YaRN with mscale or mscale_all_dim is not supported; give attention_factor instead")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    original = rope.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 0
    kept = {k: float(rope[k]) for k in keys if rope.get(k) is not None}
    return base, RopeScaling(kind, original_max_position_embeddings=int(original), **kept)


def rope_to_hf(base: float, scaling: RopeScaling) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them."""
    if scaling.rope_type == "none":
        return {"rope_type": "default", "rope_theta": base}
    values = {"rope_type": scaling.rope_type, "rope_theta": base, "factor": scaling.factor}
    values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        return values | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return values if scaling.attention_factor is None else values | {"attention_factor": scaling.attention_factor}


def _backbone(values: dict[str, Any], **family: Any) -> ModelConfig:
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {values['hidden_act']!r} is not supported; only silu")
    if values.get("use_sliding_window"):
        raise ConfigError("sliding-window attention is not supported; set use_sliding_window to false if it is unused")
    if values.get("mlp_bias"):
        raise ConfigError("mlp_bias true is not supported")
    base, scaling = rope_from_hf(values)
    heads = values["num_attention_heads"]
    return ModelConfig(
        hybrid_layer_pattern="*-" * values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        max_position_embeddings=values.get("max_position_embeddings", 8192),
        layernorm_epsilon=values.get("rms_norm_eps", 1e-6),
        untie_embeddings_and_output_weights=not values.get("tie_word_embeddings", False),
        rotary_base=base,
        rope_scaling=scaling,
        **family,
    )


@register_family("llama")
def _llama(values: dict[str, Any]) -> ModelConfig:
    if values.get("attention_bias"):
        raise ConfigError("attention_bias true is not supported for Llama (it would put a bias on o_proj)")
    return _backbone(values, model_family="llama")


@register_family("qwen2")
def _qwen2(values: dict[str, Any]) -> ModelConfig:
    return _backbone(values, model_family="qwen2", add_qkv_bias=True)


@register_family("qwen3")
def _qwen3(values: dict[str, Any]) -> ModelConfig:
    if values.get("attention_bias"):
        raise ConfigError("attention_bias true is not supported for Qwen3")
    return _backbone(values, model_family="qwen3", qk_layernorm=True)


@register_family(HYLO_MODEL_TYPE)
def _hylo(values: dict[str, Any]) -> ModelConfig:
    return from_dict(ModelConfig, values["hylo"], "config.json: hylo")


def hf_config_from_model(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model: the base family's own where every mixer is attention, else `model_type` "hylo".

    Args:
        config: the model.
        dtype: "float32" or "bfloat16".
    """
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "dtype": dtype,
    }
    if set(config.mixers) != {"*"}:
        auto = {"AutoConfig": "configuration_hylo.HyloConfig", "AutoModel": "modeling_hylo.HyloModel"}
        auto["AutoModelForCausalLM"] = "modeling_hylo.HyloForCausalLM"
        return {
            "model_type": HYLO_MODEL_TYPE,
            "architectures": ["HyloForCausalLM"],
            "auto_map": auto,
            **shared,
            "hylo": config.to_dict(),
        }
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "model_type": config.model_family,
        "architectures": [names[config.model_family]],
        **shared,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_parameters": rope_to_hf(config.rotary_base, config.rope_scaling),
    }
