"""Training windows out of an indexed dataset: constant-length packing, addressed by number alone.

An epoch is all documents in a shuffled order, each with its end token, laid end to end and cut into windows of
sequence_length + 1 tokens that overlap by one, so that every token is predicted once. The windows of an epoch are
visited in a shuffled order too: a long document would fill a whole batch otherwise. Window i is a pure function of (seed,
sequence_length, i), so a run resumes from its count of consumed samples. Loss is on all tokens, as in the paper, or on the
answers that the dataset names.
"""

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

from megatron_hylo.config import ConfigError
from megatron_hylo.data.dataset_files import ANSWERS
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.data.windows import Window, WindowSource, divide
from megatron_hylo.io import DamagedError, read_json, verify_manifest_if_any

logger = logging.getLogger("megatron_hylo.data")
DOCUMENT_ORDER, WINDOW_ORDER = 0, 1  # streams of random numbers of an epoch
IGNORED = -100  # label of a token whose continuation is not to be learnt
EPOCHS_KEPT = 2  # a batch may span two


class DocumentStore:
    """Memory-mapped documents of an indexed dataset, of one or several sequences each; all ranks make one.

    Args:
        path_prefix: path without .bin or .idx.

    Raises:
        ConfigError: there is no dataset.
        DamagedError: the index is unreadable, or its token count is not that of the .bin file or of data.json, or
            they are not what the manifest beside them says (a dataset of another program has none).
    """

    def __init__(self, path_prefix: str | Path) -> None:
        prefix = str(path_prefix)
        check_indexed_dataset(prefix)
        name = Path(prefix).name
        verify_manifest_if_any(Path(prefix).parent, (f"{name}.bin", f"{name}.idx", "data.json", "tokenizer"))
        try:
            self.sequences = IndexedDataset(prefix)
        except (AssertionError, ValueError, struct.error) as error:
            raise DamagedError(f"{prefix}.idx is not a readable index ({error}); preprocess again") from error
        ends = np.concatenate([[0], np.cumsum(self.sequences.sequence_lengths, dtype=np.int64)])
        first = self.sequences.document_indices
        self.first_sequence = first[:-1]
        self.lengths = ends[first[1:]] - ends[first[:-1]]  # tokens a document, int64
        self._first_token = ends[first[:-1]]
        self.tokens = int(ends[-1])
        self._check_tokens(prefix)
        self.answers: np.ndarray | None = None  # [2, answers] int64, first tokens and those behind the last ones
        if Path(f"{prefix}{ANSWERS}").is_file():
            verify_manifest_if_any(Path(prefix).parent, (f"{name}{ANSWERS}",))
            self.answers = np.load(f"{prefix}{ANSWERS}", mmap_mode="r")

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of a document, int64; its sequences lie end to end on disk."""
        tokens = self.sequences.get(int(self.first_sequence[document]), offset=int(start), length=int(length))
        return tokens.astype(np.int64)  # a copy: Megatron's view would outlive the mapping and crash the process

    def loss_mask(self, document: int, start: int, length: int) -> np.ndarray | None:
        """Whether each of the tokens [start, start + length) of a document is learnt, bool; None where all are."""
        if self.answers is None:
            return None
        first = int(self._first_token[document] + start)
        low = int(np.searchsorted(self.answers[1], first, "right"))
        high = int(np.searchsorted(self.answers[0], first + length, "left"))
        mask = np.zeros(length, bool)
        for begin, end in (self.answers[:, low:high].T - first).tolist():
            mask[max(0, begin) : end] = True
        return mask

    def _check_tokens(self, prefix: str) -> None:
        on_disk = Path(get_bin_path(prefix)).stat().st_size / self.sequences.index.dtype_size
        if on_disk != self.tokens:
            raise DamagedError(
                f"{prefix}.bin has {on_disk:.10g} tokens, its index says {self.tokens}: damaged, preprocess again"
            )
        description = Path(prefix).parent / "data.json"
        if description.is_file():
            described = read_json(description)
            expected = described.get(f"{Path(prefix).name}_tokens", self.tokens)
            if described.get("loss") == "answers" and not Path(f"{prefix}{ANSWERS}").is_file():
                raise DamagedError(f"{prefix}{ANSWERS} is missing, the places of the answers to learn: preprocess again")
            if expected != self.tokens:
                raise DamagedError(f"{prefix} has {self.tokens} tokens, {description} says {expected}: files of two datasets")


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray  # document numbers in this epoch's order
    starts: np.ndarray  # [documents + 1] int64, first token of each in the epoch's stream; last: all tokens
    windows: np.ndarray  # window numbers in this epoch's order


class PackedDataset(WindowSource):
    """Endless sequence of training windows; see the module's description.

    Args:
        path_prefix: path of the dataset without .bin or .idx.
        sequence_length: tokens a window predicts.
        seed: decides all orders.
        shuffle: documents and windows in a new order each epoch; otherwise in the dataset's order.
        min_length, max_length: tokens of the documents that are used, both ends included; None: no longest.
        store: the dataset where it is open already.

    Raises:
        ConfigError: no dataset, no document of those lengths, or fewer tokens than a window.
        DamagedError: the files contradict each other.
    """

    def __init__(
        self,
        path_prefix: str | Path,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        min_length: int = 0,
        max_length: int | None = None,
        store: DocumentStore | None = None,
    ) -> None:
        if sequence_length < 1 or seed < 0:
            raise ConfigError(f"sequence_length must be at least 1 and seed at least 0, got {sequence_length} and {seed}")
        self.store = store or DocumentStore(path_prefix)
        self.masked = self.store.answers is not None
        self.sequence_length, self.seed, self.shuffle = sequence_length, seed, shuffle
        lengths = self.store.lengths
        used = (lengths >= min_length) & (lengths <= (lengths.max(initial=0) if max_length is None else max_length))
        self.documents = np.flatnonzero(used)  # those that are used
        if not len(self.documents) and len(lengths):
            raise ConfigError(
                f"no document of {path_prefix} has min_length {min_length:,} tokens; the longest has {lengths.max():,}: give a "
                f"smaller min_length, or leave the part out"
            )
        self.tokens = int(lengths[used].sum())
        self.windows_per_epoch = (self.tokens - 1) // sequence_length
        if self.windows_per_epoch < 1:
            raise ConfigError(
                f"{path_prefix} has {self.tokens} tokens, a window of sequence_length {sequence_length} needs "
                f"{sequence_length + 1}: give more text or a smaller sequence_length"
            )
        self._epochs: dict[int, _Epoch] = {}

    def window(self, index: int) -> Window:
        """Window `index` with the places where documents begin, and what of it is learnt."""
        pieces = self.pieces(index)
        masks = [mask for piece in pieces if (mask := self.store.loss_mask(*piece)) is not None]
        tokens = np.concatenate([self.store.read(*piece) for piece in pieces])
        return Window(tokens, self.document_starts(index), None, np.concatenate(masks) if masks else None, self._cuts(pieces))

    @property
    def long_share(self) -> float:
        """Part of the tokens that is of documents at least as long as a window."""
        lengths = self.store.lengths[self.documents]
        return float(lengths[lengths >= self.sequence_length].sum() / self.tokens)

    def describe(self, windows: int) -> str:
        """A sentence on what a run of so many windows, from the first on, trains on and leaves out."""
        rest = windows % self.windows_per_epoch
        tail = self.tokens - (self.windows_per_epoch * self.sequence_length + 1)
        left = self.windows_per_epoch - rest if rest else 0
        return (
            f"{len(self.documents):,} documents, {self.tokens:,} tokens, {self.long_share:.1%} of them in documents as long "
            f"as a window; an epoch has {self.windows_per_epoch:,} "
            f"windows of {self.sequence_length:,}, and leaves out {tail:,} tokens at its end that fill none; the run reads "
            f"{windows:,} windows, {windows / self.windows_per_epoch:.2f} epochs, and leaves out {left:,} windows of the last"
        )

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of what window `index` is made of, in order."""
        epoch, start = self._place(index)
        stop = start + self.sequence_length + 1
        place = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        found = []
        while start < stop:
            take = min(stop, int(epoch.starts[place + 1])) - start
            if take > 0:
                found.append((int(epoch.documents[place]), int(start - epoch.starts[place]), take))
            start, place = start + take, place + 1
        return found

    def document_starts(self, index: int) -> np.ndarray:
        """Places in window `index` where documents begin, int64 ascending, in [0, sequence_length]; 0 is always one.

        The window's start counts as a document's, whether or not it begins there.
        """
        epoch, start = self._place(index)
        inside = (epoch.starts > start) & (epoch.starts <= start + self.sequence_length)
        return np.unique(np.concatenate([[0], epoch.starts[inside] - start]))

    def _cuts(self, pieces: list[tuple[int, int, int]]) -> np.ndarray | None:
        """Places in a window of such pieces where the document before was cut; an epoch's stream cuts none."""
        return None

    def _place(self, index: int) -> tuple["_Epoch", int]:
        """The epoch of a window and its first token in that epoch's stream."""
        number, at = divide(index, self.windows_per_epoch)
        epoch = self._epoch(number)
        return epoch, int(epoch.windows[at]) * self.sequence_length

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) >= EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            documents = self.documents[self._order(len(self.documents), number, DOCUMENT_ORDER)]
            starts = np.concatenate([[0], np.cumsum(self.store.lengths[documents])])
            self._epochs[number] = _Epoch(documents, starts, self._order(self.windows_per_epoch, number, WINDOW_ORDER))
        return self._epochs[number]

    def _order(self, count: int, epoch: int, stream: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        # RandomState's streams are frozen: other numpy versions give the same order, which resuming relies on.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch, stream]))
        return np.random.RandomState(bits).permutation(count)


def batches(
    dataset: WindowSource,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    packed_documents: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """One rank's endless micro batches, from where `consumed_samples` windows (of all ranks) have been used.

    The n-th micro batches of all ranks, in rank order, are the next micro_batch_size * data_parallel_size windows: which
    windows a global step sees does not depend on the number of ranks.

    Args:
        dataset: the windows.
        consumed_samples: windows used so far, over all ranks.
        micro_batch_size: windows a micro batch.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share the data.
        packed_documents: all windows of a micro batch in one sequence, and where documents begin in it.

    Yields:
        {"input_ids", "labels"}, each [micro_batch_size, sequence_length] int64 on the CPU, and "windows", their numbers in the
        dataset. With `packed_documents` [1, micro_batch_size * sequence_length], the label of a document's last token is
        IGNORED (it would be another document's), and "document_starts" is int64 [n]. Labels that are `Window.unlabelled` are
        IGNORED. With recall two more of the labels' shape: "answers", int32, at a label that is part of an answer the
        distance to the fact, 0 elsewhere; "source_places", int64, of each input token the place in the window that the
        exercises were inserted in, -1 at theirs. Of data of which only answers are learnt "loss_mask", bool of the labels'
        shape; the label of every other token is IGNORED.

    Raises:
        ConfigError: a size below 1, a rank out of range, or a negative count.
    """
    if micro_batch_size < 1 or consumed_samples < 0 or not 0 <= data_parallel_rank < data_parallel_size:
        raise ConfigError(
            f"micro_batch_size {micro_batch_size} must be at least 1, consumed_samples {consumed_samples} at least 0, and "
            f"data_parallel_rank {data_parallel_rank} below data_parallel_size {data_parallel_size}"
        )
    first = consumed_samples + data_parallel_rank * micro_batch_size
    return _batches(dataset, first, micro_batch_size, data_parallel_size, packed_documents)


def _batches(
    dataset: WindowSource, first: int, size: int, ranks: int, packed_documents: bool
) -> Iterator[dict[str, torch.Tensor]]:
    length = dataset.sequence_length
    while True:
        windows = [dataset.window(i) for i in range(first, first + size)]
        tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
        batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].clone()}
        answers = [window.answers[1:] for window in windows if window.answers is not None]
        if answers:
            batch["answers"] = torch.from_numpy(np.stack(answers))
        inserted = [window.source_places[:-1] for window in windows if window.source_places is not None]
        if inserted:
            batch["source_places"] = torch.from_numpy(np.stack(inserted))
        for row, window in enumerate(windows):
            if window.unlabelled is not None:
                batch["labels"][row, window.unlabelled - 1] = IGNORED
        if dataset.masked:
            masks = np.ones((len(windows), length + 1), bool)
            for mask, window in zip(masks, windows):
                mask[:] = True if window.loss_mask is None else window.loss_mask
                mask[len(mask) - window.padding :] = False
            batch["loss_mask"] = torch.from_numpy(masks[:, 1:].copy())
            batch["labels"][~batch["loss_mask"]] = IGNORED
        if packed_documents:
            starts = [torch.from_numpy(window.document_starts) for window in windows]
            for row, places in enumerate(starts):
                batch["labels"][row, places[1:] - 1] = IGNORED
            batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
            # a document that begins at `length` has only a label in this window
            batch["document_starts"] = torch.cat([row * length + s[s < length] for row, s in enumerate(starts)])
        yield batch | {"windows": torch.arange(first, first + size)}
        first += size * ranks
