"""Positions and masks of a HyLo model's tokens, checked and derived from the caller's inputs and the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from .cache_hylo import HyloCache


class SequenceInputs(NamedTuple):
    """Positions and masks that the layers of one forward pass share."""

    positions: Tensor  # int64 [batch or 1, cached + new tokens]
    padding: Tensor | None  # bool [batch, new tokens], False at padding; None where no new token is padding
    attention_mask: Tensor | None  # bool [batch, 1, new tokens, cached + new tokens]; None where there is no padding
    attentions: list[Tensor] | None = None  # attention layers append their probabilities; None where they are not asked for


def sequence_inputs(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: HyloCache | None
) -> SequenceInputs:
    """Check the inputs of a forward pass and add them to the cache's positions and mask.

    Args:
        tokens: [batch, new tokens, ...], ids or embeddings; only the shape and the device are used.
        attention_mask: [batch, cached + new tokens], 1 at tokens and 0 at padding, which may stand anywhere; None: the new
            tokens have no padding.
        position_ids: int64 [batch or 1, new tokens], rising along a sequence; None: counted, padding left out.
        cache: its `positions`, `attention_mask` and `batch_size` are extended in place.

    Raises:
        ValueError: shapes that disagree, a 4-d or additive mask, positions that start again, another padding of cached tokens.
    """
    batch, new = tokens.shape[:2]
    cached = 0 if cache is None else cache.get_seq_length()
    if cache is not None and cached and batch != cache.batch_size:
        raise ValueError(f"past_key_values holds {cache.batch_size} sequences, but {batch} are given; give as many")
    real = _padding_mask(attention_mask, batch, cached, new, cache)
    before = None if cache is None else cache.positions
    last = torch.full((1, 1), -1, device=tokens.device)  # position of each sequence's last cached token
    if before is not None:
        last = (before if real is None else torch.where(real[:, :cached], before, -1)).amax(1, keepdim=True)
    if position_ids is None:
        counted = torch.arange(new, device=tokens.device)[None] if real is None else real[:, cached:].cumsum(1) - 1
        positions = last + 1 + counted.clamp(min=0)
    else:
        positions = position_ids.to(tokens.device)
        if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != new:
            raise ValueError(f"position_ids must be [{batch} or 1, {new}], got {list(positions.shape)}")
        if len(positions) > 1 and (positions == positions[:1]).all():
            positions = positions[:1]
        _check_rising(last, positions, None if real is None else real[:, cached:])
    if before is not None:
        rows = max(len(before), len(positions))
        positions = torch.cat([before.expand(rows, -1), positions.expand(rows, -1)], dim=1)
    if cache is not None:
        cache.positions, cache.attention_mask, cache.batch_size = positions, real, batch
    if real is None:
        return SequenceInputs(positions, None, None)
    padding = real[:, cached:]
    places = torch.arange(cached + new, device=real.device)
    queries = places[cached:, None]
    # a token sees itself even if it is padding: a row without any key has no softmax
    visible = (places <= queries) & real[:, None, None] | (places == queries)
    return SequenceInputs(positions, None if padding.all() else padding, visible)


def _padding_mask(mask: Tensor | None, batch: int, cached: int, new: int, cache: HyloCache | None) -> Tensor | None:
    """Return the padding mask, bool [batch, cached + new], False at padding; None where there is no padding."""
    known = None if cache is None else cache.attention_mask
    if mask is None:
        return None if known is None else torch.cat([known, known.new_ones(batch, new)], dim=1)
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions, {list(mask.shape)}; recurrent layers see every token before the "
            f"present one, so only padding can be masked: give [batch, tokens] with 1 at tokens and 0 at padding"
        )
    if mask.shape != (batch, cached + new):
        raise ValueError(
            f"attention_mask must be [{batch}, {cached + new}] for {cached} cached and {new} new tokens, got {list(mask.shape)}"
        )
    if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask [batch, tokens] must hold 1 at tokens and 0 at padding; additive masks are not read")
    real = mask.bool()
    if cached and (known is not None or not real[:, :cached].all()):
        before = real.new_ones(batch, cached) if known is None else known
        if not torch.equal(before.to(real.device), real[:, :cached]):
            raise ValueError(
                f"attention_mask marks other tokens as padding than when the {cached} cached ones were read, and recurrent "
                f"states cannot forget a token; give the mask they were read with, or start without past_key_values"
            )
    return None if real.all() else real


def _check_rising(last: Tensor, positions: Tensor, real: Tensor | None) -> None:
    """Refuse positions [batch or 1, new] that do not rise from `last` [batch or 1, 1] on; `real` is False at padding."""
    if real is not None:
        positions = torch.where(real, positions, -1)
    rows = max(len(last), len(positions))
    last, positions = last.expand(rows, -1), positions.expand(rows, -1)
    highest = torch.cat([last, positions[:, :-1]], dim=1).cummax(1).values
    wrong = positions <= highest if real is None else (positions <= highest) & real
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids must rise along each sequence, but {int(positions[row, place])} follows {int(highest[row, place])} "
            f"(sequence {row}, new token {place}). Documents packed into one sequence are not supported, recurrent states "
            f"would go from one into the next: give each document a row of its own, padded, with an attention_mask"
        )
