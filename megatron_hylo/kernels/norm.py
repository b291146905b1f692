"""RMS normalisation, plain and gated by SiLU, computed in float32 (float64 inputs stay float64).

RMSNorm is from "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019, equation 4). The two
gated orders are those of Mamba2 (gate, then normalise) and Gated DeltaNet (normalise, then gate).
"""

import torch
import torch.nn.functional as F


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, reference: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [..., n], floating.
        weight: [n].
        eps: added to the mean square.
        reference: [..., m], whose mean square is taken in place of x's.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: weight is not [n].
    """
    check_weight("rms_norm", x, weight)
    if reference is not None:
        wide = _wide(x)
        scale = (reference.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
        return (x.to(wide) * scale * weight.to(wide)).to(x.dtype)
    if weight.dtype == x.dtype:  # torch's own kernel, float32 inside, saves x as it is for backward
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = _wide(x)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int | None = None,
    *,
    norm_before_gate: bool,
) -> torch.Tensor:
    """RMSNorm with a SiLU gate, over groups of the last dimension.

    Args:
        x: [..., n], floating.
        gate: [..., n], before its SiLU.
        weight: [n].
        eps: added to the mean square.
        group_size: channels normalised together, a divisor of n; None for all n.
        norm_before_gate: True for RMSNorm(x) * weight * silu(gate) (Gated DeltaNet),
            False for RMSNorm(x * silu(gate)) * weight (Mamba2).

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError: weight is not [n], or group_size does not divide n.
    """
    check_weight("gated_rms_norm", x, weight)
    size = x.shape[-1]
    group = size if group_size is None else group_size
    if group < 1 or size % group:
        raise ValueError(f"group_size {group_size} must divide the {size} channels of x")
    wide = _wide(x)
    gate = F.silu(gate.to(wide))
    y = x.to(wide)
    if not norm_before_gate:
        y = y * gate
    y = F.rms_norm(y.unflatten(-1, (size // group, group)), (group,), None, eps).flatten(-2) * weight.to(wide)
    if norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def check_weight(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Check that `weight` is a vector as wide as x [..., n]; `name` is the operation in the message.

    Raises:
        ValueError: weight is not [n].
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}; weight must be [{x.shape[-1]}]")
