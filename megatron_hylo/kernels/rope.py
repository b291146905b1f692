"""Rotary position embeddings: frequencies (plain, linear, Llama 3, YaRN, NoPE), cos/sin, and the rotation.

RoPE is from "RoFormer" (Su et al., 2021, section 3.2.2), YaRN from "YaRN: Efficient Context Window
Extension" (Peng et al., 2023, section 3.2 and appendix A.2). Frequencies equal those of transformers'
`modeling_rope_utils`. A scaling is any object with RopeScaling's fields.
"""

import math
from typing import Any

import torch

FLOAT32_POSITIONS = 32768  # positions before it have float32 angles


def rope_frequencies(dim: int, base: float, scaling: Any = None, device: torch.device | str | None = None) -> torch.Tensor:
    """Angular frequencies in radians per token.

    Args:
        dim: rotated channels a head, even.
        base: RoPE base (theta).
        scaling: None, or an object with `rope_type` ("none", "linear", "llama3", "yarn", "nope"), `factor`,
            `original_max_position_embeddings`, and `low_freq_factor`, `high_freq_factor` (llama3) or
            `beta_fast`, `beta_slow` and perhaps `truncate` (yarn).
        device: where to put the result.

    Returns:
        float32 [dim / 2]; zeros for "nope", which turn nothing.

    Raises:
        ValueError: odd dim, or an unknown rope_type.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rotated channels must be even and at least 2, got {dim}")
    # on the CPU, then moved: every rank and device gets the same bits
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    rope_type = "none" if scaling is None else scaling.rope_type
    if rope_type == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif rope_type == "yarn":
        frequencies = _yarn(frequencies, dim, base, scaling)
    elif rope_type == "linear":
        frequencies = frequencies / scaling.factor
    elif rope_type == "nope":
        frequencies = torch.zeros_like(frequencies)
    elif rope_type != "none":
        raise ValueError(f"rope_type {rope_type!r} is not supported; use none, linear, llama3, yarn or nope")
    return frequencies.to(device) if device is not None else frequencies


def _llama3(frequencies: torch.Tensor, scaling: Any) -> torch.Tensor:
    """Llama 3.1's rule: divide slow frequencies by the factor, keep fast ones, blend in between."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = wavelength > original / scaling.low_freq_factor
    fast = wavelength < original / scaling.high_freq_factor
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))


def _yarn(frequencies: torch.Tensor, dim: int, base: float, scaling: Any) -> torch.Tensor:
    """YaRN's "NTK by parts": a linear ramp from kept to divided frequencies over the channel index."""

    def channel(rotations: float) -> float:
        """Index of the channel whose wavelength makes so many turns in the original length."""
        return dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if getattr(scaling, "truncate", True):  # folders exported before there was the setting lack it
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    divided = ((torch.arange(dim // 2, device="cpu").float() - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def rope_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, multiplier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of every position and frequency.

    Args:
        positions: [...] token indices, integer or floating.
        inv_freq: float32 [dim / 2] from `rope_frequencies`.
        multiplier: factor on both (YaRN's attention scaling, `RopeScaling.cos_sin_multiplier`).

    Returns:
        cos, sin: float32 [..., dim / 2]. Angles below position 32768 are rounded to float32 as transformers rounds them (at
        most 0.002 wrong); at 2M tokens that would be 0.1, so from there on they are float64.
    """
    positions = positions.to(inv_freq.device)[..., None]
    near = positions < FLOAT32_POSITIONS
    rounded, exact = positions.float() * inv_freq.float(), positions.double() * inv_freq.double()
    cos, sin = (torch.where(near, f(rounded), f(exact).float()) * multiplier for f in (torch.cos, torch.sin))
    return cos, sin


def unfold_rotary_key(plain: torch.Tensor, rotary: torch.Tensor, mix: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Attention's unrotated key heads from MLA's: each head's own channels plus its share of the rotary key.

    Slot i of the rotary key, channels (2i, 2i+1), is a combination over heads of attention's channels (j, j + d/2) with
    j = pairs[i] (a principal component of them in TransMLA, arXiv:2502.07864); head g has mix[g, i] of it.

    Args:
        plain: [b, t, g, d], floating, d even.
        rotary: [b, t, 2 n].
        mix: [g, n].
        pairs: int64 [n], each in [0, d/2); repeats add up.

    Returns:
        [b, t, g, d], float32 (float64 stays).
    """
    wide = torch.promote_types(plain.dtype, torch.float32)
    first_channel = torch.arange(plain.shape[-1] // 2, device=pairs.device)
    spread = mix.to(wide)[:, :, None] * (pairs[:, None] == first_channel)  # [g, slot, j]; a product is deterministic
    unfolded = torch.einsum("btic,gij->btgcj", rotary.to(wide).unflatten(-1, (-1, 2)), spread)
    return plain.to(wide) + unfolded.flatten(-2)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate channel pairs of every head by the token's angles.

    Args:
        x: [b, t, heads ..., d], floating.
        cos, sin: [t, d / 2] or [b, t, d / 2].
        interleaved: False pairs channels (i, i + d/2) like Hugging Face's Llama, True pairs (2i, 2i+1)
            like DeepSeek's MLA. The output keeps x's channel order.

    Returns:
        of x's shape and dtype, computed in float32 (float64 stays).

    Raises:
        ValueError: cos and x disagree on t or d.
    """
    b, t, *heads, d = x.shape
    if cos.shape not in ((t, d // 2), (b, t, d // 2), (1, t, d // 2)) or cos.shape != sin.shape or d % 2:
        raise ValueError(
            f"x {tuple(x.shape)} [b, t, heads ..., d] needs cos and sin [t, d/2] or [b, t, d/2], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (a.to(wide).unflatten(-1, (*[1] * len(heads), -1)) for a in (cos, sin))
    y = x.to(wide)
    first, second = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    rotated = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return out.to(x.dtype)
