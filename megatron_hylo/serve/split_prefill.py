"""Prefill of one long prompt on several GPUs: ranks read different pieces of it at the same time, each through the whole model.

A layer needs of earlier pieces what it has cached of them and nothing else: rows (latents, keys and values) or a state. So
rank r of n reads pieces r, r + n, r + 2n, ..., and hands each layer's cache on to the rank of the next piece as soon as it is
there. A rank lags behind the one before it by the time of a layer or less, and computes what one GPU does that reads the same
pieces. Messages go one way around a ring: a state, or the rows of the last n - 1 pieces, which the next rank does not have.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.hf import HyloCache, HyloForCausalLM
from megatron_hylo.hf.cache_hylo import Step

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"  # of a GPU's work, 8 where it is not set; CUDA reads it when a process starts
STREAMS = 3  # of a rank: what it computes, sends and receives


class Ring:
    """Connections of all ranks, each to the next one; made by all of them together.

    Args:
        device: what messages lie on.

    Raises:
        ConfigError: the GPU takes its work from so few queues that a message which waits for its receiver holds up the rest.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and int(os.environ.get(QUEUES) or STREAMS) < STREAMS:
            raise ConfigError(
                f"{QUEUES} is {os.environ[QUEUES]}: a prompt split over GPUs would wait for itself, as a GPU's messages and "
                f"kernels need {STREAMS} queues; unset it, or give 8"
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.pending: list[tuple[dist.Work | None, Tensor]] = []  # sent, perhaps not received yet
        # a group for each connection: two ranks are connected in both directions, whose messages have no common order
        self.groups = [dist.new_group([rank, (rank + 1) % self.size]) for rank in range(self.size)]
        for sender in range(self.size):  # NCCL connects when first used and waits for both ranks
            if sender == self.rank:
                self.send(torch.zeros(1, device=device))
            if (sender + 1) % self.size == self.rank:
                self.receive(torch.empty(1, device=device))

    def send(self, x: Tensor) -> None:
        """Start to send x, of any shape and dtype, to the next rank; its memory must not be written to until `finish`."""
        x = _bytes(x.contiguous())
        work = dist.isend(x, (self.rank + 1) % self.size, group=self.groups[self.rank])
        self.pending = [(w, kept) for w, kept in self.pending if w is not None and not w.is_completed()] + [(work, x)]

    def receive(self, x: Tensor) -> None:
        """Fill x with what the previous rank sends, which has as many bytes; waits for it."""
        whole = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        before = (self.rank - 1) % self.size
        work = dist.irecv(_bytes(whole), before, group=self.groups[before])
        assert work is not None, "this rank is in the group"
        work.wait()
        if whole is not x:
            x.copy_(whole)

    def finish(self) -> None:
        """Wait until everything sent has been received."""
        for work, _ in self.pending:
            if work is not None:
                work.wait()
        self.pending = []

    def close(self) -> None:
        """Destroy the connections, in one order on all ranks: NCCL waits there for the other rank of a group."""
        self.finish()
        for number in sorted({self.rank, (self.rank - 1) % self.size}):
            dist.destroy_process_group(self.groups[number])


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class RingCache(HyloCache):
    """Cache of the pieces that ranks read in turn: before a layer goes on, it gets what earlier pieces left of it.

    Args:
        ring: connections to the other ranks.
        ends: number of tokens up to each piece's end, 0 first.
        batch: sequences.
        cache: its size and format are taken over.
        like: layer -> its state's tensors, of the right shapes.
    """

    def __init__(
        self, ring: Ring, ends: list[int], batch: int, cache: HyloCache, like: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(cache.max_cache_len or ends[-1], cache.latents)
        self.ring, self.ends, self.batch, self.like = ring, ends, batch, like
        self.piece = 0

    def begin(self, piece: int) -> None:
        """Go on at a piece as if this cache held all tokens before it."""
        self.piece, self.length, self.batch_size = piece, self.ends[piece], self.batch
        self.last_position = None if not piece else torch.full((1, 1), self.length - 1, device=self.ring.device)

    @property
    def last(self) -> bool:
        """Whether no piece follows the present one."""
        return self.piece + 2 == len(self.ends)

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append the rows of the piece's tokens, get those of other ranks' pieces before it, and return all up to its end.

        Args:
            layer: its number.
            new: [batch, tokens of the piece, ...] each.

        Returns:
            [batch, tokens up to the piece's end, ...] each.
        """
        found = super().append(layer, *new)
        first, others = self.ends[self.piece], self.ring.size - 1
        missing, sent = (self.ends[max(0, self.piece - count)] for count in (others, others - 1))
        for held in self.rows[layer]:
            if missing < first:
                self.ring.receive(held[:, missing:first])
        for held in self.rows[layer]:
            if not self.last:
                self.ring.send(held[:, sent : self.length])
        return found

    def advance(self, layer: int, step: Step, parts: tuple[Tensor, ...], padding: Tensor | None) -> Tensor:
        """Take a linear layer's step over the piece, from the state after the piece before it; hand its own state on.

        Args:
            layer: its number.
            step: see `HyloCache.advance`.
            parts: inputs, [batch, tokens of the piece, ...] each.
            padding: bool [batch, tokens of the piece], or None.

        Returns:
            Outputs [batch, tokens of the piece, ...].
        """
        if self.piece:
            conv, state = (torch.empty_like(x) for x in self.like[layer])
            self.ring.receive(conv)
            self.ring.receive(state)
            self.states[layer] = conv, state
        out = super().advance(layer, step, parts, padding)
        if not self.last:
            for x in self.states[layer]:
                self.ring.send(x)
        return out


@torch.no_grad()
def split_prefill(model: HyloForCausalLM, ids: Tensor, cache: HyloCache, piece: int, ring: Ring) -> Iterator[int]:
    """Read a prompt on all ranks, each of which has the whole model; at the end each rank's cache holds all of it.

    Args:
        model: in eval mode.
        ids: int64 [batch, tokens] on the model's device, the same on all ranks, without padding.
        cache: empty; filled.
        piece: tokens that a rank reads at a time.
        ring: made by all ranks.

    Yields:
        After each piece of this rank, the number of tokens up to its end; last, after all ranks have everything, all tokens.

    Raises:
        ValueError: the cache holds tokens, or has no room.
    """
    batch, total = ids.shape
    if cache.length:
        raise ValueError(f"a prompt split over ranks begins with an empty cache, got one of {cache.length} tokens")
    cache.check_room(batch, total)
    ends = [*range(0, total, piece), total]
    sample = HyloCache(latents=cache.latents)
    model(ids[:, :2], past_key_values=sample, logits_to_keep=1)
    mine = RingCache(ring, ends, batch, cache, sample.states)
    for number in range(ring.rank, len(ends) - 1, ring.size):
        mine.begin(number)
        model(ids[:, ends[number] : ends[number + 1]], past_key_values=mine, logits_to_keep=1)
        yield ends[number + 1]
    ring.finish()
    owner = (len(ends) - 2) % ring.size
    for layer, rows in sample.rows.items():
        held = mine.rows.get(layer) or tuple(x.new_empty(batch, mine.max_cache_len or 0, *x.shape[2:]) for x in rows)
        for x in held:
            _share(x[:, :total], owner)
        cache.rows[layer] = held
    for layer, states in sample.states.items():
        cache.states[layer] = mine.states.get(layer) or (torch.empty_like(states[0]), torch.empty_like(states[1]))
        for x in cache.states[layer]:
            _share(x, owner)
    cache.length, cache.batch_size = total, batch
    cache.last_position = torch.full((1, 1), total - 1, device=ids.device)
    yield total


def _share(x: Tensor, source: int) -> None:
    """Give all ranks what x is on rank `source`."""
    whole = x.contiguous()
    dist.broadcast(_bytes(whole), source)
    if whole.data_ptr() != x.data_ptr():
        x.copy_(whole)
