"""Hugging Face config.json <-> ModelConfig: one small adapter a family, registered by its model_type.

hf_keys.py says which keys of a config.json are read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_hylo.config import ConfigError, ModelConfig, from_dict, interleaved
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, WINDOW_SYMBOL
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.convert.hf_keys import SIZES, TOKEN_IDS, check_keys
from megatron_hylo.convert.hf_rope import rope_from_hf, rope_to_hf

HYLO_MODEL_TYPE = "hylo"
MISTRAL_POSITIONS = 131072  # where config.json does not say
TRANSFORMERS_VERSIONS = ("4.57.1", "5.17.0")  # oldest and newest that tests run; 4.51 to 4.56 ignore the factor of YaRN
_KINDS = {"full_attention": ATTENTION_SYMBOL, "sliding_attention": WINDOW_SYMBOL}  # of layer_types
_TO_MODEL_CONFIG: dict[str, Callable[[dict[str, Any]], ModelConfig]] = {}
# Families close to those that are converted, and what they compute that a converted model would not.
_OTHERWISE = {
    "smollm3": "every fourth of its layers has no rotary positions (no_rope_layers)",
    "ministral": "most of its layers attend to a sliding window",
    "ministral3": "it scales queries by their position (llama_4_scaling_beta)",
    "gemma3": "five of six of its layers attend to a sliding window, and its norms and embedding are scaled",
    "gemma3_text": "five of six of its layers attend to a sliding window, and its norms and embedding are scaled",
    "gemma2": "every second of its layers attends to a sliding window, and its logits are capped",
    "mixtral": "its experts are stored under other names",
    "qwen2_moe": "each of its layers has an expert that all tokens share",
    "phi3": "its projections are fused, and some of its channels do not turn",
}


def register_family(model_type: str) -> Callable:
    """Register `function(config.json as a dict) -> ModelConfig` for a model_type."""

    def add(function: Callable[[dict[str, Any]], ModelConfig]) -> Callable:
        """Register the function; returns it."""
        _TO_MODEL_CONFIG[model_type] = function
        return function

    return add


def model_config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """Build the ModelConfig of a Hugging Face config.

    Args:
        values: config.json as a mapping.

    Raises:
        ConfigError: an architecture this project does not convert, or a feature of it.
    """
    model_type = values.get("model_type")
    if model_type not in _TO_MODEL_CONFIG:
        architectures, supported = (
            ", ".join(values.get("architectures") or ["no architectures"]),
            ", ".join(sorted(_TO_MODEL_CONFIG)),
        )
        if why := _OTHERWISE.get(str(model_type)):
            raise ConfigError(f"model_type {model_type!r} ({architectures}) is not converted: {why}; supported: {supported}")
        raise ConfigError(f"unknown architecture: model_type {model_type!r} ({architectures}); supported: {supported}")
    return _TO_MODEL_CONFIG[model_type](values)


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}; it must be true or false")
    return value


def _windows(values: Mapping[str, Any], layers: int) -> tuple[str, int]:
    """Mixers of the layers, `W` those with a sliding window, and its tokens (0 where none has one), by the families' rules.

    Qwen's rule: layers from max_window_layers on, or layer_types; Qwen3-MoE's and Mistral's: all layers, Mistral's by default
    with a window of 4096 tokens. A Mistral whose window is as long as its positions has none.

    Raises:
        ConfigError: layers of another kind, windows that transformers' class would not apply.
    """
    kinds, family = values.get("layer_types"), values["model_type"]
    window = values.get("sliding_window", None if family == "llama" else 4096)
    if family not in ("llama", "mistral") and not _flag(values, "use_sliding_window"):
        window = None
    window = None if window is None else _size({"sliding_window": window}, "sliding_window")
    if family == "mistral" and window is not None and window >= values.get("max_position_embeddings", MISTRAL_POSITIONS):
        window = None
    first = values.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    if type(first) is not int:
        raise ConfigError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
    if not isinstance(kinds, list | None):
        raise ConfigError(f"config.json: layer_types is {kinds!r}; it must be a list of one kind a layer")
    rule = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    kinds = rule if kinds is None else kinds
    if len(kinds) != layers:
        raise ConfigError(f"config.json: layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    if other := [(i, kind) for i, kind in enumerate(kinds) if kind not in _KINDS]:
        raise ConfigError(f"config.json: layer {other[0][0]} is {other[0][1]!r}; only {' and '.join(_KINDS)} are supported")
    if kinds != rule and family not in ("qwen2", "qwen3"):
        raise ConfigError(
            f"config.json: layer_types is {kinds}, which transformers' class of a {family} does not read: it would take "
            f"sliding_window {window} in {'all' if window else 'no'} layers; leave layer_types out, or set the window to null"
        )
    slides = "sliding_attention" in kinds
    if slides and family == "llama":
        raise ConfigError(
            f"config.json: sliding_window is {window}, which a llama does not have; set model_type to mistral if the weights "
            "are, or leave it out"
        )
    if slides and window is None:
        raise ConfigError(
            "config.json: layer_types has sliding_attention, but there is no window; set use_sliding_window and "
            "sliding_window, or leave layer_types out"
        )
    symbols = "".join(_KINDS[kind] for kind in kinds)
    return symbols, window if slides and window is not None else 0


def _backbone(values: dict[str, Any], ignored: tuple[str, ...], defaults: Mapping[str, int], **family: Any) -> ModelConfig:
    """Build a ModelConfig from the keys that all families share.

    Args:
        values: config.json.
        ignored: see `check_keys`.
        defaults: transformers' values of what may be missing: max_position_embeddings, and num_key_value_heads and head_dim
            where they do not follow from other sizes.
        family: fields of ModelConfig.
    """
    check_keys(values, ignored)
    if missing := [key for key in SIZES if key not in values]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}; the file is incomplete: download it again")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise ConfigError(f"hidden_act {values['hidden_act']!r} is not supported; only silu")
    heads, hidden = _size(values, "num_attention_heads"), _size(values, "hidden_size")
    layers = _size(values, "num_hidden_layers")
    mixers, window = _windows(values, layers)
    if values.get("num_key_value_heads", 0) is None:
        values = values | {"num_key_value_heads": heads}
    if values.get("head_dim", 0) is None and "head_dim" not in defaults:
        values = {key: value for key, value in values.items() if key != "head_dim"}
    values = {"max_position_embeddings": defaults["max_position_embeddings"]} | values
    epsilon = values.get("rms_norm_eps", 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon >= 0:
        raise ConfigError(f"config.json: rms_norm_eps is {epsilon!r}; it must be a number of at least 0")
    base, scaling = rope_from_hf(values)
    return ModelConfig(
        hybrid_layer_pattern=interleaved(mixers, "-" * layers),
        attention_window=window,
        hidden_size=hidden,
        ffn_hidden_size=_size(values, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_size(values, "num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        kv_channels=_size(values, "head_dim", defaults.get("head_dim", hidden // heads)),
        vocab_size=_size(values, "vocab_size"),
        max_position_embeddings=_size(values, "max_position_embeddings"),
        layernorm_epsilon=float(epsilon),
        untie_embeddings_and_output_weights=not _flag(values, "tie_word_embeddings"),
        rotary_base=base,
        rope_scaling=scaling,
        **family,
    )


@register_family("llama")
def _llama(values: dict[str, Any]) -> ModelConfig:
    return _backbone(values, (), {"max_position_embeddings": 2048}, model_family="llama")


@register_family("mistral")
def _mistral(values: dict[str, Any]) -> ModelConfig:
    defaults = {"max_position_embeddings": MISTRAL_POSITIONS, "num_key_value_heads": 8}
    return _backbone(values, (), defaults, model_family="mistral")


@register_family("qwen2")
def _qwen2(values: dict[str, Any]) -> ModelConfig:
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    return _backbone(values, ("attention_bias", "mlp_bias"), defaults, model_family="qwen2", add_qkv_bias=True)


@register_family("qwen3")
def _qwen3(values: dict[str, Any]) -> ModelConfig:
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
    return _backbone(values, ("mlp_bias",), defaults, model_family="qwen3", qk_layernorm=True)


@register_family("qwen3_moe")
def _qwen3_moe(values: dict[str, Any]) -> ModelConfig:
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 4}
    names = ("num_local_experts", "num_experts")  # of transformers 5, and of 4
    counts = {key: values[key] for key in names if values.get(key) is not None}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"config.json: num_local_experts {counts[names[0]]!r} and num_experts {counts[names[1]]!r} differ")
    dense = _backbone(values, ("mlp_bias", *names), defaults, model_family="qwen3_moe", qk_layernorm=True)
    sizes = {"num_experts": next(iter(counts.values()), 128)} | values
    pattern = interleaved(dense.mixers, _sparse_layers(values, dense.num_hidden_layers))
    return dense.replace(
        hybrid_layer_pattern=pattern,
        num_moe_experts=_size(sizes, "num_experts"),
        moe_ffn_hidden_size=_size(values, "moe_intermediate_size", 768),
        moe_router_topk=_size(values, "num_experts_per_tok", 8),
        moe_router_pre_softmax=not _flag(values, "norm_topk_prob"),
    )


def _sparse_layers(values: Mapping[str, Any], layers: int) -> str:
    """MLP symbols by transformers' rule: every decoder_sparse_step-th layer has experts, but those in mlp_only_layers."""
    step, dense = _size(values, "decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < layers for i in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}; it must list layers from 0 to {layers - 1}")
    mlps = "".join("E" if i not in dense and (i + 1) % step == 0 else "-" for i in range(layers))
    if "E" not in mlps:
        raise ConfigError(
            f"config.json: decoder_sparse_step {step} and mlp_only_layers {dense} leave no layer of {layers} with experts; "
            "such a model is of model_type qwen3"
        )
    return mlps


@register_family(HYLO_MODEL_TYPE)
def _hylo(values: dict[str, Any]) -> ModelConfig:
    if not isinstance(values.get("hylo"), Mapping):
        raise ConfigError("config.json has model_type hylo and no description under the key hylo; export the model again")
    config = from_dict(ModelConfig, values["hylo"], "config.json: hylo")
    described = _shared(config)
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
        if values.get(key, described[key]) != described[key]:
            raise ConfigError(f"config.json: {key} is {values[key]!r}, its description under hylo says {described[key]!r}")
    return config


def _shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
    }


def is_own(config: ModelConfig) -> bool:
    """Whether a model's Hugging Face folder is of model_type "hylo", with its modelling code: no class of its family has it."""
    foreign = not config.is_transformer or config.rope_scaling.rope_type == "nope" or not _says_windows(config)
    return foreign or config.has_experts != (config.model_family == "qwen3_moe")


def hf_config_from_model(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Build config.json of a model: the base family's own where that knows all its mixers, else `model_type` "hylo".

    What transformers 4 and 5 spell differently is there twice: dtype, and the RoPE settings.

    Args:
        config: the model.
        dtype: "float32" or "bfloat16".
        token_ids: bos_token_id, eos_token_id (a number or a list), pad_token_id. Those that are not given are null: classes of
            transformers have defaults of their own (Llama: 1 and 2), which would end a generation at any word.
    """
    shared = _shared(config) | {"dtype": dtype, "torch_dtype": dtype}
    shared |= {name: (token_ids or {}).get(name) for name in TOKEN_IDS}
    if is_own(config):
        from megatron_hylo.hf.pretrained_hylo import AUTO_MAP  # brings torch and transformers

        return {
            "model_type": HYLO_MODEL_TYPE,
            "architectures": ["HyloForCausalLM"],
            "auto_map": AUTO_MAP,
            **shared,
            "hylo": config.to_dict(),
        }
    names = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
    }
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
        **_windows_to_hf(config),
        **(_experts_to_hf(config) if config.model_family == "qwen3_moe" else {}),
        **rope_to_hf(config.rotary_base, config.rope_scaling),
    }


def _says_windows(config: ModelConfig) -> bool:
    """Whether the base family's class can have a window in these layers and no others."""
    windowed = WINDOW_SYMBOL in config.mixers
    every = set(config.mixers) == {WINDOW_SYMBOL}
    if config.model_family == "mistral":
        return not windowed or (every and config.attention_window < config.max_position_embeddings)
    return not windowed or config.model_family in ("qwen2", "qwen3") or (every and config.model_family == "qwen3_moe")


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Keys of sliding windows: a Mistral's always, those of others where they have one."""
    window = config.attention_window if WINDOW_SYMBOL in config.mixers else None
    if config.model_family == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {}
    values: dict[str, Any] = {"use_sliding_window": True, "sliding_window": window}
    if config.model_family == "qwen3_moe":
        return values
    names = {symbol: kind for kind, symbol in _KINDS.items()}
    return values | {
        "max_window_layers": config.mixers.index(WINDOW_SYMBOL),
        "layer_types": [names[symbol] for symbol in config.mixers],
    }


def _experts_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "norm_topk_prob": not config.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, symbol in enumerate(config.mlps) if symbol != EXPERTS_SYMBOL],
    }
