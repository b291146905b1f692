"""Cache of a HyLo model: latents or keys and values that grow with the sequence, and states of fixed size.

A recurrent state holds no earlier one. So that the cache can go back (assisted generation takes rejected tokens out), it keeps,
once asked to, an earlier state and the recurrence's inputs since then: `crop` runs the recurrence over those that stay.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor | None, Tensor | None]  # convolution's inputs, recurrent state; None before the first token
# inputs [batch, tokens, ...], padding mask or None, states before -> outputs [batch, tokens, ...], states after
Step = Callable[[tuple[Tensor, ...], Tensor | None, States], tuple[Tensor, States]]
SPARE_ROWS = 64  # at least, of buffers that tokens are written into one by one
KEPT_INPUTS = 64  # tokens that `crop` can at least take out; assisted generation proposes about 20 at a time


class Recent(NamedTuple):
    """A linear layer's inputs since an earlier state."""

    step: Step
    states: States  # before the inputs
    inputs: tuple[Tensor, ...]  # [batch, tokens, ...], the last one the padding mask

    def after(self, tokens: int) -> States:
        """Compute the states after so many of the inputs' tokens."""
        return run(self.step, tuple(part[:, :tokens] for part in self.inputs), self.states)[1] if tokens else self.states


def run(step: Step, inputs: tuple[Tensor, ...], states: States) -> tuple[Tensor, States]:
    """Take a step over inputs whose last part is the padding mask."""
    *parts, padding = inputs
    return step(tuple(parts), None if padding.all() else padding, states)


class HyloCache:
    """Cached tensors of all layers, for all sequences of a batch."""

    is_compileable = False  # asked by generate(): tensors grow, so nothing to compile for
    is_croppable = False  # not by itself: recurrent states go back only while the past is recorded

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[Tensor, ...]] = {}  # layer -> tensors [batch, sequence, ...], one row a token
        self.buffers: dict[int, tuple[Tensor, ...]] = {}  # layer -> what `tokens` are the first rows of, after short pieces
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (convolution's inputs, recurrent state)
        self.positions: Tensor | None = None  # int64 [batch or 1, sequence], for the rotary embedding
        self.attention_mask: Tensor | None = None  # bool [batch, sequence], False at padding; None: there is none
        self.batch_size = 0  # 0 before the first token
        self.records_past = False
        self.recent: dict[int, Recent] = {}  # linear layers, where the past is recorded

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append the rows of new tokens, [batch, new tokens, ...] each, and return those of all tokens."""
        held = self.tokens.get(layer)
        self.tokens[layer] = new if held is None else self._appended(layer, held, new)
        return self.tokens[layer]

    def _appended(self, layer: int, held: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return held and new rows; a few new ones are written into spare rows, so that not all are copied each time."""
        length, count = held[0].shape[1], new[0].shape[1]
        total = length + count
        if count > SPARE_ROWS or torch.is_grad_enabled():
            self.buffers.pop(layer, None)
            return tuple(torch.cat(pair, dim=1) for pair in zip(held, new))
        buffers = self.buffers.get(layer)
        if buffers is None or buffers[0].shape[1] < total or buffers[0].is_inference() != torch.is_inference_mode_enabled():
            rows = total + max(SPARE_ROWS, total // 16)
            buffers = tuple(old.new_empty(old.shape[0], rows, *old.shape[2:]) for old in held)
            for buffer, old in zip(buffers, held):
                buffer[:, :length] = old
            self.buffers[layer] = buffers
        for buffer, added in zip(buffers, new):
            buffer[:, length:total] = added
        return tuple(buffer[:, :total] for buffer in buffers)

    def advance(self, layer: int, step: Step, parts: tuple[Tensor, ...], padding: Tensor | None) -> Tensor:
        """Take a linear layer's step over new tokens, from its states and into them.

        Args:
            layer: number of the layer.
            step: computes outputs and states.
            parts: the step's inputs, [batch, new tokens, ...] each.
            padding: bool [batch, new tokens], False at padding.

        Returns:
            The outputs [batch, new tokens, ...].
        """
        states: States = self.states.get(layer, (None, None))
        if not self.records_past:
            outputs, states = step(parts, padding, states)
            self._keep(layer, states)
            return outputs
        batch, tokens = parts[0].shape[:2]
        inputs = (*parts, parts[0].new_ones(batch, tokens, dtype=torch.bool) if padding is None else padding)
        begun: list[Tensor] = []
        if tokens > KEPT_INPUTS:  # the first ones of a long prompt stay
            first, inputs = (
                tuple(part[:, piece] for part in inputs) for piece in (slice(-KEPT_INPUTS), slice(-KEPT_INPUTS, None))
            )
            outputs, states = run(step, first, states)
            begun, self.recent = [outputs], {key: value for key, value in self.recent.items() if key != layer}
        outputs, after = run(step, inputs, states)
        recent = self.recent.get(layer)
        if recent is None:
            recent = Recent(step, states, inputs)
        else:
            recent = recent._replace(inputs=tuple(torch.cat(pair, dim=1) for pair in zip(recent.inputs, inputs)))
        if (spare := recent.inputs[0].shape[1] - KEPT_INPUTS) > KEPT_INPUTS:
            recent = Recent(step, recent.after(spare), tuple(part[:, spare:] for part in recent.inputs))
        self.recent[layer] = recent
        self._keep(layer, after)
        return torch.cat([*begun, outputs], dim=1)

    def _keep(self, layer: int, states: States) -> None:
        conv, state = states
        assert conv is not None and state is not None, "a step returns both"
        self.states[layer] = (conv, state)

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on; called by assisted generation."""
        self.records_past = True

    def crop(self, tokens: int) -> None:
        """Take the last tokens out, among those read since the past is recorded and since it was cropped last.

        Args:
            tokens: minus the number of tokens to take out, as in transformers 5; above 0 the number to keep, as in 4.

        Raises:
            ValueError: a linear layer's earlier state is not known.
        """
        length = self.get_seq_length()
        kept = min(tokens, length) if tokens > 0 else length + tokens
        known = min((recent.inputs[0].shape[1] for recent in self.recent.values()), default=0)
        if kept < 0 or (self.states and length - kept > known):
            raise ValueError(
                f"{length - kept} of {length} cached tokens are to be taken out, but the recurrent layers can go back {known}: "
                f"call activate_past_recording() before reading tokens that may be taken out, or read the prompt again"
            )
        self.tokens = {layer: tuple(t[:, :kept] for t in held) for layer, held in self.tokens.items()}
        for layer, recent in self.recent.items():
            count = recent.inputs[0].shape[1] - (length - kept)
            states: States = recent.after(count) if kept < length else self.states[layer]
            if states[0] is None:
                del self.states[layer]
            else:
                self._keep(layer, states)
            self.recent[layer] = Recent(recent.step, states, tuple(part[:, :0] for part in recent.inputs))
        self.positions = None if self.positions is None or not kept else self.positions[:, :kept]
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[:, :kept]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: the cache has no largest length."""
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence so many times, the copies of one beside each other."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these numbers."""
        self.reorder_cache(indices)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, padding included."""
        return 0 if self.positions is None else self.positions.shape[1]

    def token_nbytes(self) -> int:
        """Return the bytes that grow with the sequence: the KV cache in the narrow sense."""
        return sum(t.numel() * t.element_size() for tensors in self.tokens.values() for t in tensors)

    def nbytes(self) -> int:
        """Return the bytes of the whole cache, the linear layers' states included."""
        states = sum(t.numel() * t.element_size() for tensors in self.states.values() for t in tensors)
        return self.token_nbytes() + states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by a copy of sequence beam_idx[i] (beam search)."""
        for layer, tokens in self.tokens.items():
            self.tokens[layer] = tuple(t.index_select(0, beam_idx.to(t.device)) for t in tokens)
        for layer, (conv, state) in self.states.items():
            self.states[layer] = (
                conv.index_select(0, beam_idx.to(conv.device)),
                state.index_select(0, beam_idx.to(state.device)),
            )
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask.index_select(0, beam_idx.to(self.attention_mask.device))
        self.recent, self.buffers = {}, {}
        self.batch_size = len(beam_idx)
