"""Documents, or windows, laid end to end in one sequence, which must not see each other.

A packed batch is one sequence [1, all tokens]: windows and the documents in them are alike. Attention runs document by
document, rotary positions, convolutions and recurrent states start anew at each, also where a rank's part of the
sequence begins in the middle of one.

A batch of plain windows has them end to end as well, where nothing else divides them: `EqualWindows`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedDocuments:
    """Document boundaries of a packed sequence and this rank's tokens; passed through the model as `packed_seq_params`.

    Args:
        starts: int64 [n], ascending, first 0: places in the whole sequence (`cu_seqlens` without its last entry).
        length: tokens of the whole sequence.
        part: this rank's tokens (context parallelism), without step.
    """

    starts: Tensor
    length: int
    part: slice

    @property
    def whole(self) -> "PackedDocuments":
        """Return the documents as a rank with all tokens sees them."""
        return self.at(slice(0, self.length))

    def at(self, part: slice) -> "PackedDocuments":
        """Return the documents with other tokens as this rank's, made once."""
        if (part.start, part.stop) not in self._others:
            self._others[part.start, part.stop] = replace(self, part=part)
        return self._others[part.start, part.stop]

    @cached_property
    def _others(self) -> dict[tuple[int, int], "PackedDocuments"]:
        return {}

    @cached_property
    def positions(self) -> Tensor:
        """Place in its document of every token of the sequence: int64 [length]."""
        places = torch.arange(self.length, device=self.starts.device)
        return places - self.starts[torch.searchsorted(self.starts, places, right=True) - 1]

    @cached_property
    def own_positions(self) -> Tensor:
        """Place in its document of each of this rank's tokens: int64 [part]."""
        return self.positions[self.part]

    @cached_property
    def reset_mask(self) -> Tensor:
        """Mask of this rank's tokens that reset the recurrent state, the first of each document: bool [part]."""
        return self.own_positions == 0

    @cached_property
    def attention_ranges(self) -> list[tuple[slice, slice]]:
        """For each document on this rank: (its queries, counted from the part's start; its keys in the whole sequence)."""
        edges = [*self.starts.tolist(), self.length]
        found = []
        for start, stop in zip(edges, edges[1:]):
            first, last = max(start, self.part.start), min(stop, self.part.stop)
            if first < last:
                found.append((slice(first - self.part.start, last - self.part.start), slice(start, last)))
        return found


@dataclass(frozen=True)
class EqualWindows:
    """Windows of one length, end to end: hidden states are [count * sequence, 1, c]; passed on as `packed_seq_params`.

    Mixers see them as a batch without a copy; of Megatron's [sequence, batch, c] each made one on its way in and out.
    """

    count: int


Packed = PackedDocuments | EqualWindows | None


def batch_first(x: Tensor, packed: Packed) -> Tensor:
    """View [sequence, batch, c], or equal windows end to end [batch * sequence, 1, c], as [batch, sequence, c]."""
    return x.unflatten(0, (packed.count, -1)).squeeze(2) if isinstance(packed, EqualWindows) else x.transpose(0, 1)


def sequence_first(x: Tensor, packed: Packed) -> Tensor:
    """Undo `batch_first`: [batch, sequence, c] -> [sequence, batch, c] or [batch * sequence, 1, c], contiguous."""
    return x.flatten(0, 1).unsqueeze(1) if isinstance(packed, EqualWindows) else x.transpose(0, 1).contiguous()


def by_document(
    attend: Callable[..., Tensor], documents: PackedDocuments | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Run attention on each document alone (tokens are dimension 1), or at once where nothing is packed.

    Args:
        attend: of query, key and value; also takes `documents`, ranges of queries and keys.
        documents: of the packed sequence.
        query: [1 or batch, tokens, ...].
        key, value: [1 or batch, tokens up to here, ...].
    """
    if documents is None:
        return attend(query, key, value)
    return attend(query, key, value, documents=documents.attention_ranges)
