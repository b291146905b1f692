"""Context parallelism: rank r of n has the r-th of n equal, contiguous parts of every sequence.

There are two ways, `cp_comm_type`:

`all_gather`: layers move what is small. Attention and MLA gather keys and values, MLA as its latent and rotary key; a
convolution gathers the last inputs of each part; a linear layer gathers what each part does to the recurrent state, whose
size does not depend on the sequence (recurrence.py).

Causal attention of the last part costs 2 - 1/n times the mean, so ranks r and n - 1 - r trade the second halves of their
queries, and of the outputs: each then has as much to do.

`a2a` (Megatron's all-to-all): ranks trade sequence for heads. Each gets all tokens of its share of the heads, computes as
if alone, and gives the outputs back. MLA still gathers its latents, and trades queries and outputs only. It moves more.

`auto` is what is faster on the GPUs of a host (docs/parallelism.md): `a2a` for attention and MLA where the ranks divide their
heads, `all_gather` elsewhere and for linear layers.

Every rank takes part in each collective whether it reads the result or not: a rank whose graph lacked one would leave the
others waiting in the backward pass.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.parallel.documents import Packed, PackedDocuments, by_document


def sequence_slice(length: int) -> slice:
    """Slice of this rank's tokens in a sequence of `length`.

    Raises:
        ConfigError: the context-parallel ranks do not divide the sequence.
    """
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if length % ranks:
        raise ConfigError(f"context_parallel_size {ranks} does not divide a sequence of {length} tokens")
    return slice(rank * length // ranks, (rank + 1) * length // ranks)


def token_positions(length: int, batch: int, documents: PackedDocuments | None, device: torch.device) -> Tensor:
    """Positions of this rank's tokens in the sequence, or in their documents where these do not see each other.

    Args:
        length: tokens of a whole sequence.
        batch: sequences.
        documents: of one sequence, that all are packed in.
        device: of the result without documents.

    Returns:
        int64 [batch, sequence / context-parallel ranks]; [1, ...] with documents.
    """
    if documents is not None:
        return documents.own_positions.unsqueeze(0)
    here = sequence_slice(length)
    return torch.arange(here.start, here.stop, device=device).repeat(batch, 1)


def sequence_shard(x: Tensor) -> Tensor:
    """Take this rank's part of whole sequences: [batch, sequence] -> [batch, sequence / context-parallel ranks]."""
    return x[:, sequence_slice(x.shape[1])].contiguous()


def group_of_one() -> dist.ProcessGroup:
    """A process group of this rank alone, for a model that shares sequences with no other; made anew at each call."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def context_group(method: str | None, group: dist.ProcessGroup, recurrent: bool = False, **heads: int) -> "ContextGroup":
    """The ranks that share a sequence, for one mixer.

    Args:
        method: `cp_comm_type` of the configuration.
        group: context-parallel process group.
        recurrent: a linear layer's.
        heads: counts of this tensor-parallel rank that `a2a` must divide, by name.

    Raises:
        ConfigError: `a2a` does not divide one.
    """
    ranks = group.size()
    indivisible = [f"{name} {count}" for name, count in heads.items() if count % ranks]
    if method == "a2a" and indivisible:
        raise ConfigError(
            f"cp_comm_type a2a needs heads that context_parallel_size {ranks} divides; of a tensor-parallel rank it does not "
            f"divide {', '.join(indivisible)}; use auto or all_gather, or other sizes"
        )
    uses_all_to_all = not indivisible and (method == "a2a" or (method == "auto" and not recurrent))
    return ContextGroup(group, ranks > 1 and uses_all_to_all)


class ContextGroup:
    """The ranks that share a sequence, as the mixers see them.

    `received_bytes` counts what this rank got from the others in forward passes (docs/parallelism.md has the formulas).

    Args:
        group: context-parallel process group.
        uses_all_to_all: trade sequence for heads (`a2a`).
    """

    def __init__(self, group: dist.ProcessGroup, uses_all_to_all: bool = False) -> None:
        self.group, self.size, self.rank, self.uses_all_to_all = group, group.size(), group.rank(), uses_all_to_all
        self.shares = self.size if uses_all_to_all else 1
        self.received_bytes = 0

    def exchange(self, *parts: tuple[Tensor, Iterable[int]]) -> list[Tensor]:
        """All-to-all from a sequence shard of all heads to the whole sequence of a head shard; identity without `a2a`.

        Args:
            parts: x [batch, sequence, sum of widths] and the widths of its sections; each section has its heads one after
                the other.

        Returns:
            For each part [batch, ranks sequence, sum of widths / ranks], the same sections.
        """
        if not self.uses_all_to_all:
            return [x for x, _ in parts]
        sections = [section for x, widths in parts for section in x.split(list(widths), -1)]
        # for each rank its share of every section, put in order by one copy
        received = self._all_to_all(
            torch.cat([section.unflatten(-1, (self.size, -1)).movedim(-2, 0) for section in sections], -1)
        )
        return list(received.transpose(0, 1).flatten(1, 2).split([x.shape[-1] // self.size for x, _ in parts], -1))

    def heads_to_sequence(self, x: Tensor) -> Tensor:
        """All-to-all back from a head shard to a sequence shard: [batch, ranks sequence, w] -> [batch, sequence, ranks w]."""
        if not self.uses_all_to_all:
            return x
        by_rank = x.unflatten(1, (self.size, -1)).transpose(0, 1)  # [ranks, batch, sequence, w]
        return self._all_to_all(by_rank).permute(1, 2, 0, 3).flatten(2)

    def head_shard(self, x: Tensor, widths: Iterable[int] | None = None, dim: int = 0) -> Tensor:
        """Slice of this rank's heads out of dimension `dim`, section by section; x itself without `a2a`.

        Args:
            x: tensor or parameter, e.g. [channels, ...].
            widths: sizes of the sections along `dim`, each divided by the ranks; None: one section.
            dim: the dimension.

        Returns:
            x with dimension `dim` divided by the number of ranks.
        """
        if not self.uses_all_to_all:
            return x
        widths = list(widths) if widths is not None else [x.shape[dim]]
        return torch.cat([section.chunk(self.size, dim)[self.rank] for section in x.split(widths, dim)], dim)

    def seen(self, packed: Packed) -> PackedDocuments | None:
        """Documents as they lie in the tokens that this rank computes with."""
        if not isinstance(packed, PackedDocuments):
            return None
        return packed.whole if self.uses_all_to_all else packed

    @property
    def parts_read(self) -> int:
        """Number of sequence parts that this rank's queries attend to."""
        return self.size if self.uses_all_to_all else max(self.rank + 1, self.size - self.rank)

    def positions(self, length: int) -> slice:
        """Places in the whole sequence of the `length` tokens that this rank computes with."""
        return slice(0, length) if self.uses_all_to_all else slice(self.rank * length, (self.rank + 1) * length)

    def up_to_here(self, x: Tensor) -> Tensor:
        """All-gather the parts that this rank's queries attend to: [sequence, batch, ...] -> [parts sequence, batch, ...]."""
        if self.size == 1:
            return x
        return self._gather(x)[: self.parts_read * len(x)]

    def attend(
        self,
        attention: Callable[..., Tensor],
        documents: PackedDocuments | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Causal attention of this rank's tokens, balanced over the ranks.

        Where ranks have parts of the sequence, each computes the first half of its own queries and the second half of those of
        the rank as far from the other end.

        Args:
            attention: of query, key and value, causal and aligned to the end.
            documents: of a packed sequence, as `seen` gives them.
            query: [batch, tokens, heads, channels] of the tokens that this rank computes with.
            key, value: [batch, parts_read tokens, ...].

        Returns:
            [batch, tokens, heads, value channels].
        """
        if not self.uses_all_gather:
            return by_document(attention, documents, query, key, value)
        here, half = self.positions(query.shape[1]), query.shape[1] // 2
        stop = self.size * query.shape[1] - here.start  # where the other rank's part ends
        own, theirs = query.split([query.shape[1] - half, half], 1)  # [batch, tokens / 2, heads, channels] each
        outs = []
        for part, queries in ((slice(here.start, here.stop - half), own), (slice(stop - half, stop), self._trade(theirs))):
            if documents is not None:
                outs.append(by_document(attention, documents.at(part), queries, key, value))
            else:
                outs.append(attention(queries, key[:, : part.stop], value[:, : part.stop]))
        return torch.cat([outs[0], self._trade(outs[1])], 1)

    def tokens_before(self, sections: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], Tensor | None]:
        """The inputs that a causal convolution needs from the part before.

        Args:
            sections: [batch, sequence, width] of each, all channels together; sequence >= count.
            count: how many.

        Returns:
            The sections, to be read by the convolution alone, and [batch, all channels, count], oldest first, zeros on the
            first rank; None where a rank has all tokens.

        Raises:
            ConfigError: a rank has fewer tokens than `count`.
        """
        if not self.uses_all_gather:
            return sections, None
        if (tokens := sections[0].shape[1]) < count:
            raise ConfigError(
                f"{tokens} tokens on each of {self.size} context-parallel ranks are fewer than the {count} that a "
                f"convolution looks back; use fewer ranks or longer sequences"
            )
        *sections, end = _WithEnd.apply(count, *sections)
        ends = self._gather(end.movedim(1, -1).unsqueeze(0))  # [ranks, batch, all channels, count]
        return sections, torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])[self.rank]  # in the graph of every rank

    @property
    def uses_all_gather(self) -> bool:
        """Whether ranks compute with parts of the sequence."""
        return self.size > 1 and not self.uses_all_to_all

    def gather_affine_maps(self, transition: Tensor, increment: Tensor, backward: bool = False) -> list[tuple[Tensor, Tensor]]:
        """All-gather each rank's affine map of the recurrent state; no gradient flows through it.

        Args:
            transition: A of this rank's map S -> A S + B, [batch, heads, rows, rows] or [batch, heads, 1, 1].
            increment: B, [batch, heads, rows, columns].
            backward: not counted in `received_bytes`.

        Returns:
            (transition, increment) of every rank.
        """
        mine = torch.cat([transition.flatten(2), increment.flatten(2)], -1)  # [batch, heads, numbers of both]
        everyone = mine.new_empty(self.size * len(mine), *mine.shape[1:])  # [ranks batch, heads, numbers]
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        self.received_bytes += 0 if backward else (self.size - 1) * mine.numel() * mine.element_size()
        sizes = [x[0, 0].numel() for x in (transition, increment)]
        return [
            (a.reshape(transition.shape), b.reshape(increment.shape))
            for a, b in (x.split(sizes, -1) for x in everyone.chunk(self.size))
        ]

    def _trade(self, x: Tensor) -> Tensor:
        """Swap x with the rank as far from the other end of the sequence."""
        other = self.size - 1 - self.rank
        self.received_bytes += x.numel() * x.element_size() if other != self.rank else 0
        sizes = [len(x) if rank == other else 0 for rank in range(self.size)]
        return all_to_all(self.group, x.contiguous(), sizes, sizes)

    def _all_to_all(self, x: Tensor) -> Tensor:
        """Exchange x [ranks, ...]: entry r goes to rank r, and comes back from it."""
        self.received_bytes += (self.size - 1) * x[0].numel() * x.element_size()
        return all_to_all(self.group, x.contiguous())

    def _gather(self, x: Tensor) -> Tensor:
        """All-gather [n, ...] of each rank to [ranks n, ...]; backward reduce-scatters the gradients."""
        self.received_bytes += (self.size - 1) * x.numel() * x.element_size()
        return gather_from_sequence_parallel_region(x.contiguous(), group=self.group)


class _WithEnd(torch.autograd.Function):
    """Return sections [batch, sequence, width] and their last tokens [batch, count, all channels].

    Backward adds the last tokens' gradient into the sections' gradients in place, without a zero-filled copy; so exactly one
    operation may read each section.
    """

    @staticmethod
    def forward(ctx, count: int, *sections: Tensor) -> tuple[Tensor, ...]:
        """Return the sections and [batch, count, all channels]; the sections are views, so their memory is not copied."""
        return *(x.view_as(x) for x in sections), torch.cat([x[:, -count:] for x in sections], -1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the sections' gradients, changed in place at their last `count` tokens."""
        *section_grads, grad_end = grads
        for grad, end in zip(section_grads, grad_end.split([grad.shape[-1] for grad in section_grads], -1)):
            grad[:, -end.shape[1] :] += end
        return None, *section_grads
