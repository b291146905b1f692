"""Sequences of different lengths decoded together, their cached tokens one after the other in one pool of rows.

A sequence has as many neighbouring rows as its prompt and its new tokens can take, so a batch holds the sum of its lengths, not
the longest one times their number, and the attention kernel reads no more than that. Since a sequence's largest length is known
when it begins, pages would hold the same tokens; neighbouring rows need no table of pages in any kernel, and a prompt is read
straight into them by the code that reads every prompt. What ended sequences leave becomes one piece again by moving the others
together, which copies rows at the memory's bandwidth: less than reading the next prompt takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hylo.hf import HyloCache, HyloForCausalLM
from megatron_hylo.hf.attention_hylo import HyloLatentAttention
from megatron_hylo.hf.cache_hylo import cache_nbytes, free_bytes, plain_bytes
from megatron_hylo.hf.decode_hylo import DecodeGraph, unsupported
from megatron_hylo.hf.inputs_hylo import SequenceInputs


@dataclass
class Extent:
    """Rows of one sequence in the pool."""

    start: int
    size: int
    length: int = 0  # rows that hold tokens
    alone: HyloCache | None = None  # its cache, where each sequence is decoded by itself


def pool_nbytes(model: HyloForCausalLM, slots: int, tokens: int, latents: str | None = None) -> int:
    """Return the bytes of a pool of cached tokens and of the states of `slots` sequences.

    Args:
        model: whose layers cache.
        slots: sequences that are decoded together.
        tokens: rows that all of them share; one more takes the tokens of empty slots.
        latents: 8-bit format of MLA's latents, or None.
    """
    row, states = (cache_nbytes(model.config, n, model.dtype.itemsize, latents) for n in (tokens + 1, 0))
    return row + (slots - 1) * states


def tokens_that_fit(model: HyloForCausalLM, slots: int, memory: float, latents: str | None = None) -> int:
    """Return the tokens of the largest pool that takes no more than `memory` bytes with its states.

    Other arguments as of `pool_nbytes`. 0 where there is none; 2^40 where no layer caches tokens and the states fit.
    """
    least, more = (pool_nbytes(model, slots, n, latents) for n in (0, 1))
    if more == least:  # no layer caches tokens
        return 2**40 if memory >= least else 0
    return max(0, int((memory - least) // (more - least)))


class PackedCache(HyloCache):
    """Cache of up to `slots` sequences of different lengths, which come and go one by one.

    Args:
        model: in eval mode.
        slots: sequences that are decoded together.
        tokens: rows of the pool, for all of them.
        latents: "int8" or "fp8" keeps MLA's latents in 8 bits; None: the model's dtype.

    Raises:
        ValueError: the pool is larger than the free memory, or as for `HyloCache`.
    """

    @torch.no_grad()
    def __init__(self, model: HyloForCausalLM, slots: int, tokens: int, latents: str | None = None) -> None:
        super().__init__(tokens, latents)
        wanted, free = pool_nbytes(model, slots, tokens, latents), free_bytes(model.device)
        if free is not None and wanted > free:
            smaller = pool_nbytes(model, slots, tokens, "fp8") < wanted
            raise ValueError(
                f"a cache of {tokens:,} tokens for {slots:,} sequences takes {wanted / 2**30:.1f} GiB, but {free / 2**30:.1f} "
                f"GiB of the memory are free, which hold {tokens_that_fit(model, slots, free, latents):,} tokens; use fewer "
                f"sequences or tokens" + (", or latents='fp8'" if smaller else "")
            )
        self.packed, self.batch_size = True, slots
        self.extents: list[Extent | None] = [None] * slots
        self.changed = True  # extents, since the device's table of them was written
        like = HyloCache(latents=latents)
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=like, logits_to_keep=1)
        # the last row takes the tokens of empty slots, which are read with all others
        self.rows = {layer: tuple(x.new_empty(1, tokens + 1, *x.shape[2:]) for x in rows) for layer, rows in like.rows.items()}
        self.states = {
            layer: (conv.new_zeros(slots, *conv.shape[1:]), state.new_zeros(slots, *state.shape[1:]))
            for layer, (conv, state) in like.states.items()
        }
        self.last_position = torch.full((slots, 1), -1, device=model.device)

    def place(self, size: int) -> int | None:
        """Give a sequence of at most `size` tokens a slot and rows; None where none are free."""
        assert self.max_cache_len is not None
        slot = next((number for number, extent in enumerate(self.extents) if extent is None), None)
        if slot is None or sum(extent.size for extent in self._in_order()) + size > self.max_cache_len:
            return None
        start = self._gap(size)
        if start is None:
            self._move_together()
            start = self._gap(size)
            assert start is not None, "all that is free is one piece"
        self.extents[slot], self.changed = Extent(start, size), True
        return slot

    def reader(self, slot: int) -> HyloCache:
        """Make a cache of fixed size over a sequence's rows, to read its prompt with."""
        extent = self.extent(slot)
        cache = HyloCache(extent.size, self.latents)
        cache.rows = self._views(extent)
        return cache

    def fill(self, slot: int, reader: HyloCache, alone: bool = False) -> None:
        """Take over what was read by `reader`: states, and the number of tokens.

        Args:
            slot: the sequence's.
            reader: its cache, which holds the prompt.
            alone: the sequence is decoded by itself, with the reader.

        Raises:
            ValueError: the reader has rows of its own: one of this cache and the reading was in torch.inference_mode() alone.
        """
        extent = self.extent(slot)
        for layer, views in self._views(extent).items():
            if any(view.data_ptr() != read.data_ptr() for view, read in zip(views, reader.rows[layer])):
                raise ValueError(
                    "the prompt was read outside the cache: make and fill it both in torch.inference_mode(), or neither"
                )
        extent.length, extent.alone, self.changed = reader.length, reader if alone else None, True
        for layer, states in () if alone else reader.states.items():
            for held, read in zip(self.states[layer], states):
                held[slot] = read[0]

    def free(self, slot: int) -> None:
        """Give a sequence's slot and rows back."""
        self.extents[slot], self.changed = None, True

    def grow(self) -> None:
        """Count one token more in each sequence."""
        for extent in self._in_order():
            extent.length += 1

    def check_growth(self) -> None:
        """Refuse a token for which a sequence has no row.

        Raises:
            ValueError: a sequence is as long as it can be.
        """
        for slot, extent in enumerate(self.extents):
            if extent is not None and extent.length >= extent.size:
                raise ValueError(f"sequence {slot} has room for {extent.size:,} tokens and holds as many; free it first")

    def token_nbytes(self) -> int:
        """Return the bytes of the rows that hold tokens."""
        held = sum(extent.length for extent in self._in_order())
        return held * sum(x[0, 0].numel() * x.element_size() for x in self._pools())

    def extent(self, slot: int) -> Extent:
        """Return the rows of a slot's sequence."""
        extent = self.extents[slot]
        assert extent is not None, f"slot {slot} holds no sequence"
        return extent

    def _in_order(self) -> list[Extent]:
        """Extents by their place in the pool."""
        return sorted((extent for extent in self.extents if extent is not None), key=lambda extent: extent.start)

    def _gap(self, size: int) -> int | None:
        """First row of the first gap of so many rows."""
        end = 0
        for extent in self._in_order():
            if extent.start - end >= size:
                return end
            end = extent.start + extent.size
        return end if (self.max_cache_len or 0) - end >= size else None

    def _views(self, extent: Extent) -> dict[int, tuple[Tensor, ...]]:
        mine = slice(extent.start, extent.start + extent.size)
        return {layer: tuple(x[:, mine] for x in rows) for layer, rows in self.rows.items()}

    def _move_together(self) -> None:
        """Move all sequences to the pool's beginning."""
        end = 0
        for extent in self._in_order():
            if extent.start != end:
                new, old = (slice(first, first + extent.length) for first in (end, extent.start))
                for x in self._pools():
                    x[:, new] = x[:, old].clone()  # they may overlap
                extent.start, self.changed = end, True
                if extent.alone is not None:
                    extent.alone.rows, extent.alone.graph = self._views(extent), None
            end += extent.size

    def _pools(self) -> Iterable[Tensor]:
        return (plain_bytes(x) for rows in self.rows.values() for x in rows)


def decoded_alone(model: HyloForCausalLM, cache: HyloCache) -> str | None:
    """Say why sequences of different lengths cannot share a pass of this model; None if they can."""
    for layer in model.model.layers:
        mixer = getattr(layer, layer.mixer_name)
        if isinstance(mixer, HyloLatentAttention) and not mixer.absorbs(1):
            return "its keys are made anew in each step" + (", behind a q/k-norm" if mixer.norms else "")
    return unsupported(model, cache)


class PackedDecodeGraph(DecodeGraph):
    """One-token passes over all slots of a packed cache; sequences come, go and move between them, the graph stays.

    Args:
        model: in eval mode, all on one device; `decoded_alone` says of which models it cannot be.
        cache: its tensors are used in place.
        compiles: whether elementwise functions are compiled.
        captures: whether passes on a GPU are captured and replayed.
    """

    cache: PackedCache

    def __init__(self, model: HyloForCausalLM, cache: PackedCache, compiles: bool = False, captures: bool = True) -> None:
        super().__init__(model, cache, compiles)
        self.row, self.starts, self.grows = (
            torch.zeros(cache.batch_size, dtype=torch.int64, device=self.ids.device) for _ in range(3)
        )  # cached tokens, first rows, 1 where there is a sequence
        self.failure = "" if captures else "cuda_graphs is false"

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Read one token a slot: int64 [slots, 1] -> logits [slots, 1, vocabulary], overwritten by the next call.

        Raises:
            ValueError: a sequence has no row left.
        """
        self.cache.check_growth()
        if self.cache.changed:
            self._follow()
        logits = self._replay(ids)
        self.cache.grow()
        return logits

    def _follow(self) -> None:
        """Take over where the sequences are."""
        spare = self.cache.max_cache_len or 0
        table = [(e.length, e.start, 1) if e is not None else (0, spare, 0) for e in self.cache.extents]
        for held, column in zip((self.row, self.starts, self.grows), torch.tensor(table).unbind(1)):
            held.copy_(column)
        self.cache.changed = False

    def _run(self) -> None:
        """Run the pass; nothing in it may wait for the device, copy from the host or change a shape."""
        length, starts = (self.row + 1).int(), self.starts.int()
        self._read(SequenceInputs(self.row[:, None], None, None, length, starts), self.starts + self.row)
        self.row += self.grows
