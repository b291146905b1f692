"""Windows of held-out text that models are evaluated on, the same every time."""

import logging
from pathlib import Path

import numpy as np
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.data.packed import DocumentStore, PackedDataset

logger = logging.getLogger("megatron_hylo.data")


def heldout_windows(
    path_prefix: str | Path, sequence_length: int, max_windows: int, allow_crossing: bool = False
) -> torch.Tensor:
    """Windows for evaluation, the same every time: evenly spaced over all that lie inside one document.

    A document is cut from its start into windows overlapping by one token; what is left at its end, and documents
    shorter than a window, are not used.

    Args:
        path_prefix: path of the dataset without .bin or .idx.
        sequence_length: tokens a window predicts.
        max_windows: most windows to return.
        allow_crossing: cut all documents laid end to end instead, for sets of short ones.

    Returns:
        [n, sequence_length + 1] int64, 1 <= n <= max_windows.

    Raises:
        ConfigError: no dataset, or no document (with `allow_crossing`: not all together) as long as a window.
        DamagedError: the files contradict each other.
    """
    if sequence_length < 1 or max_windows < 1:
        raise ConfigError(f"sequence_length and max_windows must be at least 1, got {sequence_length} and {max_windows}")
    if allow_crossing:
        packed = PackedDataset(path_prefix, sequence_length, seed=0, shuffle=False)
        return torch.stack([packed[int(i)] for i in _evenly(packed.windows_per_epoch, max_windows)])
    store = DocumentStore(path_prefix)
    documents, numbers, count = _inside_documents(store, sequence_length, max_windows)
    if not count:
        raise ConfigError(
            f"the longest document of {path_prefix} has {store.lengths.max()} tokens, a window of sequence_length "
            f"{sequence_length} needs {sequence_length + 1}: use --sequence_length {max(1, store.lengths.max() - 1)} or less, "
            f"or hold out longer documents"
        )
    logger.info(
        "%s: %d of %d windows of %d tokens inside a document; %s of %s tokens are predicted in none: documents' first tokens, "
        "and what is too short for a window at their ends",
        path_prefix, len(documents), count, sequence_length, f"{store.tokens - count * sequence_length:,}",
        f"{store.tokens:,}",
    )  # fmt: skip
    places = zip(documents.tolist(), (numbers * sequence_length).tolist())
    return torch.from_numpy(np.stack([store.read(document, start, sequence_length + 1) for document, start in places]))


def heldout_documents(path_prefix: str | Path, sequence_length: int, max_windows: int) -> list[int]:
    """Number of the document that each of the `heldout_windows` inside documents lies in; arguments as there."""
    return _inside_documents(DocumentStore(path_prefix), sequence_length, max_windows)[0].tolist()


def _inside_documents(store: DocumentStore, sequence_length: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Document of each chosen window, its number in that document, and how many windows there are to choose from."""
    ends = np.cumsum(np.maximum(store.lengths - 1, 0) // sequence_length)  # windows up to and with each document
    chosen = _evenly(int(ends[-1]), most)
    documents = np.searchsorted(ends, chosen, side="right")
    return documents, chosen - np.concatenate([[0], ends])[documents], int(ends[-1])


def _evenly(count: int, most: int) -> np.ndarray:
    taken = min(count, most)
    return np.arange(taken, dtype=np.int64) * count // taken
