"""Batches of sequences of nearly one length, and what happens where a batch does not fit into the GPU's memory."""

import gc
from collections.abc import Callable, Sequence

import torch

from megatron_hylo.io.progress import Track

MASK_ELEMENTS = 2**23  # of one row's mask where prompts of several lengths are read together: the rest x the whole


def plan_batches(
    lengths: Sequence[int], tokens: int, rows: int, repeats: Sequence[int] | None = None, new: Sequence[int] | None = None
) -> list[list[int]]:
    """Sort sequences by length, the longest first, and cut them into batches.

    Args:
        lengths: tokens of each sequence.
        tokens: at most, of a batch padded to its longest sequence; a longer sequence is a batch of its own.
        rows: sequences at most.
        repeats: how many rows each sequence becomes; 1 by default.
        new: tokens that are written after each, which take memory as those read; 0 by default.

    Returns:
        Indices of the sequences of each batch; lengths in it differ by at most a quarter, or 32 tokens.
    """
    batches: list[list[int]] = []
    longest = used = most = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        taken = 1 if repeats is None else repeats[index]
        spread = min(max(32, longest // 4), MASK_ELEMENTS // max(longest, 1))
        written = 0 if new is None else new[index]
        fits = used + taken <= rows and (used + taken) * (longest + max(most, written)) <= tokens
        if not batches or not fits or longest - lengths[index] > spread:
            batches.append([])
            longest, used, most = lengths[index], 0, 0
        batches[-1].append(index)
        used, most = used + taken, max(most, written)
    return batches


class BatchRunner:
    """Runs batches; one that does not fit into the GPU's memory is halved, and later ones are cut to what did fit.

    Args:
        tokens: of a batch, to begin with.
        rows: of a batch, at most.
    """

    def __init__(self, tokens: int, rows: int) -> None:
        self.tokens, self.rows = tokens, rows

    def run(
        self,
        lengths: Sequence[int],
        work: Callable[[list[int]], None],
        track: Track,
        description: str,
        repeats: Sequence[int] | None = None,
        new: Sequence[int] | None = None,
    ) -> None:
        """Call `work` with the indices of each batch.

        Args:
            lengths, repeats, new: see `plan_batches`.
            work: computes one batch.
            track: progress display over the batches.
            description: of the display.

        Raises:
            torch.OutOfMemoryError: a single sequence does not fit.
        """
        whole = lengths if new is None else [length + written for length, written in zip(lengths, new, strict=True)]
        for batch in track(plan_batches(lengths, self.tokens, self.rows, repeats, new), description):
            self._fit(batch, whole, work)

    def _fit(self, batch: list[int], lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        size = len(batch) * max(lengths[i] for i in batch)
        if size <= self.tokens or len(batch) == 1:
            try:
                return work(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens = size // 2
            gc.collect()
            torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        for part in (batch[:half], batch[half:]):
            self._fit(part, lengths, work)
