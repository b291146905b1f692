"""Rotary position embeddings in config.json <-> (rotary_base, RopeScaling), by the rules of transformers 5.

transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`. Where a file has both, `rope_scaling`
takes the place of the whole of `rope_parameters`, its rope_theta included (`PreTrainedConfig.convert_rope_params_to_dict`).
"""

import logging
import math
from typing import Any, Mapping

from megatron_hylo.config import ConfigError, RopeScaling

logger = logging.getLogger("megatron_hylo.convert")
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SETTINGS = {  # of each rope_type; the first tuple must be given
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


def rope_from_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Return (rotary_base, scaling) that transformers 5 would use.

    Args:
        values: config.json.

    Raises:
        ConfigError: another kind of scaling, a setting that is missing or is no number, or spellings that contradict.
    """
    hidden = values.get("rope_parameters") or {}
    rope = values.get("rope_scaling") or hidden
    for given in (hidden, rope):
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise ConfigError(f"RoPE settings {given!r} are not supported: give one mapping that holds for all layers")
    base = _number("rope_theta", rope["rope_theta"] if "rope_theta" in rope else values.get("rope_theta", 10000.0))
    if hidden.get("rope_theta") not in (None, base):
        raise ConfigError(
            f"rope_scaling takes the place of rope_parameters, so that transformers would use rope_theta {base:g} and not its "
            f"{hidden['rope_theta']}; move the scaling into rope_parameters, or give rope_scaling the rope_theta that is meant"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise ConfigError(f"RoPE with rope_type {kind!r} and type {rope['type']!r}: leave one of them out")
    if kind not in _SETTINGS:
        raise ConfigError(f"rope_type {kind!r} is not supported; use {', '.join(_SETTINGS)}")
    for part in (rope.get("partial_rotary_factor"), values.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise ConfigError(f"partial_rotary_factor {part!r} is not supported; all channels of a head must turn")
    needed, optional = _SETTINGS[kind]
    if missing := [name for name in needed if name not in rope]:
        raise ConfigError(f"RoPE of type {kind} lacks {', '.join(missing)}; transformers does not load this either: add it")
    if ignored := sorted(set(rope) - _COMMON - set(needed) - set(optional)):
        logger.warning("RoPE of type %s does not use %s (nor does transformers): ignored", kind, ", ".join(ignored))
    if kind == "default":
        return base, RopeScaling()
    return base, _scaling(kind, rope, values)


def _scaling(kind: str, rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    if kind == "linear":
        return RopeScaling("linear", factor=_number("factor", rope["factor"]))
    longest = values.get("max_position_embeddings")
    # the place beside the RoPE settings wins, as in transformers; where nobody says it, it is the model's length
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))
    original = _number("original_max_position_embeddings", original)
    if original != int(original):
        raise ConfigError(f"original_max_position_embeddings {original} must be a whole number of tokens")
    if kind == "llama3":
        numbers = {name: _number(name, rope[name]) for name in _SETTINGS[kind][0]}
        return RopeScaling(
            "llama3",
            factor=numbers["factor"],
            low_freq_factor=numbers["low_freq_factor"],
            high_freq_factor=numbers["high_freq_factor"],
            original_max_position_embeddings=int(original),
        )
    factor = _number("max_position_embeddings", longest) / original if rope["factor"] is None else rope["factor"]
    factor = _number("factor", factor)
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=int(original),
        beta_fast=_number("beta_fast", rope.get("beta_fast") or 32),
        beta_slow=_number("beta_slow", rope.get("beta_slow") or 1),
        attention_factor=None if attention is None else _number("attention_factor", attention),
        truncate=bool(rope.get("truncate", True)),
    )


def _mscale(factor: float, mscale: float) -> float:
    """Attention factor of YaRN (Peng et al., 2023, equation 22), with DeepSeek's weight on the logarithm."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"RoPE setting {name} is {value!r}; it must be a positive number")
    return float(value)


def rope_to_hf(base: float, scaling: RopeScaling) -> dict[str, Any]:
    """Write `rope_parameters` for transformers 5, and the same as `rope_theta` and `rope_scaling` for 4 and other readers."""
    parameters: dict[str, Any] = {"rope_type": "default" if scaling.rope_type == "none" else scaling.rope_type}
    if scaling.rope_type != "none":
        parameters["factor"] = scaling.factor
    if scaling.rope_type in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.rope_type == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
        if not scaling.truncate:
            parameters["truncate"] = False
    return {
        "rope_parameters": parameters | {"rope_theta": base},
        "rope_theta": base,
        "rope_scaling": None if scaling.rope_type == "none" else parameters,
    }
