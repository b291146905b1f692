"""Latents of MLA in 8 bits: two scales a token, one of its latent and one of its rotary key.

Values are the row divided by its scale, rounded to int8 or to float8 (e4m3); a scale is the row's largest magnitude over the
format's largest, rounded up to bf16, so that no value overflows. Dequantised, a value is at most half a step of its row wrong.
"""

import torch
from torch import Tensor

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise_latents(compressed: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Quantise each token's latent and rotary key.

    Args:
        compressed: [..., rank + rotary channels], floating.
        rank: channels of the latent.
        name: "int8" or "fp8".

    Returns:
        values like `compressed`, in 8 bits, and scales bf16 [..., 2].
    """
    dtype = FORMATS[name]
    parts = [part.float() for part in compressed.split([rank, compressed.shape[-1] - rank], dim=-1)]
    wanted = torch.stack([part.abs().amax(-1) for part in parts], -1) / _LARGEST[dtype]
    scales = (wanted * (1 + 2**-7)).clamp(min=1e-30).to(torch.bfloat16)  # rounding to bf16 takes off 2^-8 at most
    values = torch.cat([part / scales[..., i, None].float() for i, part in enumerate(parts)], -1)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def dequantise_latents(values: Tensor, scales: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Return latents and rotary keys [..., rank + rotary channels] in `dtype` from values and scales [..., 2]."""
    wide = torch.promote_types(dtype, torch.float32)
    parts = values.split([rank, values.shape[-1] - rank], dim=-1)  # no tensor of widths: a captured graph cannot copy it
    return torch.cat([part.to(wide) * scales[..., i, None].to(wide) for i, part in enumerate(parts)], -1).to(dtype)
