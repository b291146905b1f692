"""FlashAttention-4's kernels for Hopper, from the package flash-attn-4: causal attention with a gradient.

An implementation of the operation `attention`, by override alone: `HYLO_KERNELS=attention=fa4`. Forward and backward pass
together are 1.1 to 1.35 times as fast as cuDNN's, steps of a 1B hybrid with an 8B teacher at 65,536 tokens 2 to 3 % shorter
(benchmarks/results/attention_training.md). CuTe compiles a kernel, in some seconds, when it meets other widths or groups of
heads.

On Hopper its backward pass takes grouped heads only where values are as wide as keys. So for MLA's heads, of 96 and 64 channels
say, keys and values are repeated, which is faster than values padded to the keys' width. Some pairs of widths have no kernel
that compiles (64 and 32, 64 and 96), so heads are padded to one of those that were measured.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.fused_inputs import readable
from megatron_hylo.kernels.registry import Unsupported, import_error, overridden, select

NAME = "fa4"
MODULE = "flash_attn.cute"
INSTALL = "pip install 'flash-attn-4[cu13]==4.0.0b36'"
WIDTHS = ((64, 64), (96, 64), (128, 128))  # of queries and keys, of values: the pairs that were measured
WIDEST = WIDTHS[-1][0]
ELSEWHERE = (
    "FlashAttention-4 takes causal attention in one piece, with as many keys as queries; "
    "here the first usable of cuDNN, flash, efficient"
)


def runs_flash_attention_4(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether an override asks for FlashAttention-4 and it computes this call.

    Args:
        q: [b, t, hq, d].
        k: [b, s, hkv, d].
        v: [b, s, hkv, dv].
        causal: query i sees keys 0 .. s - t + i.

    Returns:
        False without the override, and for calls that are left to the backends of attention.py: without causality, of a single
        query, of fewer queries than keys.

    Raises:
        RuntimeError: it was asked for, but not on this machine or with this dtype or width.
    """
    if overridden("attention") != NAME or not causal or not 1 < q.shape[1] == k.shape[1]:
        return False
    return select("attention", NAME, unsupported(q, k, v)) == NAME


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> Unsupported | None:
    """Why FlashAttention-4 cannot run on these inputs; None if it can.

    Args:
        q: [..., d], on any device, of any dtype.
        k, v: likewise, [..., d] and [..., dv].
    """
    width = max(q.shape[-1], v.shape[-1])
    if not q.is_cuda:
        return Unsupported("FlashAttention-4 needs a CUDA device")
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return Unsupported("FlashAttention-4 is used on Hopper GPUs alone")
    if q.dtype != torch.bfloat16:
        return Unsupported(f"FlashAttention-4 takes bf16, not {str(q.dtype).removeprefix('torch.')}")
    if width > WIDEST:
        return Unsupported(f"FlashAttention-4 is used for heads of up to {WIDEST} channels, not {width}")
    if torch.are_deterministic_algorithms_enabled():
        return Unsupported("FlashAttention-4's backward pass adds up in another order each time, and `deterministic` is on")
    if error := import_error(MODULE):
        return Unsupported(f"{MODULE} does not import: {error}", INSTALL)
    return None


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention softmax(scale q k^T) v of as many keys as queries; gradients of all three.

    Args:
        q: [b, t, hq, d] bf16.
        k: [b, t, hkv, d]; query head i reads key/value head i // (hq / hkv).
        v: [b, t, hkv, dv].
        scale: factor on the scores.

    Returns:
        [b, t, hq, dv] bf16.
    """
    values = v.shape[-1]
    width, wide = next(pair for pair in WIDTHS if q.shape[-1] <= pair[0] and values <= pair[1])
    q, k, v = (
        F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x, size in ((q, width), (k, width), (v, wide))
    )
    if q.shape[2] != k.shape[2] and q.shape[-1] != v.shape[-1]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (readable(x) for x in (q, k, v))
    out, _ = importlib.import_module(MODULE).flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    return out[..., :values]
