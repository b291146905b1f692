"""Windows of whole documents, packed by best fit; a document is cut where none fits otherwise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.data.best_fit import pack_best_fit
from megatron_hylo.data.packed import DOCUMENT_ORDER, EPOCHS_KEPT, WINDOW_ORDER, PackedDataset
from megatron_hylo.data.windows import Window, divide

PIECE_ORDER = 2  # stream of random numbers of an epoch


class BestFitWindows(PackedDataset):
    """Endless windows of whole documents, addressed as those of `PackedDataset`.

    What lengths go together is the same in each epoch; which of the documents of a length, the order of the windows, and the
    order of the documents in a window are drawn anew.

    Args:
        path_prefix, sequence_length, seed, shuffle, filters: as of `PackedDataset`.
        most_documents: pieces of documents in one window; one that is not full with them ends in padding, which is no label.

    Raises:
        ConfigError: the text fills no window.
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
        self.masked = self.masked or self.packing.padding > 0
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

    def window(self, index: int) -> Window:
        """Window `index`; padding is the last document's end token, again and again."""
        window = super().window(index)
        missing = self.sequence_length + 1 - len(window.tokens)
        if not missing:
            return window
        tokens = np.concatenate([window.tokens, np.full(missing, window.tokens[-1])])
        mask = None if window.loss_mask is None else np.pad(window.loss_mask, (0, missing))
        starts = np.concatenate([window.document_starts, [len(window.tokens)]])
        return replace(window, tokens=tokens, document_starts=starts, loss_mask=mask, padding=missing)

    def document_starts(self, index: int) -> np.ndarray:
        """Places in window `index` where its pieces begin, int64 ascending; 0 is the first."""
        lengths = [length for _, _, length in self.pieces(index)]
        return np.cumsum([0, *lengths[:-1]])

    def _cuts(self, pieces: list[tuple[int, int, int]]) -> np.ndarray | None:
        """Places where a piece follows one that does not reach its document's end, or does not begin its own."""
        ends = np.cumsum([length for _, _, length in pieces])
        cut = [
            start + length < self.store.lengths[document] or after > 0
            for (document, start, length), (_, after, _) in zip(pieces, pieces[1:])
        ]
        return ends[:-1][np.array(cut, bool)]

    def describe(self, windows: int) -> str:
        """A sentence on what a run of so many windows, from the first on, trains on and leaves out."""
        most = int(np.diff(self.packing.first).max())
        return (
            f"{len(self.documents):,} documents, {self.tokens:,} tokens, {self.long_share:.1%} of them in documents as long "
            f"as a window; an epoch has {self.windows_per_epoch:,} windows of {self.sequence_length:,} with "
            f"{self.packing.fragments:,} fragments and at most {most:,} documents in one, leaves out "
            f"{self.packing.left_out:,} tokens and has {self.packing.padding:,} of padding; the run reads {windows:,} windows, "
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
