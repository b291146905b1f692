"""One token of a recurrence, its state changed in place: the decode step of Gated DeltaNet, KDA and Mamba2.

A step reads and writes the state once and does little else, so it is bound by bandwidth. On CUDA fla's fused_recurrent kernel
and mamba_ssm's selective_state_update run; both load a block of the state before they store it, so it may go to the same place.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.gated_delta_rule import normalised
from megatron_hylo.kernels.registry import library_unsupported, select

FLA_MODULE = "fla.ops.gated_delta_rule.fused_recurrent"
MAMBA_MODULE = "mamba_ssm.ops.triton.selective_state_update"
VALUES = 8  # value channels a program of fla's kernel, as fla has it


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gates: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Step of `gated_delta_rule`, or of `kda` where g has a value for each key channel.

    Args:
        q, k: [b, 1, h, dk], floating; normalised here.
        v: [b, 1, h, dv].
        g: [b, 1, h] or [b, 1, h, dk], log decay, float32; with `gates` what it is made of.
        beta: [b, 1, h]; with `gates` before its sigmoid.
        state: [b, h, dk, dv], float32 (float64 for float64 v); changed.
        gates: rates and biases [h], float32, of log decays -exp(rate) softplus(g + bias); of one decay a head alone.

    Returns:
        [b, 1, h, dv] in v's dtype.
    """
    op = "kda" if g.dim() == 4 else "gated_delta_rule"
    if select(op, "fla", library_unsupported("fla", FLA_MODULE, v, "pip install flash-linear-attention")) == "fla":
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        return _fla(q, k, v, g, beta, state, gates)
    wide = state.dtype
    if gates is not None:
        g, beta = -gates[0].exp() * F.softplus(g.float() + gates[1]), beta.sigmoid()
    queries, keys = normalised(q[:, 0].to(wide)) * q.shape[-1] ** -0.5, normalised(k[:, 0].to(wide))
    decay = g[:, 0].to(wide).exp()
    state.mul_(decay[..., None] if g.dim() == 4 else decay[..., None, None])
    seen = (keys[..., None, :] @ state)[..., 0, :]
    written = beta[:, 0, :, None].to(wide) * (v[:, 0].to(wide) - seen)
    state.addcmul_(keys[..., None], written[..., None, :])
    return (queries[..., None, :] @ state).transpose(1, 2).to(v.dtype)


def _fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gates: tuple[Tensor, Tensor] | None
) -> Tensor:
    (b, t, heads, keys), values = k.shape, v.shape[-1]
    out, block = torch.empty_like(v), min(VALUES, 1 << (values - 1).bit_length())
    by_channel = g.dim() == 4
    kernel = importlib.import_module(FLA_MODULE).fused_recurrent_gated_delta_rule_fwd_kernel
    with torch.cuda.device_of(v):
        kernel[(-(-values // block) * b * heads,)](
            q=q, k=k, v=v, g=None if by_channel else g, gk=g if by_channel else None, gv=None, beta=beta,
            A_log=None if gates is None else gates[0], dt_bias=None if gates is None else gates[1],
            o=out, h0=state, ht=state, cu_seqlens=None, scale=keys**-0.5, T=t, H=heads, HV=heads, K=keys,
            V=values, BK=1 << (keys - 1).bit_length(), BV=block, IS_BETA_HEADWISE=True, USE_QK_L2NORM_IN_KERNEL=True,
            APPLY_BETA_SIGMOID=gates is not None, ALLOW_NEG_EIGVAL=False, STATE_V_FIRST=False, num_warps=1, num_stages=3,
        )  # fmt: skip
    return out


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """Step of `ssd`.

    Args:
        x: [b, 1, h, p], floating.
        dt: [b, 1, h], float32.
        A: [h], negative, float32.
        B, C: [b, 1, h, n].
        D: [h].
        state: [b, h, p, n], float32 (float64 for float64 x); changed.

    Returns:
        [b, 1, h, p] in x's dtype.
    """
    heads, p, n = state.shape[1:]
    if select("ssd", "mamba_ssm", library_unsupported("mamba_ssm", MAMBA_MODULE, x, "pip install mamba-ssm")) == "mamba_ssm":
        step, steps = importlib.import_module(MAMBA_MODULE).selective_state_update, dt[:, 0, :, None].expand(-1, -1, p)
        none = A.new_zeros(1).expand(heads, p)  # the kernel's strides need a bias
        rates, skip = A[:, None, None].expand(-1, p, n), D[:, None].expand(-1, p)
        return step(state, x[:, 0].contiguous(), steps, rates, B[:, 0], C[:, 0], skip, dt_bias=none)[:, None]
    wide = state.dtype
    inputs, step_size = x[:, 0].to(wide), dt[:, 0].to(wide)
    state.mul_((step_size * A.to(wide)).exp()[..., None, None])
    state.addcmul_((inputs * step_size[..., None])[..., None], B[:, 0, :, None].to(wide))
    y = (state @ C[:, 0, :, :, None].to(wide))[..., 0]
    return torch.addcmul(y, inputs, D.to(wide)[:, None])[:, None].to(x.dtype)
