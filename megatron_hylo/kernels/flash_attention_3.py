"""FlashAttention-3's forward kernels for Hopper (arXiv:2407.08608), from the package fa3-fwd: attention without a gradient.

No backward pass follows the attention of frozen teachers, evaluation and prefill. The operation is `attention_forward` of the
registry: `fa3` in bf16 where it is installed and the inputs allow it, `torch` (the backends of attention.py) elsewhere, with a
warning on a Hopper GPU that lacks the package. `fa3_fp8` quantises queries, keys, values and probabilities to E4M3; it runs by
override alone: `HYLO_KERNELS=attention_forward=fa3_fp8`.

Quantisation: a power of two for each sequence and group of heads. Keys lose their mean over the tokens first, which adds the
same number to all scores of a query and so changes no probability; what is left has smaller values and smaller errors
(SageAttention, arXiv:2410.02367).
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_hylo.kernels.fused_inputs import padded, readable, same_width
from megatron_hylo.kernels.registry import Unsupported, import_error, overridden, select

OPERATION = "attention_forward"
MODULE = "fa3_fwd_interface"
WIDEST = 256
PAIRS_OF_WIDTHS = ((192, 128),)  # of queries and values that have kernels of their own; others are padded to the wider
LARGEST = 448.0  # of E4M3

Documents = Sequence[tuple[slice, slice]]  # of each document: its queries, its keys

_gradient_follows = False


@contextlib.contextmanager
def gradient_to_follow() -> Iterator[None]:
    """Compute attention in the block as if a gradient were needed: a pass that is computed again in the backward pass."""
    global _gradient_follows
    before, _gradient_follows = _gradient_follows, True
    try:
        yield
    finally:
        _gradient_follows = before


def choose_forward(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Name of what computes attention of these inputs without a gradient: "fa3", "fa3_fp8" or "torch".

    Args:
        q: [b, t, hq, d], or with tokens and heads swapped.
        k, v: likewise, [b, s, hkv, ...].

    Raises:
        RuntimeError: an override asks for a kernel that cannot run on them.
    """
    tensors = (q, k, v)
    if _gradient_follows or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return "torch"
    wanted = overridden(OPERATION)
    if wanted is None and (overridden("attention") is not None or not q.is_cuda):
        return "torch"
    return select(OPERATION, wanted if wanted in ("fa3", "fa3_fp8") else "fa3", unsupported(*tensors))


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> Unsupported | None:
    """Why FlashAttention-3 cannot run on these inputs; None if it can.

    Args:
        q: [..., d], on any device, of any dtype; tokens and heads in any order.
        k, v: likewise, [..., d] and [..., dv].
    """
    width = max(q.shape[-1], v.shape[-1])
    if not q.is_cuda:
        return Unsupported("FlashAttention-3 needs a CUDA device")
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return Unsupported("FlashAttention-3 needs a Hopper GPU")
    if q.dtype != torch.bfloat16:
        return Unsupported(f"FlashAttention-3 takes bf16, not {str(q.dtype).removeprefix('torch.')}")
    if width > WIDEST:
        return Unsupported(f"FlashAttention-3 takes heads of up to {WIDEST} channels, not {width}")
    if error := import_error(MODULE):
        return Unsupported(f"{MODULE} does not import: {error}", "pip install fa3-fwd")
    return None


def flash_attention_3(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, documents: Documents | None = None, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention softmax(scale q k^T) v without a gradient.

    Args:
        q: [b, t, hq, d] bf16.
        k: [b, s, hkv, d].
        v: [b, s, hkv, dv].
        scale: factor on the scores.
        causal: aligned to the end: query i sees keys 0 .. s - t + i.
        documents: ranges of queries and keys that attend to each other alone, each next to the one before; b = 1.
        fp8: quantise all three to E4M3; the logarithms are then not those of the keys given.

    Returns:
        Output [b, t, hq, dv] bf16 and, fp32, the logarithms of the softmax's sums: [b, hq, t], with documents [hq, t].
    """
    width, groups = v.shape[-1], k.shape[2]
    q, k, v = padded(q, k, v, multiple=16 if fp8 else 8)
    if (q.shape[-1], v.shape[-1]) not in PAIRS_OF_WIDTHS:
        q, k, v = same_width(q, k, v)
    settings: dict[str, object] = dict(softmax_scale=scale, causal=causal, return_attn_probs=True)
    if fp8:
        count = len(documents) if documents is not None else q.shape[0]
        grouped, q_scale = quantise(q.unflatten(2, (groups, -1)).flatten(3))
        q = grouped.view(q.shape)
        (k, k_scale), (v, v_scale) = quantise(k, centred=True), quantise(v)
        scales = zip(("q_descale", "k_descale", "v_descale"), (q_scale, k_scale, v_scale))
        settings |= {name: x.expand(count, groups) for name, x in scales}
    q, k, v = (readable(x) for x in (q, k, v))
    kernels = importlib.import_module(MODULE)
    if documents is None:
        out, log_sum = kernels.flash_attn_func(q, k, v, **settings)
    else:
        keys = slice(documents[0][1].start, documents[-1][1].stop)
        queries, seen = (
            tuple(edges) for edges in zip(*((part.stop - part.start, of.stop - of.start) for part, of in documents))
        )
        out, log_sum = kernels.flash_attn_varlen_func(
            q[0], k[0, keys], v[0, keys], cu_seqlens(queries, q.device), cu_seqlens(seen, q.device), max(queries), max(seen),
            **settings,
        )  # fmt: skip
        out = out.unsqueeze(0)
    return out[..., :width], log_sum


@functools.lru_cache(maxsize=16)
def cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where lengths laid end to end begin, and the last one's end: int32 [lengths + 1]; kept, as every layer asks."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def quantise(x: Tensor, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise to E4M3 by a power of two, the smallest that no value exceeds: bf16 values are scaled without rounding.

    Args:
        x: [b, s, h, d].
        centred: without the mean over the tokens of each channel.

    Returns:
        float8_e4m3fn [b, s, h, d] and the fp32 factors [b, h] that undo the scaling.
    """
    if centred:
        x = x - x.mean(1, keepdim=True, dtype=torch.float32)
    largest = torch.linalg.vector_norm(x, torch.inf, (1, 3)).float().clamp_min(1e-30)
    factor = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    return (x * factor.reciprocal().to(x.dtype)[:, None, :, None]).to(torch.float8_e4m3fn), factor
