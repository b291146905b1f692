"""Causal attention of queries fewer than keys, as on a rank of context parallelism that has gathered keys.

cuDNN's causal kernels want as many keys as queries. So the keys are two blocks: those before the first query, which every query
sees, and the queries' own, causal. Each block's softmax sums to one; with l_i the logarithms of what they were divided by, and
l = log(exp l_1 + exp l_2), the whole is

    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.

A block's backward kernel makes its probabilities from the scores and l (FlashAttention-2, arXiv:2307.08691, algorithm 2): given
o and l of the whole, the two give the gradients of the whole.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def attention_after_prefix(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention softmax(scale q k^T) v, the last query aligned with the last key.

    Args:
        q: [b, hq, t, d], what cuDNN takes.
        k: [b, hkv, s, d], s > t.
        v: [b, hkv, s, dv].
        scale: factor on the scores.

    Returns:
        [b, hq, t, dv].
    """
    return _AfterPrefix.apply(q, k, v, scale)


class _AfterPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the outputs [b, hq, t, dv]; keeps them and the softmax's log sums, as the backward kernels need them."""
        before = k.shape[2] - q.shape[2]
        blocks = [(k[:, :, :before], v[:, :, :before], False), (k[:, :, before:], v[:, :, before:], True)]
        (seen, log_seen, *_), (own, log_own, *rest) = (_block(q, *block, scale) for block in blocks)
        log_sum = torch.logaddexp(log_seen, log_own)
        wide = torch.promote_types(q.dtype, torch.float32)
        weight = (log_seen - log_sum).exp().reshape(*q.shape[:3], 1).to(wide)
        out = torch.lerp(own.to(wide), seen.to(wide), weight).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.before, ctx.scale, ctx.rest = before, scale, rest
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v, each block's with the outputs and log sums of the whole."""
        q, k, v, out, log_sum = ctx.saved_tensors
        blocks = [(slice(0, ctx.before), False), (slice(ctx.before, None), True)]
        (dq, *seen), (dq_own, *own) = (
            _block_gradients(grad, q, k[:, :, keys], v[:, :, keys], out, log_sum, ctx.rest, causal, ctx.scale)
            for keys, causal in blocks
        )
        return dq + dq_own, *(torch.cat(pair, 2) for pair in zip(seen, own)), None


def _block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Attention to one block of keys: output, log of the softmax's sums, and the backward kernel's random state."""
    out, log_sum, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, log_sum, seed, offset


def _block_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, rest: list[Tensor], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of one block's k and v, from the whole's output, its gradient and log_sum."""
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, log_sum, *rest, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )
