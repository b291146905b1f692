"""Causal attention of new tokens to all tokens, by what suits their number, their padding and the memory.

One token takes the kernel of decoding, a piece of a long prompt goes block by block, anything else takes a fused kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.blockwise_attention import blockwise_attention

from .inputs_hylo import SequenceInputs

KEYS_AT_ONCE = 65536  # cached tokens of all sequences that a piece of a prompt makes keys and values of at a time
MASK_ELEMENTS = 2**28  # of a mask of queries and keys; with more, each sequence attends to its own tokens, without a mask


def choose_tokens(stored: Tensor, rows: slice, tokens: slice | Tensor) -> Tensor:
    """Return these rows' tokens of a cached tensor [batch, tokens, ...]; not every device has an index kernel for float8."""
    if isinstance(tokens, slice) or stored.element_size() > 1:
        return stored[rows][:, tokens]
    return stored.view(torch.uint8)[rows][:, tokens].view(stored.dtype)


def in_blocks(query: Tensor, total: int, inputs: SequenceInputs, makes_keys: bool) -> bool:
    """Whether new tokens attend block by block: too many keys to make at once, or too large a mask.

    Args:
        query: [batch, new tokens, heads, channels].
        total: tokens, cached ones included.
        inputs: of the sequences; never with probabilities asked for, with a cache of fixed size, or with gradients.
        makes_keys: keys and values are made of what is cached.
    """
    b, t = query.shape[:2]
    if inputs.attentions is not None or inputs.length is not None or torch.is_grad_enabled():
        return False
    masked = inputs.real is not None and t > 1 and b * t * total > MASK_ELEMENTS
    return masked or (makes_keys and t < total and b * total > KEYS_AT_ONCE)


def attend_in_blocks(
    query: Tensor,
    total: int,
    inputs: SequenceInputs,
    scale: float,
    make: Callable[[slice, slice | Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Causal attention of a piece to all tokens, with no more keys and values at a time than `KEYS_AT_ONCE`, without a mask.

    Args:
        query: [batch, new tokens, heads, channels].
        total: cached and new tokens.
        inputs: the pass's padding. With padding each sequence attends by itself, to its real tokens.
        scale: factor on the scores.
        make: keys and values [rows, tokens, groups, ...] of these sequences and tokens, a slice or indices.

    Returns:
        [batch, new tokens, heads, value channels]; zeros at padding.
    """
    b, t = query.shape[:2]
    before = total - t
    if inputs.real is None:
        step, every = max(1, KEYS_AT_ONCE // b), slice(None)
        blocks = (make(every, slice(first, min(first + step, before))) for first in range(0, before, step))
        return blockwise_attention(query, blocks, make(every, slice(before, total)), scale)
    out = None
    for number in range(b):
        row, places = slice(number, number + 1), inputs.real[number].nonzero()[:, 0]
        cached, new = places[places < before], places[places >= before]
        if len(new):
            blocks = (make(row, part) for part in cached.split(KEYS_AT_ONCE) if len(part))
            found = blockwise_attention(query[row][:, new - before], blocks, make(row, new), scale)
            out = found.new_zeros(b, t, *found.shape[2:]) if out is None else out
            out[number, new - before] = found[0]
    if out is None:  # all padding
        value = make(slice(0, 1), slice(0, 1))[1]
        return value.new_zeros(b, t, query.shape[2], value.shape[-1])
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, inputs: SequenceInputs) -> Tensor:
    """Causal attention by a fused kernel, or with its probabilities appended to `inputs.attentions`.

    Args:
        query, key, value: [batch, new or all tokens, heads or groups, channels].
        scale: factor on the scores.
        inputs: the pass's mask.

    Returns:
        [batch, new tokens, heads, value channels].
    """
    if inputs.attentions is None:
        return attention(query, key, value, scale=scale, mask=inputs.visible(query.shape[1]))
    t, (s, groups) = query.shape[1], key.shape[1:3]
    scores = torch.einsum("btgnd,bsgd->bgnts", query.unflatten(2, (groups, -1)), key) * scale
    mask = inputs.visible(t)
    visible = torch.ones(t, s, dtype=torch.bool, device=key.device).tril(s - t) if mask is None else mask[:, None]
    probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~visible, -torch.inf).softmax(-1)
    probabilities = probabilities.to(query.dtype).flatten(1, 2)
    inputs.attentions.append(probabilities)  # the tensor that the outputs come from, so that gradients reach it
    return torch.einsum("bgnts,bsgv->btgnv", probabilities.unflatten(1, (groups, -1)), value).flatten(2, 3)


def decodes(query: Tensor, inputs: SequenceInputs) -> bool:
    """Whether one token attends by the kernel of decoding: on a GPU, and where keys are more rows than are written.

    Args:
        query: [batch, new tokens, heads, channels].
        inputs: of the sequences; `length` is there where the cache has more rows than tokens.
    """
    if inputs.length is not None:
        return True
    plain = query.is_cuda and query.shape[1] == 1 and inputs.attentions is None
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
