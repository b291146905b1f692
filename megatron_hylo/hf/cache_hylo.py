"""Cache of a HyLo model: latents or keys and values, one row a token, and states of fixed size.

A recurrent state holds no earlier one. So that the cache can go back (assisted generation takes rejected tokens out), it keeps,
once asked to, an earlier state and the recurrence's inputs since then: `crop` runs the recurrence over those that stay.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.quantised_latents import FORMATS

States = tuple[Tensor | None, Tensor | None]  # convolution's inputs, recurrent state; None before the first token
# inputs [batch, tokens, ...], padding mask or None, states before -> outputs [batch, tokens, ...], states after
Step = Callable[..., tuple[Tensor, States]]
SPARE_ROWS = 64  # at least, of buffers that tokens are written into one by one
MEMINFO = Path("/proc/meminfo")
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
    """Take a step over inputs [batch, tokens, ...] whose last part is the padding mask, bool [batch, tokens].

    The step gets None for a mask without padding. Returns its outputs [batch, tokens, ...] and the states after it.
    """
    *parts, padding = inputs
    return step(tuple(parts), None if padding.all() else padding, states)


class HyloCache:
    """Cached tensors of all layers, for all sequences of a batch; it grows, or has its size from the start.

    Args:
        max_cache_len: rows that every layer with one row a token gets when the first tokens come; later ones are written in
            their place and nothing moves. None: rows are added as tokens come.
        latents: "int8" or "fp8" keeps MLA's latents and rotary keys in 8 bits, with two bf16 scales a token; None: the
            model's dtype.

    Raises:
        ValueError: no positive length, or an unknown format.
    """

    is_compileable = False  # asked by generate(), which would compile the whole model; decode_hylo.py captures a graph instead
    is_croppable = False  # not by itself: recurrent states go back only while the past is recorded

    def __init__(self, max_cache_len: int | None = None, latents: str | None = None) -> None:
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1, got {max_cache_len}")
        if latents is not None and latents not in FORMATS:
            raise ValueError(f"latents {latents!r} is no format of a cache; use {', '.join(map(repr, FORMATS))} or None")
        self.max_cache_len, self.latents = max_cache_len, latents
        self.length = 0  # tokens, padding included
        self.rows: dict[int, tuple[Tensor, ...]] = {}  # layer -> [batch, rows, ...], one a token, perhaps spare ones at the end
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (convolution's inputs, recurrent state)
        self.last_position: Tensor | None = None  # int64 [batch or 1, 1], of the last token; None before the first
        self.positions: Tensor | None = None  # int64 [batch or 1, sequence], where a caller gave others than counted ones
        self.padding: Tensor | None = None  # bool [batch, first tokens], False at padding; None: there is none
        self.batch_size = 0  # 0 before the first token
        self.description: dict[str, Any] | None = None  # `hylo` of the configuration of the model that fills it
        self.records_past = False
        self.recent: dict[int, Recent] = {}  # linear layers, where the past is recorded
        # int64, where the one new token goes, while decode_hylo.py runs or captures a pass: [1], or [batch] of a packed one
        self.row: Tensor | None = None
        self.packed = False  # rows are [1, rows of all sequences, ...] (serve/packed_cache.py)
        self.graph: Any = None  # decode_hylo.DecodeGraph of the model that last decoded with this cache

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append the rows of new tokens, [batch, new tokens, ...] each, and return those of all `length` tokens.

        In a pass of decode_hylo.py all rows there are returned, those that are not written yet too.
        """
        if self.row is not None:
            for held, added in zip(self.rows[layer], new):
                added = added.transpose(0, 1) if self.packed else added
                plain_bytes(held).index_copy_(1, self.row, plain_bytes(added))
            return self.rows[layer]
        total, count = self.length, new[0].shape[1]
        rows, before = self.rows.get(layer), total - count
        if self.max_cache_len is None and (count > SPARE_ROWS or torch.is_grad_enabled() or not before or rows is None):
            grown = new if rows is None else tuple(torch.cat([r[:, :before], a], dim=1) for r, a in zip(rows, new))
            self.rows[layer] = grown
            return grown
        outdated = rows is not None and rows[0].is_inference() != torch.is_inference_mode_enabled()
        if rows is None or rows[0].shape[1] < total or outdated:  # a few new tokens do not copy all of them each time
            capacity = self.max_cache_len or total + max(SPARE_ROWS, total // 16)
            wider = tuple(added.new_empty(added.shape[0], capacity, *added.shape[2:]) for added in new)
            for wide, held in zip(wider, rows or ()):
                wide[:, :before] = held[:, :before]
            self.rows[layer], self.graph = wider, None
            rows = wider
        for held, added in zip(rows, new):
            held[:, before:total] = added
        return tuple(held[:, :total] for held in rows)

    @property
    def tokens(self) -> dict[int, tuple[Tensor, ...]]:
        """Layer -> tensors [batch, cached tokens, ...]."""
        return {layer: tuple(held[:, : self.length] for held in rows) for layer, rows in self.rows.items()}

    def known_padding(self) -> Tensor | None:
        """Return bool [batch, all cached tokens], False at padding; None where there is no padding."""
        if self.padding is None:
            return None
        return F.pad(self.padding, (0, self.length - self.padding.shape[1]), value=True)

    def all_positions(self) -> Tensor:
        """Return the positions of all cached tokens, int64 [batch or 1, tokens]; those of padding mean nothing."""
        if self.positions is not None:
            return self.positions
        real = self.known_padding()
        if real is not None:
            return (real.cumsum(1) - 1).clamp(min=0)
        return torch.arange(self.length, device=None if self.last_position is None else self.last_position.device)[None]

    def check_room(self, batch: int, tokens: int) -> None:
        """Refuse tokens that the cache has no rows for.

        Raises:
            ValueError: they would be more than `max_cache_len`, or the sequences are others than those it holds.
        """
        if self.length and batch != self.batch_size:
            raise ValueError(f"past_key_values holds {self.batch_size} sequences, but {batch} are given; give as many")
        if self.max_cache_len is not None and self.length + tokens > self.max_cache_len:
            raise ValueError(
                f"past_key_values has room for {self.max_cache_len:,} tokens (max_cache_len), holds {self.length:,} and is "
                f"given {tokens:,} more; make it larger, or leave max_cache_len out for a cache that grows"
            )

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
        if torch.is_grad_enabled() and states[1] is not None and states[1].is_inference():  # which autograd cannot keep
            states = (None if states[0] is None else states[0].clone(), states[1].clone())
        if self.row is not None:  # states lie where a captured graph reads and writes them
            outputs, states = step(parts, padding, states, in_place=True)
            self._keep(layer, states)
            return outputs
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
        """Hold states; a cache of fixed size keeps its tensors, whose addresses a captured graph has."""
        conv, state = states
        assert conv is not None and state is not None, "a step returns both"
        held = self.states.get(layer)
        moves = self.max_cache_len is None or self.records_past or torch.is_grad_enabled()
        if held is None or moves or held[0].is_inference() != torch.is_inference_mode_enabled():
            self.states[layer], self.graph = (conv, state), None
            return
        for old, new in zip(held, (conv, state)):
            if old is not new:  # a decode step may have written in place
                old.copy_(new)

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
        for layer, recent in self.recent.items():
            count = recent.inputs[0].shape[1] - (length - kept)
            states: States = recent.after(count) if kept < length else self.states[layer]
            if states[0] is None:
                del self.states[layer]
            else:
                self._keep(layer, states)
            self.recent[layer] = Recent(recent.step, states, tuple(part[:, :0] for part in recent.inputs))
        places, real = self.all_positions()[:, :kept], self.known_padding()
        self.padding = real = None if real is None else real[:, :kept]
        self.positions = None if self.positions is None else places
        self.last_position = (places if real is None else torch.where(real, places, -1)).amax(1, keepdim=True) if kept else None
        self.length = kept

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return `max_cache_len`, -1 where the cache has no largest length."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence so many times, the copies of one beside each other."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these numbers, int64 [sequences that stay]."""
        self.reorder_cache(indices)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, padding included."""
        return self.length

    def token_nbytes(self) -> int:
        """Return the bytes that grow with the sequence: the KV cache in the narrow sense, without spare rows."""
        return sum(t.numel() * t.element_size() for tensors in self.tokens.values() for t in tensors)

    def nbytes(self) -> int:
        """Return the bytes of the whole cache, the linear layers' states included."""
        states = sum(t.numel() * t.element_size() for tensors in self.states.values() for t in tensors)
        return self.token_nbytes() + states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by a copy of sequence beam_idx[i], int64 [sequences] (beam search)."""
        fixed = self.max_cache_len is not None
        same = fixed and len(beam_idx) == self.batch_size
        stores: list[tuple[dict[int, Any], int | None]] = [(self.rows, self.length), (self.states, None)]
        for store, count in stores:
            for layer, tensors in store.items():
                old = [plain_bytes(t) for t in tensors]
                new = [t[:, :count].index_select(0, beam_idx.to(t.device)) for t in old]
                if fixed and count is not None and not same:  # rows for another number of sequences
                    old = [t.new_empty(len(beam_idx), *t.shape[1:]) for t in old]
                if same or (fixed and count is not None):
                    for place, chosen in zip(old, new):
                        place[:, :count] = chosen
                    new = old
                if not same:
                    store[layer] = tuple(chosen.view(t.dtype) for t, chosen in zip(tensors, new))
        for name in ("last_position", "positions", "padding"):
            if (kept := getattr(self, name)) is not None and len(kept) > 1:
                setattr(self, name, kept.index_select(0, beam_idx.to(kept.device)))
        self.recent, self.graph = {}, self.graph if same else None
        self.batch_size = len(beam_idx)


def plain_bytes(x: Tensor) -> Tensor:
    """View a tensor of 8-bit elements (float8) as uint8, for which every device has kernels; others stay."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that new tensors can take in a device's memory; None where it does not say so.

    Of a CPU the machine's: a container's limit may be lower.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu" and MEMINFO.is_file():
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
        return None if found is None else 1024 * int(found[1])
    return None


def _delta_rule_cache(c: Any) -> tuple[int, int, int]:
    keys, values = c.linear_num_heads * c.linear_key_head_dim, c.linear_num_heads * c.linear_value_head_dim
    return 0, keys * c.linear_value_head_dim, 2 * keys + values


# symbol -> what a layer caches of a sequence: numbers a token, numbers of the recurrent state, channels of the convolution
CACHED: dict[str, Callable[[Any], tuple[int, int, int]]] = {
    "*": lambda c: (2 * c.num_query_groups * c.kv_channels, 0, 0),
    "+": lambda c: (c.kv_lora_rank + c.qk_pos_emb_head_dim, 0, 0),
    "M": lambda c: (
        0,
        c.mamba_num_heads * c.mamba_head_dim * c.mamba_state_dim,
        c.num_query_groups * (c.mamba_head_dim + c.mamba_state_dim) + c.mamba_num_heads * c.mamba_state_dim,
    ),
    "G": _delta_rule_cache,
    "K": _delta_rule_cache,
    "W": lambda c: (0, 0, 0),  # rows of a window alone, which `cache_nbytes` counts
}


def cache_nbytes(config: Any, tokens: int, element_size: int, latents: str | None = None) -> int:
    """Return the bytes of one sequence's cache of so many tokens, states included.

    Args:
        config: HyloConfig of the model.
        tokens: of the sequence.
        element_size: bytes of an element in the model's dtype; recurrent states are fp32.
        latents: not None: MLA's rows are 8 bits wide with two bf16 scales.
    """
    c, total = config.architecture(), 0
    for symbol in config.mixers:
        row, state, channels = CACHED[symbol](c)
        narrow = latents is not None and symbol == "+"
        total += tokens * (row + 4 if narrow else row * element_size)
        total += 4 * state + channels * (c.linear_conv_kernel_dim - 1) * element_size
        if symbol == "W":  # keys and values, and which of the rows are tokens
            total += c.attention_window * (2 * c.num_query_groups * c.kv_channels * element_size + 1)
    return total
