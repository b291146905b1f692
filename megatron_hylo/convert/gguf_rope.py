"""Rotary position embeddings of a GGUF file: its stored frequencies, and the RopeScaling that computes the same.

The rules are llama.cpp's: angle of channel pair i at position p = p * base^(-2i/d) / rope_freqs[i] / factor, and with
scaling type yarn its ramp between that and the unscaled angle. Llama 3.1 and later have no scaling keys, only rope_freqs.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, RopeScaling
from megatron_hylo.kernels.rope import rope_frequencies

TOLERANCE = 1e-5  # relative, of frequencies: the file's factors are fp32
_LLAMA3_BOUNDS = ((8192, 1.0, 4.0), (32768, 1.0, 4.0))  # original length, low and high frequency factor of released models


def rope_from_gguf(settings: Mapping[str, Any], factors: Tensor | None, dim: int, context: int) -> tuple[float, RopeScaling]:
    """Return (rotary_base, scaling) of a GGUF file.

    Args:
        settings: its keys that begin with `rope.`, without the architecture's name before them.
        factors: `rope_freqs.weight`, [dim / 2], or None where the file has none or all are 1.
        dim: channels of a head, all of which turn.
        context: `context_length`, tokens.

    Raises:
        ConfigError: a scaling that RopeScaling cannot express.
    """
    base = float(settings.get("rope.freq_base", 10000.0))
    divisor = float(settings.get("rope.scaling.factor") or settings.get("rope.scale_linear") or 1.0)
    kind = settings.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"GGUF file: rope.scaling.type {kind!r} is not supported; use none, linear or yarn")
    original = int(settings.get("rope.scaling.original_context_length") or context)
    scaled = kind == "yarn" or (kind == "linear" and divisor != 1)
    if factors is not None:
        if scaled:
            raise ConfigError(f"GGUF file: rope_freqs.weight together with rope.scaling.type {kind!r} is not supported")
        return base, _llama3_scaling(factors, dim, base, original)
    if not scaled:
        return base, RopeScaling()
    if kind == "linear":
        return base, RopeScaling("linear", factor=divisor)
    for key, neutral in (
        ("attn_factor", 1.0),
        ("yarn_attn_factor", 1.0),
        ("yarn_ext_factor", 1.0),
        ("yarn_log_multiplier", 0.0),
    ):
        value = settings.get(f"rope.scaling.{key}", neutral)
        if value != neutral and not (key == "yarn_ext_factor" and value < 0):  # negative: the default, 1
            raise ConfigError(f"GGUF file: rope.scaling.{key} {value} is not supported; only {neutral}")
    betas = {name: settings.get(f"rope.scaling.yarn_{name}", -1.0) for name in ("beta_fast", "beta_slow")}
    given: dict[str, Any] = {name: float(value) for name, value in betas.items() if value > 0}
    return base, RopeScaling("yarn", factor=divisor, original_max_position_embeddings=original, **given)


def gguf_frequencies(base: float, scaling: RopeScaling, factors: Tensor | None, dim: int) -> Tensor:
    """Inverse frequencies from a GGUF file's own data, fp32 [dim / 2], without Llama 3's rule."""
    if factors is None:
        return rope_frequencies(dim, base, scaling)
    return rope_frequencies(dim, base) / factors


def _llama3_scaling(factors: Tensor, dim: int, base: float, original: int) -> RopeScaling:
    """Find the parameters of Llama 3.1's rule that give these divisors of the frequencies.

    The rule is 1 for wavelengths below original / high_freq_factor, `factor` above original / low_freq_factor, and between
    them 1 / divisor is linear in 1 / wavelength. Released models' parameters are tried, then a line is fitted.

    Raises:
        ConfigError: no parameters give them.
    """
    if factors.shape != (dim // 2,) or not torch.all(factors > 0):
        raise ConfigError(f"GGUF file: rope_freqs.weight must be {dim // 2} positive numbers, got shape {list(factors.shape)}")
    target = rope_frequencies(dim, base) / factors
    factor = factors.max().item()
    bounds = [*_LLAMA3_BOUNDS, (original, 1.0, 4.0)]
    if fitted := _fitted_bounds(factors, dim, base):
        bounds.append(fitted)
    for length, low, high in bounds:
        if factor > 1 and high > low > 0:
            scaling = RopeScaling("llama3", factor, length, low_freq_factor=low, high_freq_factor=high)
            if torch.allclose(rope_frequencies(dim, base, scaling), target, rtol=TOLERANCE, atol=0):
                return scaling
    raise ConfigError(
        "GGUF file: no parameters of Llama 3's RoPE scaling give its rope_freqs.weight (LongRoPE has such factors, which are "
        "not supported); convert the model's Hugging Face folder if that says another kind of scaling"
    )


def _fitted_bounds(factors: Tensor, dim: int, base: float) -> tuple[int, float, float] | None:
    """Fit (original length, low, high) to the channels between fast and slow; None where there are fewer than two.

    Only low / original and high / original are determined; the length is set to the released models' 8192.
    """
    length = _LLAMA3_BOUNDS[0][0]
    factor = factors.max().double()
    share = ((1 / factors.double() - 1 / factor) / (1 - 1 / factor)).numpy()  # of the unscaled frequency
    turns = (rope_frequencies(dim, base).double() * length / (2 * math.pi)).numpy()  # in the original length
    between = (share > TOLERANCE) & (share < 1 - TOLERANCE)
    if between.sum() < 2:
        return None
    x, y = turns[between], share[between]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    low = float(x.mean() - y.mean() / slope)
    return length, low, low + 1 / float(slope)
