"""Positions and masks of a HyLo model's tokens, checked and derived from the caller's inputs and the cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.kernels.registry import exporting

from .cache_hylo import HyloCache

NO_PACKING = (
    "documents packed into one sequence are not supported, recurrent states would go from one into the next: give each "
    "document a row of its own, padded, with an attention_mask"
)


@dataclass
class SequenceInputs:
    """Positions and masks that the layers of one forward pass share."""

    positions: Tensor  # int64 [batch or 1, new tokens], or of all tokens where cached keys are rotated anew
    padding: Tensor | None  # bool [batch, new tokens], False at padding; None where no new token is padding
    real: Tensor | None  # bool [batch, cached + new tokens], False at padding; None where there is no padding
    length: Tensor | None = None  # int32 [1], cached + new tokens, in a pass of decode_hylo.py, whose keys are all rows
    starts: Tensor | None = None  # int32 [batch], first rows of a packed batch's sequences; `length` is of each then
    attentions: list[Tensor] | None = None  # attention layers append their probabilities; None where they are not asked for
    mask: Tensor | None = None  # what `visible` found

    def visible(self, new: int) -> Tensor | None:
        """Return the keys that each new token sees, bool [batch, 1, new, cached + new]; None where there is no padding."""
        if self.real is not None and self.mask is None:
            places = torch.arange(self.real.shape[1], device=self.real.device)
            queries = places[len(places) - new :, None]
            # a token sees itself even if it is padding: a row without any key has no softmax
            self.mask = (places <= queries) & self.real[:, None, None] | (places == queries)
        return self.mask


def check_cache(cache: Any, config: Any) -> None:
    """Refuse the caches of other models; an empty one belongs to this model from here on.

    Args:
        cache: `past_key_values` of a forward pass, or None.
        config: HyloConfig of the model.

    Raises:
        ValueError: no HyloCache, or one that a model of other layers or sizes has filled.
    """
    if cache is None:
        return
    if not isinstance(cache, HyloCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, but a HyLo model has latents and recurrent states, in a HyloCache: "
            f"leave it out; with use_cache=True the output holds one as past_key_values, to be given with the next tokens"
        )
    if cache.description is None or not cache.length:
        cache.description = config.hylo
    elif cache.description is not config.hylo and cache.description != config.hylo:
        other, own = cache.description, config.hylo
        name = next(name for name in own | other if own.get(name) != other.get(name))
        raise ValueError(
            f"past_key_values was filled by another model, whose {name} is {other.get(name)!r}, not {own.get(name)!r}; give "
            f"this model the cache of its own outputs, or leave past_key_values out and read the prompt again"
        )


def sequence_inputs(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: HyloCache | None, every: bool = False
) -> SequenceInputs:
    """Check the inputs of a forward pass and add them to the cache's positions and padding.

    Args:
        tokens: embeddings [batch, new tokens, hidden]; only the shape and the device are used.
        attention_mask: [batch, cached + new tokens], 1 at tokens and 0 at padding, which may stand anywhere; None: the new
            tokens have no padding.
        position_ids: int64 [batch or 1, new tokens], rising along a sequence; None: counted, padding left out.
        cache: its length, positions, padding and batch size are changed in place.
        every: return the positions of cached tokens too.

    Raises:
        ValueError: no tokens, shapes that disagree, a mask that is 4-d, additive or of documents' numbers, positions that are
            no integers, start again or are below 0, another padding of cached tokens, more tokens than a cache of fixed size
            has room for.
    """
    if tokens.dim() != 3 or not tokens.shape[1]:
        raise ValueError(
            f"give input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden] of a token at least; the embeddings are "
            f"{list(tokens.shape)}"
        )
    batch, new = tokens.shape[:2]
    cached = 0 if cache is None else cache.get_seq_length()
    if cache is not None:
        cache.check_room(batch, new)
    real = _padding_mask(attention_mask, batch, cached, new, cache)
    last = None if cache is None else cache.last_position
    if last is None:
        last = torch.full((1, 1), -1, device=tokens.device)
    counted = torch.arange(new, device=tokens.device)[None] if real is None else real[:, cached:].cumsum(1) - 1
    positions = last + 1 + counted.clamp(min=0)
    before = cache.all_positions() if cache is not None and cached and (every or position_ids is not None) else None
    own = False  # whether positions are others than counted ones
    if position_ids is not None:
        given = position_ids.to(tokens.device)
        if given.is_floating_point():
            raise ValueError(f"position_ids must be integers, got {given.dtype}")
        if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != new:
            raise ValueError(f"position_ids must be [{batch} or 1, {new}], got {list(given.shape)}")
        if len(given) > 1 and not exporting() and (given == given[:1]).all():
            given = given[:1]
        added = None if real is None else real[:, cached:]
        if not exporting():
            _check_rising(last, given, added)
        different = given != positions if added is None else (given != positions) & added
        own = exporting() or bool(different.any())
        positions = given if own else positions
    everything = positions if before is None else _side_by_side(before, positions)
    if cache is not None:
        if own or cache.positions is not None:
            known = cache.positions if before is None else before
            cache.positions = positions if known is None or not cached else _side_by_side(known, positions)
        cache.padding, cache.batch_size, cache.length = real, batch, cached + new
        cache.last_position = (positions if real is None else torch.where(real[:, cached:], positions, last)).amax(
            1, keepdim=True
        )
    added = None if real is None or (not exporting() and real[:, cached:].all()) else real[:, cached:]
    return SequenceInputs(everything if every else positions, added, real)


def _side_by_side(before: Tensor, new: Tensor) -> Tensor:
    rows = max(len(before), len(new))
    return torch.cat([before.expand(rows, -1), new.expand(rows, -1)], dim=1)


def _padding_mask(mask: Tensor | None, batch: int, cached: int, new: int, cache: HyloCache | None) -> Tensor | None:
    """Return the padding mask, bool [batch, cached + new], False at padding; None where there is no padding."""
    known = None if cache is None else cache.known_padding()
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
    real = mask == 1
    complete = not exporting() and bool(real.all())
    if not complete and not exporting() and not (real | (mask == 0)).all():
        wrong = mask[~(real | (mask == 0))][0].item()
        raise ValueError(
            f"attention_mask [batch, tokens] must hold 1 at tokens and 0 at padding, got {wrong:g}; neither additive masks nor "
            f"numbers of documents are read"
        )
    if cached and not exporting() and (known is not None or not real[:, :cached].all()):
        before = real.new_ones(batch, cached) if known is None else known
        if not torch.equal(before.to(real.device), real[:, :cached]):
            raise ValueError(
                f"attention_mask marks other tokens as padding than when the {cached} cached ones were read, and recurrent "
                f"states cannot forget a token; give the mask they were read with, or start without past_key_values"
            )
    return None if complete else real


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
        if positions[row, place] < 0:
            raise ValueError(f"positions start at 0, but position_ids holds {int(positions[row, place])} (sequence {row})")
        raise ValueError(
            f"position_ids must rise along each sequence, but {int(positions[row, place])} follows {int(highest[row, place])} "
            f"(sequence {row}, new token {place}); {NO_PACKING}"
        )
