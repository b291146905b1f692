"""Sequences read in overlapping windows: which, and where each token's hidden state is taken from.

A sequence of S tokens is cut into windows of W that begin half a window apart; the last one ends where the sequence does. The
first gives all its tokens, every later one those that the windows before it have not: at most its second half, so that each
of them has half a window or more before it. That reads up to 2 S - W tokens.

Windows are sequences of their own. Under context parallelism every rank reads those that its own tokens are taken from;
neighbours both read one that crosses their boundary. Packed documents are cut one by one, and their windows are packed again.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hylo.config.teacher_window import windows_of
from megatron_hylo.parallel.context import sequence_slice
from megatron_hylo.parallel.documents import PackedDocuments


@dataclass(frozen=True)
class Stitching:
    """Places of a micro-batch's tokens in the windows that are read of it.

    Args:
        places: int64 [batch, own tokens]: number of the token among those of all rows, one row after another.
        rows_at_a_time: windows of a forward pass: about as many tokens as the micro-batch has.
    """

    places: Tensor
    rows_at_a_time: int

    def stitch(self, hidden: Tensor, config: TransformerConfig) -> Tensor:
        """Hidden states of the micro-batch out of those of the windows, on every tensor-parallel rank.

        Args:
            hidden: [tokens (/ TP with sequence parallelism), rows, hidden].
            config: of the model that made them.

        Returns:
            [own tokens, batch, hidden].
        """
        if config.sequence_parallel:
            group = parallel_state.get_tensor_model_parallel_group()
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        return hidden.transpose(0, 1).flatten(0, 1)[self.places.t()]


def stitch_windows(
    ids: Tensor, documents: PackedDocuments | None, window: int, multiple: int = 1
) -> tuple[Tensor, PackedDocuments | None, Stitching]:
    """Return what is read of a micro-batch, and how its hidden states come together; all context-parallel ranks call it.

    Args:
        ids: int64 [batch, sequence / context-parallel ranks].
        documents: of a packed sequence, batch 1.
        window: tokens of a window.
        multiple: of tokens in a row, for sequence parallelism and FP8; they are filled up to it.

    Returns:
        int64 [rows, tokens], windows of one length or all of them packed in one row; documents of the latter; stitching.
    """
    ids = _whole(ids)
    length, where = ids.shape[1], ids.device
    own = sequence_slice(length)
    if documents is None:
        rows, places, at_a_time = _plain(length, window, multiple, own.start, own.stop, len(ids), where)
        return ids[:, rows].flatten(0, 1), None, Stitching(places, at_a_time)
    edges = [*documents.starts.tolist(), documents.length]
    read: list[Tensor] = []  # of each window, its tokens in the sequence
    taken: list[Tensor] = []  # and, of those that are taken from it, their numbers among all that are read
    starts = [0]
    for start, stop in zip(edges, edges[1:]):
        for begin, first, end in _needed(start, stop, window, own.start, own.stop):
            taken.append(torch.arange(max(first, own.start), min(end, own.stop)) - begin + starts[-1])
            read.append(torch.arange(begin, end))
            starts.append(starts[-1] + end - begin)
    if padding := -starts[-1] % multiple:
        read.append(torch.zeros(padding, dtype=torch.int64))  # a document of its own, from which nothing is taken
        starts.append(starts[-1] + padding)
    packed = PackedDocuments(torch.tensor(starts[:-1], device=where), starts[-1], slice(0, starts[-1]))
    return ids[:, torch.cat(read).to(where)], packed, Stitching(torch.cat(taken).unsqueeze(0).to(where), 1)


@lru_cache(maxsize=16)
def _plain(
    length: int, window: int, multiple: int, start: int, stop: int, batch: int, where: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Give plain sequences the places of windows' tokens [windows, tokens], `places` and `rows_at_a_time` of the stitching.

    Rows are filled up with later tokens, which causal layers do not see, or the last one again.
    """
    needed = _needed(0, length, window, start, stop)
    size = -(-min(window, length) // multiple) * multiple
    rows = torch.stack([torch.arange(begin, begin + size).clamp(max=length - 1) for begin, *_ in needed])
    kept = [
        torch.arange(max(first, start), min(end, stop)) - begin + number * size
        for number, (begin, first, end) in enumerate(needed)
    ]
    places = torch.cat(kept) + torch.arange(batch)[:, None] * rows.numel()
    return rows.to(where), places.to(where), max(1, batch * (stop - start) // size)


def _needed(begin: int, end: int, window: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(begin, first taken, end) of the windows of a document [begin, end) that tokens [start, stop) are taken from."""
    if not (begin < stop and start < end):
        return []
    found = [(begin + w.begin, begin + w.first, begin + w.end) for w in windows_of(end - begin, window)]
    return [w for w in found if w[1] < stop and start < w[2]]


def _whole(ids: Tensor) -> Tensor:
    """All tokens of sequences that the context-parallel ranks have parts of: [batch, part] -> [batch, sequence]."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return ids
    parts = ids.new_empty(group.size() * len(ids), ids.shape[1])
    dist.all_gather_into_tensor(parts, ids.contiguous(), group=group)
    return torch.cat(parts.chunk(group.size()), 1)
