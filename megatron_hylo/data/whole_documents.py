"""Windows of whole documents, packed by best fit; a document is cut where none fits otherwise."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.data.best_fit import pack_best_fit
from megatron_hylo.data.packed import DOCUMENT_ORDER, EPOCHS_KEPT, WINDOW_ORDER, PackedDataset
from megatron_hylo.data.windows import divide

PIECE_ORDER = 2  # stream of random numbers of an epoch


class BestFitWindows(PackedDataset):
    """Endless windows of whole documents; arguments and addressing as of `PackedDataset`.

    What lengths go together is the same in each epoch; which of the documents of a length, the order of the windows, and the
    order of the documents in a window are drawn anew.

    Args:
        most_documents: documents put in one window before it is filled up.
    """

    def __init__(
        self,
        path_prefix: str | Path,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        most_documents: int | None = None,
        **filters: Any,
    ) -> None:
        super().__init__(path_prefix, sequence_length, seed, shuffle, **filters)
        lengths = self.store.lengths[self.documents]
        self._sorted = np.sort(lengths)[::-1]
        self.packing = pack_best_fit(self._sorted, sequence_length + 1, most_documents)
        self.windows_per_epoch = len(self.packing.first) - 1
        if self.windows_per_epoch < 1:
            raise ConfigError(
                f"{path_prefix} fills no window of {sequence_length} tokens; give more text or a smaller sequence_length"
            )
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of what window `index` is made of, in order."""
        number, at = divide(index, self.windows_per_epoch)
        documents, windows, pieces = self._draw(number)
        window = windows[at]
        mine = pieces[self.packing.first[window] : self.packing.first[window + 1]]
        found = zip(documents[self.packing.document[mine]], self.packing.start[mine], self.packing.length[mine])
        return [(int(document), int(start), int(length)) for document, start, length in found]

    def document_starts(self, index: int) -> np.ndarray:
        """Places in window `index` where its pieces begin, int64 ascending; 0 is the first."""
        lengths = [length for _, _, length in self.pieces(index)]
        return np.cumsum([0, *lengths[:-1]])

    def describe(self, windows: int) -> str:
        """A sentence on what a run of so many windows, from the first on, trains on and leaves out."""
        most = int(np.diff(self.packing.first).max())
        return (
            f"{len(self.documents):,} documents, {self.tokens:,} tokens, {self.long_share:.1%} of them in documents as long "
            f"as a window; an epoch has {self.windows_per_epoch:,} windows of {self.sequence_length:,} with "
            f"{self.packing.fragments:,} fragments and at most {most:,} documents in one, and leaves out "
            f"{self.packing.left_out:,} tokens; the run reads {windows:,} windows, "
            f"{windows / self.windows_per_epoch:.2f} epochs"
        )

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an epoch's (document by place and length, order of windows, order of the pieces in each)."""
        if number not in self._drawn:
            if len(self._drawn) >= EPOCHS_KEPT:
                del self._drawn[min(self._drawn)]
            shuffled = self.documents[self._order(len(self.documents), number, DOCUMENT_ORDER)]
            documents = shuffled[np.argsort(-self.store.lengths[shuffled], kind="stable")]
            mixed = self._order(len(self.packing.document), number, PIECE_ORDER)
            window = np.repeat(np.arange(self.windows_per_epoch), np.diff(self.packing.first))
            pieces = mixed[np.argsort(window[mixed], kind="stable")]
            self._drawn[number] = documents, self._order(self.windows_per_epoch, number, WINDOW_ORDER), pieces
        return self._drawn[number]
