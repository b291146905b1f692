"""Training windows and what makes them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes:
        tokens: [sequence_length + 1] int64; inputs are all but the last token, labels all but the first.
        document_starts: places where documents begin, int64 ascending, in [0, sequence_length]; 0 is always one.
        answers: [sequence_length + 1] int32: at a token of a recall answer the tokens between it and the first fact that it
            needs, 0 elsewhere; None where there are none.
        loss_mask: [sequence_length + 1] bool: at a token whether it is learnt, as in data of which only answers are; None: all
            but the padding.
        unlabelled: places, from 1 on, of tokens that have no cross-entropy but a KL, int64 ascending: those that do not follow
            the one before, since a document was cut there, and of exercises what recall.cross_entropy leaves out; None: none.
        source_places: [sequence_length + 1] int64, where exercises were inserted in a window of another source: each token's
            place in that window, -1 at an inserted one; None: nothing was.
        padding: tokens at the end that fill the window and are not learnt; with exercises in it loss_mask has them.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    answers: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    unlabelled: np.ndarray | None = None
    source_places: np.ndarray | None = None
    padding: int = 0


def divide(index: int, size: int) -> tuple[int, int]:
    """Split a window's number into (epoch or block of `size` windows, place in it).

    Raises:
        IndexError: a negative number; there is no last window to count from.
    """
    if index < 0:
        raise IndexError(f"window {index}: the sequence is endless, count from 0")
    return divmod(index, size)


class WindowSource(Protocol):
    """Endless sequence of windows, each a pure function of its number, so that a run resumes from a count."""

    sequence_length: int
    windows_per_epoch: int
    masked: bool = False  # windows may have a loss mask

    @property
    def long_share(self) -> float:
        """Part of the tokens that is of documents at least as long as a window."""

    def window(self, index: int) -> Window:
        """Window `index`, from 0 on."""

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tokens of window `index`, [sequence_length + 1] int64: inputs are all but the last, labels all but the first."""
        return torch.from_numpy(self.window(index).tokens)

    def describe(self, windows: int) -> str:
        """A sentence on what a run of so many windows trains on and leaves out."""
