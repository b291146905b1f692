"""The windows that a run trains on, as its settings say."""

import functools
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.config.text import TextPart
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.data.blend import BlendedWindows
from megatron_hylo.data.encode import plain_encoder
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.packed import DocumentStore, PackedDataset
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.recall_text import Exercises
from megatron_hylo.data.tokenizer import check_dataset
from megatron_hylo.data.whole_documents import BestFitWindows
from megatron_hylo.data.windows import WindowSource

PROBED_TOKENS, MOST_PROBED = 2**16, 32  # of windows by which they are told apart
PROBED_EXERCISES = 1000  # of each task, as text: each wording is among them


def training_windows(config: TrainConfig) -> WindowSource:
    """Windows of `config.sequence_length` of the run's text, with recall where it asks for it.

    Raises:
        ConfigError: no dataset, one shorter than a window, a part of a blend that cannot be used, or, for recall, no tokenizer.
        DamagedError: the dataset's files contradict each other.
    """
    windows = _text_windows(config, config.sequence_length)
    if not config.recall.share:
        return windows
    return recall_windows(config, lambda length: _text_windows(config, length), config.seed)


def windows_identity(windows: WindowSource) -> dict[str, str]:
    """Return the sha256 of some windows of the first epoch, spread evenly: {"text": ...}, with recall {"text", "recall"}.

    They depend on what settings and folders do not tell, too: the wording of the exercises and the order of windows in this
    version, and the dataset's tokenizer. Their number does not depend on the run's length.

    Args:
        windows: of the run.
    """
    if not isinstance(windows, RecallWindows):
        return {"text": _digest(windows).hexdigest()}
    recall = _digest(windows)
    for task in windows.settings.tasks:
        for number in range(PROBED_EXERCISES):
            recall.update(repr(Exercises(random.Random(number)).make(task, 12)).encode())
    return {"text": _digest(windows.source).hexdigest(), "recall": recall.hexdigest()}


def _digest(source: WindowSource) -> "hashlib._Hash":
    count = min(source.windows_per_epoch, MOST_PROBED, -(-PROBED_TOKENS // source.sequence_length))
    digest = hashlib.sha256()
    for number in range(count):
        window = source.window(number * source.windows_per_epoch // count)
        for name, value in vars(window).items():
            digest.update(f"{name} {value if value is None or isinstance(value, int) else value.dtype}".encode())
            digest.update(b"" if value is None or isinstance(value, int) else value.tobytes())
    return digest


def recall_windows(config: TrainConfig, source: Callable[[int], WindowSource], seed: int) -> RecallWindows:
    """Windows of `config.sequence_length` with the run's recall exercises in another source's text.

    Args:
        config: settings of the run.
        source: makes the source of a given sequence length.
        seed: decides exercises and places.

    Raises:
        ConfigError: no tokenizer, or a share too small for an exercise.
    """
    folder = Path(config.data) / "tokenizer"
    encoder = _encoder(folder, tuple((f.name, f.stat().st_mtime_ns) for f in sorted(folder.glob("*"))))
    return RecallWindows(source, config.sequence_length, config.recall, encoder, seed, config.packed_documents)


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, files: tuple[tuple[str, int], ...]) -> Tokenizer:
    """The tokenizer of a dataset, which training and held-out exercises share; `files` are names and times of its files."""
    tokenizer = load_transformers_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} holds no tokenizer, which recall.share needs; make it with `hylo preprocess`")
    return plain_encoder(tokenizer)


def _text_windows(config: TrainConfig, sequence_length: int) -> WindowSource:
    """The windows of all parts of a blend, each in long and short documents where `long_share` asks for it."""
    text = config.text
    parts = text.blend or [TextPart(config.data)]
    for part in text.blend:
        if Path(part.data) != Path(config.data):
            check_dataset(part.data, config.data)
    total = sum(part.weight for part in parts)
    sources: list[tuple[str, WindowSource]] = []
    weights: list[float] = []
    for part in parts:
        store = DocumentStore(f"{part.data}/train")
        ranges: list[tuple[int, int | None]] = [(part.min_length, None)]
        cut = max(sequence_length, part.min_length)
        shorter = store.lengths[(store.lengths >= part.min_length) & (store.lengths < cut)]
        longer = store.lengths[store.lengths >= cut]
        own = float(longer.sum() / max(1, longer.sum() + shorter.sum()))
        share = None if config.teacher_store else text.long_part(sequence_length, own)
        if share is not None and longer.sum() > sequence_length and shorter.sum() > sequence_length:
            ranges = [(cut, None), (part.min_length, cut)]
        for least, below in ranges:
            name = part.data + (f", documents of {least:,} tokens and more" if least else "")
            name += f", documents below {below:,} tokens" if below else ""
            sources.append((name, _one(config, store, part.data, sequence_length, least, below)))
            weights.append(part.weight / total * (1 if len(ranges) == 1 or share is None else 1 - share if below else share))
    return sources[0][1] if len(sources) == 1 else BlendedWindows(sources, weights)


def _one(
    config: TrainConfig, store: DocumentStore, data: str, sequence_length: int, least: int, below: int | None
) -> PackedDataset:
    arguments: dict[str, Any] = dict(min_length=least, max_length=None if below is None else below - 1, store=store)
    if config.text.packing == "best_fit":
        return BestFitWindows(
            f"{data}/train", sequence_length, config.seed, most_documents=config.text.most_documents, **arguments
        )
    return PackedDataset(f"{data}/train", sequence_length, config.seed, **arguments)
