"""Tokenise documents into the growing files of a dataset, and put the dataset together from them."""

import contextlib
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from tokenizers import Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.data.dataset_files import DatasetFiles
from megatron_hylo.data.documents import Document, OnBadText, TextCheck, Unreadable
from megatron_hylo.data.encode import Encoded, EncoderSettings, Spans
from megatron_hylo.data.encode_pool import encode_batches
from megatron_hylo.data.inputs import InputReader
from megatron_hylo.data.lengths import length_table, plot_lengths
from megatron_hylo.data.tokenizer import USED_IDS, check_ids, vocabulary_of
from megatron_hylo.io import atomic_directory, write_json
from megatron_hylo.io.progress import Track

logger = logging.getLogger("megatron_hylo.data")
SPLITS = ("train", "heldout")
# Text that models were pretrained on ends in these; an instruct model's `eos_token` ends a chat turn instead.
DOCUMENT_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
BATCH_CHARACTERS = 2_000_000  # bounds the memory of a batch's encodings, about 200 bytes a token
BATCH_DOCUMENTS = 1024
SAVE_SECONDS = 5.0  # of work that a kill loses at most
TICKS = 1000  # steps of the progress that is shown
Loss = Literal["all", "answers"]


@dataclass(frozen=True)
class DataDescription:
    """Content of data.json: what a dataset holds and how it was made."""

    vocab_size: int  # largest id of the tokenizer + 1
    largest_token_id: int  # that occurs; a model needs more rows than that
    end_token_id: int
    dtype: str  # of the token ids on disk
    vocabulary_sha256: str  # of the tokenizer's map from tokens to ids (data/tokenizer.py)
    train_documents: int
    train_tokens: int  # end tokens included
    heldout_documents: int
    heldout_tokens: int
    heldout_fraction: float
    heldout_names: list[str]  # "source/name" of each document held out, in the dataset's order
    skipped: dict[str, int]  # places in the input that gave no document, by reason
    replaced_documents: int  # with U+FFFD in place of invalid characters
    loss: Loss = "all"  # tokens that are learnt


@dataclass(frozen=True)
class DatasetSettings:
    """Everything that decides what becomes of a document."""

    heldout_fraction: float
    end: int
    vocabulary: int
    vocab_size: int | None
    max_documents: int | None
    on_bad_text: OnBadText
    special_tokens: bool
    loss: Loss

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the parts that are written: "train" and, where any is held out, "heldout"."""
        return SPLITS if self.heldout_fraction else SPLITS[:1]


@dataclass(frozen=True)
class _Batch:
    """Documents that are encoded together, and where the reading stood behind them."""

    documents: list[Document]
    state: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """Texts of the documents, in order."""
        return [document.text for document in self.documents]

    @property
    def answers(self) -> list[Spans | None] | None:
        """Spans of the answers in each text; None where no document has any."""
        found: list[Spans | None] = [document.answers for document in self.documents]
        return found if any(answers is not None for answers in found) else None


def dataset_settings(
    tokenizer: Any,
    heldout_fraction: float,
    end_token_id: int | None,
    max_documents: int | None,
    vocab_size: int | None,
    on_bad_text: OnBadText,
    special_tokens: bool,
    loss: Loss,
) -> DatasetSettings:
    """The settings of a dataset, checked; arguments are options of `hylo preprocess`.

    Args:
        tokenizer: of transformers.
        heldout_fraction: part of the documents, at least 0 and below 1.
        end_token_id: id that ends each document; None: the tokenizer's.
        max_documents: at least 1; None: all.
        vocab_size: of the model, which the tokenizer's may exceed (with a warning); None: not compared.
        on_bad_text: what happens with text that cannot be tokenised.
        special_tokens: text that looks like a special token is that token.
        loss: tokens that count.

    Raises:
        ConfigError: a number outside its range, or an end token that the tokenizer or the model does not have.
    """
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction must be at least 0 and below 1, got {heldout_fraction}")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents must be at least 1, got {max_documents}")
    vocabulary = _vocabulary_size(tokenizer)
    end = end_of_document_token(tokenizer) if end_token_id is None else end_token_id
    if not 0 <= end < vocabulary:
        raise ConfigError(f"end_token_id {end} is not an id of the tokenizer, which has 0 to {vocabulary - 1}")
    if vocab_size is not None and vocabulary > vocab_size:
        check_ids(end, vocab_size, "the end of every document", "the model")
        logger.warning(
            "the tokenizer has ids up to %d, the model's vocabulary is %d: text with a token beyond it will be refused",
            vocabulary - 1, vocab_size,
        )  # fmt: skip
    return DatasetSettings(heldout_fraction, end, vocabulary, vocab_size, max_documents, on_bad_text, special_tokens, loss)


def make_dataset(
    items: Callable[[tuple[int, int]], Iterator[Document | Unreadable]],
    reader: InputReader | None,
    tokenizer: Any,
    settings: DatasetSettings,
    parts: Path,
    out_dir: Path,
    overwrite: bool,
    processes: int,
    track: Track,
) -> DataDescription:
    """Tokenise into the parts, from where they are on, and put the dataset together.

    Args:
        items: position to begin at -> documents, and places that give none.
        reader: tells the position of `items` and the share that is read; None: there is none, and all are tokenised at once.
        tokenizer: of transformers.
        settings: of `dataset_settings`.
        parts: folder of what is finished.
        out_dir: the dataset's.
        overwrite: replace what is there.
        processes: that tokenise.
        track: shows progress.

    Raises:
        ConfigError: there is no text, a split gets no document, or there is bad text that `on_bad_text` does not allow.
    """
    dtype = np.dtype(DType.optimal_dtype(settings.vocabulary))
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(contextlib.closing(DatasetFiles(parts, settings.splits, dtype, settings.loss == "answers")))
        former = files.state
        if former is not None:
            logger.info("going on with %s at document %s", out_dir, f"{sum(n for n, _ in files.counts.values()):,}")
        batches = _batches(items, reader, settings, former)
        encoder = EncoderSettings(tokenizer.backend_tokenizer.to_str(), settings.end, dtype.name, settings.special_tokens)
        failures = TextCheck(settings.on_bad_text, former and former["failures"])
        found = stack.enter_context(contextlib.closing(encode_batches(batches, encoder, processes)))
        state, saved = former, time.monotonic()
        share = former["share"] if former else 0.0
        what = f"tokenising, from {share:.0%} on" if share else "tokenising"
        for tick in track(range(math.floor(share * TICKS), TICKS), what) if reader else (0,):
            while reader is None or state is None or state["share"] * TICKS < tick + 1:
                if (next_one := next(found, None)) is None:
                    break
                _write(*next_one, files, settings, failures)
                state = next_one[0].state | {"failures": failures.state()}
                if reader is not None and time.monotonic() - saved >= SAVE_SECONDS:
                    files.save(state)
                    saved = time.monotonic()
        assert state is not None, "there is a last batch, perhaps of no document"
        files.save(state)
        check = TextCheck(settings.on_bad_text, state["check"]).with_other(failures)
        documents = sum(number for number, _ in files.counts.values())
        check.report(documents)
        if not documents:
            raise ConfigError(f"there is no text in the documents{': ' * bool(check.skipped)}{check.summary()}; give others")
        for split in settings.splits:
            if not files.counts[split][0]:
                raise ConfigError(
                    f"no document for {split} out of {documents} with heldout_fraction {settings.heldout_fraction}: change the "
                    f"fraction{', or give other text: ' * bool(check.skipped)}{check.summary()}"
                )
        return finish_dataset(files, tokenizer, settings, check, out_dir, overwrite)


def finish_dataset(
    files: DatasetFiles,
    tokenizer: Any,
    settings: DatasetSettings,
    check: TextCheck,
    out_dir: Path,
    overwrite: bool,
    also: Callable[[Path], None] = lambda folder: None,
) -> DataDescription:
    """Write a dataset folder of the files, which appears when it is complete.

    Args:
        files: all documents are in them.
        tokenizer: whose ids they hold.
        settings: that the documents were made with.
        check: counts of what was left out.
        out_dir: folder to make.
        overwrite: replace it.
        also: writes further files into the folder.
    """
    with atomic_directory(out_dir, overwrite) as folder:
        also(folder)
        return _write_folder(files, tokenizer, settings, check, folder, out_dir)


def _write_folder(
    files: DatasetFiles, tokenizer: Any, settings: DatasetSettings, check: TextCheck, folder: Path, out_dir: Path
) -> DataDescription:
    files.finish(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    used = np.zeros(settings.vocabulary, bool)
    for tokens in files.token_chunks():
        used[tokens] = True
    ids = np.flatnonzero(used)
    np.save(folder / USED_IDS, ids)
    lengths = np.concatenate([files.lengths(split) for split in settings.splits])
    plot_lengths(lengths, folder / "lengths.png")
    counts = {split: [0, 0] for split in SPLITS} | files.counts
    description = DataDescription(
        vocab_size=settings.vocabulary,
        largest_token_id=int(ids[-1]),
        end_token_id=settings.end,
        dtype=files.dtype.name,
        vocabulary_sha256=vocabulary_of(tokenizer, "").identity,
        train_documents=counts["train"][0],
        train_tokens=counts["train"][1],
        heldout_documents=counts["heldout"][0],
        heldout_tokens=counts["heldout"][1],
        heldout_fraction=settings.heldout_fraction,
        heldout_names=files.heldout_names(),
        skipped=dict(check.skipped),
        replaced_documents=check.replaced,
        loss=settings.loss,
    )
    write_json(folder / "data.json", asdict(description))
    logger.info("%s: %d documents, %d tokens; held out: %d documents, %d tokens", out_dir, *counts["train"], *counts["heldout"])
    logger.info("%s", length_table(lengths))
    return description


def _write(batch: _Batch, found: Encoded, files: DatasetFiles, settings: DatasetSettings, failures: TextCheck) -> None:
    """Append a batch's documents to the files."""
    at, all_ids, size = 0, memoryview(found.ids), files.dtype.itemsize
    for number, (document, length) in enumerate(zip(batch.documents, found.lengths, strict=True)):
        if not length:
            failures.failed(document.place, found.errors[number])
            continue
        ids = all_ids[at : at + length * size]
        at += length * size
        if settings.vocab_size is not None and settings.vocabulary > settings.vocab_size:
            largest = int(np.frombuffer(ids, files.dtype).max())
            check_ids(largest, settings.vocab_size, f"{document.source}/{document.name}", "the model")
        failures.encoded()
        split = "heldout" if heldout_score(document.name) < batch.state["threshold"] else "train"
        files.add(split, f"{document.source}/{document.name}", ids, found.answers[number] if found.answers else None)


def _batches(
    items: Callable[[tuple[int, int]], Iterator[Document | Unreadable]],
    reader: InputReader | None,
    settings: DatasetSettings,
    former: dict[str, Any] | None,
) -> Iterator[_Batch]:
    """Documents that can be used, from where a former start was on; the last batch, perhaps empty, is behind all items."""
    check = TextCheck(settings.on_bad_text, former and former["check"])
    taken, threshold = (former["taken"], former["threshold"]) if former else (0, None)
    texts = check.usable(items(tuple(former["position"]) if former else (0, 0)))
    left = None if settings.max_documents is None else settings.max_documents - taken
    documents: list[Document] = []
    characters = 0

    def batch(ended: bool) -> _Batch:
        """Close the batch of documents read so far; `ended`: no document follows."""
        nonlocal threshold
        if threshold is None:
            fraction = settings.heldout_fraction
            threshold = heldout_threshold([d.name for d in documents], fraction) if ended and documents else fraction
        share = 1.0 if ended or reader is None else min(reader.share, 1 - 1 / TICKS)
        position = reader.position if reader is not None else (0, 0)
        return _Batch(documents, {"position": position, "check": check.state(), "taken": taken, "threshold": threshold,
                                  "share": share})  # fmt: skip

    for document in itertools.islice(texts, left):
        documents.append(document)
        characters, taken = characters + len(document.text), taken + 1
        # the first batch decides on small sets, whatever its size
        full = len(documents) >= BATCH_DOCUMENTS if threshold is None else characters >= BATCH_CHARACTERS
        if full or len(documents) >= BATCH_DOCUMENTS:
            yield batch(False)
            documents, characters = [], 0
    yield batch(True)


def heldout_score(name: str) -> float:
    """Hash of a document's name, uniform in [0, 1); a document is held out when it is below the fraction."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", errors="replace")).digest()[:8], "big") / 2**64


def end_of_document_token(tokenizer: Any) -> int:
    """Id of the token that ends documents: `DOCUMENT_END_TOKENS` where the vocabulary has one, else `eos_token`.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    vocabulary = tokenizer.get_vocab()
    for token in (*DOCUMENT_END_TOKENS, tokenizer.eos_token):
        if token in vocabulary:
            return vocabulary[token]
    raise ConfigError(f"the tokenizer has none of {', '.join(DOCUMENT_END_TOKENS)} and no eos_token; give end_token_id")


def _vocabulary_size(tokenizer: Any) -> int:
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one with a tokenizer.json")
    return max(tokenizer.get_vocab().values()) + 1


def heldout_threshold(names: Sequence[str], fraction: float) -> float:
    """The score below which documents are held out: the fraction, moved so far that neither side of a small set is empty.

    Args:
        names: of all documents, one at least.
        fraction: part to hold out; 0 holds out none.

    Raises:
        ConfigError: there is one document, and one is to be held out.
    """
    if not fraction:
        return fraction
    scores = sorted(set(map(heldout_score, names)))
    if len(scores) < 2:
        raise ConfigError("one document cannot be both trained on and held out: give several files, or heldout_fraction 0")
    return min(max(fraction, math.nextafter(scores[0], 1.0)), scores[-1])
