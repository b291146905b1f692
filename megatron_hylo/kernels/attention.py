"""Softmax attention with grouped key/value heads, by torch's scaled_dot_product_attention.

Causality is aligned to the end: the last query sees every key, as in prefill and decode with a cache. On
CUDA the backend is chosen here, in the order cuDNN, flash, memory-efficient, math (cuDNN is the fastest on
Hopper and takes value heads that differ from query heads, as MLA has), and logged. Where queries are fewer than keys, as on
a rank of context parallelism that has gathered keys, cuDNN computes two blocks (attention_after_prefix.py) and flash aligns to
the end by itself; the others need a mask in memory. Heads whose width is no multiple of 8 are padded, since fused kernels
take no others. Where no gradient is needed, FlashAttention-3's forward kernels go before (flash_attention_3.py). The override
`fa4` puts FlashAttention-4 before the backends, forward and backward (flash_attention_4.py).

Where torch's deterministic algorithms are on, cuDNN does not run, since its backward pass adds up in another order each time.
Those of flash and memory-efficient attention have a deterministic form, which torch takes in its strict mode alone: with
`warn_only` it warns and adds up atomically. So they run in the strict mode (`_deterministic_backward`).
"""

import contextlib
import logging

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from megatron_hylo.kernels.attention_after_prefix import attention_after_prefix
from megatron_hylo.kernels.flash_attention_3 import Documents, choose_forward, flash_attention_3
from megatron_hylo.kernels.flash_attention_4 import ELSEWHERE, flash_attention_4, runs_flash_attention_4
from megatron_hylo.kernels.flash_attention_4 import NAME as FLASH_ATTENTION_4
from megatron_hylo.kernels.fused_inputs import padded, readable, same_width
from megatron_hylo.kernels.registry import overridden, use

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
DETERMINISTIC_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Attention softmax(scale q k^T) v; query head i reads key/value head i // (hq / hkv).

    Args:
        q: [b, t, hq, d], floating.
        k: [b, s, hkv, d], same dtype, hkv a divisor of hq.
        v: [b, s, hkv, dv]; dv may differ from d.
        scale: factor on the scores, e.g. d ** -0.5.
        causal: query i sees keys 0 .. s - t + i (needs t <= s); False: all keys.
        mask: bool, broadcast to [b, hq, t, s], the keys that each query sees, at least one; `causal` is not read then.
        documents: ranges of queries and of keys, in order and without gaps, that attend to each other alone (b = 1), without a
            mask; None: one.

    Returns:
        [b, t, hq, dv] in q's dtype.

    Raises:
        ValueError: shapes that disagree, or more queries than keys with causal.
    """
    (b, t, hq, d), (s, hkv), dv = q.shape, k.shape[1:3], v.shape[-1]
    if k.shape != (b, s, hkv, d) or v.shape[:3] != (b, s, hkv) or hq % hkv:
        raise ValueError(
            f"q {tuple(q.shape)} [b, t, hq, d] needs k [b, s, hkv, d] and v [b, s, hkv, dv] with hkv dividing hq, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if documents is not None and mask is not None:
        raise ValueError("attention takes documents or a mask, not both")
    if causal and t > s and mask is None:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {s} keys and {t} queries")
    if mask is None and t > 1 and (kernel := choose_forward(q, k, v)) != "torch":
        return flash_attention_3(q, k, v, scale, causal, documents, fp8=kernel == "fa3_fp8")[0]
    if documents is not None:
        outs = [attention(q[:, own], k[:, seen], v[:, seen], scale, causal) for own, seen in documents]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    if mask is None and runs_flash_attention_4(q, k, v, causal):
        return flash_attention_4(q, k, v, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, heads, tokens, channels]
    if q.is_cuda:  # torch pads for flash alone, which takes no mask; with one, all scores would go to memory
        q, k, v = padded(q, k, v)
    if mask is not None:  # torch chooses; with repeated heads its memory-efficient kernel can run, which has no grouped ones
        if hq != hkv:
            k, v = (x.repeat_interleave(hq // hkv, 1) for x in (k, v))
        with sdpa_kernel(DETERMINISTIC_WITH_MASK) if _is_deterministic(q) else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return _deterministic_backward(out)[..., :dv].transpose(1, 2)
    is_causal, is_lower_right = bool(causal and t == s and t > 1), bool(causal and 1 < t < s)
    backend = choose_backend(q, k, v, is_causal)
    if backend in ("cudnn", "flash", "efficient"):
        q, k, v = (readable(x) for x in (q, k, v))
    if is_lower_right and backend == "cudnn":
        return attention_after_prefix(q, k, v, scale)[..., :dv].transpose(1, 2)
    mask = None
    if is_lower_right:  # flash needs no mask, which with long sequences is larger than all else
        mask = (
            causal_lower_right(t, s) if backend == "flash" else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        )
    if backend in ("torch", "flash"):
        q, k, v = same_width(q, k, v)
    if backend == "efficient" and hq != hkv:  # the one that has no grouped heads
        k, v = (x.repeat_interleave(hq // hkv, 1) for x in (k, v))
    with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _deterministic_backward(out)[..., :dv].transpose(1, 2)


def _is_deterministic(x: torch.Tensor) -> bool:
    """Whether x is on a GPU and torch's deterministic algorithms are on."""
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


def _deterministic_backward(out: torch.Tensor) -> torch.Tensor:
    """Return the output of scaled-dot-product attention, whose backward pass is deterministic where the switch is on."""
    warns = torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    if warns and out.grad_fn is not None:
        out.grad_fn.register_prehook(_be_strict)
        out.grad_fn.register_hook(_warn_again)
    return out


def _be_strict(grads: tuple[torch.Tensor, ...]) -> None:
    """Make torch's kernels choose their deterministic forms: a hook before a node of the backward pass."""
    torch.use_deterministic_algorithms(True)


def _warn_again(grad_inputs: tuple[torch.Tensor, ...], grad_outputs: tuple[torch.Tensor, ...]) -> None:
    """Undo `_be_strict`, after the node: other operations have no deterministic form and would stop the run."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def _asked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, grouped: bool) -> torch.backends.cuda.SDPAParams:
    """Parameters that torch's backends are asked about: no mask, no dropout."""
    return torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)


def choose_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> str:
    """Name of the backend of scaled-dot-product attention for these inputs; the registry's override comes first.

    Args:
        q: [b, hq, t, d], padded to what fused kernels take.
        k, v: [b, hkv, s, d or dv], likewise; hkv divides hq.
        is_causal: with as many keys as queries.

    Returns:
        "cudnn", "flash" or "efficient", the first that torch says it can use; "math", with a warning, if none; "torch" off
        CUDA, where torch itself chooses. The override "fa4", which no backend answers to, leaves the choice as it is.

    Raises:
        RuntimeError: an override asks for cuDNN while torch's deterministic algorithms are on.
    """
    name = overridden("attention")
    fa4, deterministic = name == FLASH_ATTENTION_4, torch.are_deterministic_algorithms_enabled()
    if name == "cudnn" and deterministic:
        raise RuntimeError(
            "attention: cudnn was asked for by an override, but its backward pass adds up in another order each time, and "
            "`deterministic` is on; use flash or efficient"
        )
    if name is not None and not fa4:
        use("attention", name, "override")
        return name
    if not q.is_cuda:
        use("attention", "torch", "cuDNN and flash need a CUDA device")
        return "torch"
    cuda, heads = torch.backends.cuda, q.shape[1]
    grouped = heads != k.shape[1]
    if not deterministic and cuda.can_use_cudnn_attention(_asked(q, k, v, causal=is_causal, grouped=grouped), False):
        name = "cudnn"
    elif cuda.can_use_flash_attention(_asked(*same_width(q, k, v), causal=is_causal, grouped=grouped), False):
        name = "flash"
    else:
        repeated = (x[:, :1].expand(-1, heads, -1, -1) for x in (k, v))  # shapes are all that is asked about
        usable = cuda.can_use_efficient_attention(_asked(q, *repeated, causal=is_causal, grouped=False), False)
        name = "efficient" if usable else "math"
    if name == "math":
        use("attention", name, "no fused backend takes these inputs: all scores go to memory", logging.WARNING)
    elif fa4:
        use("attention", name, ELSEWHERE, logging.WARNING)
    else:
        use("attention", name, "first usable of cuDNN, flash, efficient")
    return name
