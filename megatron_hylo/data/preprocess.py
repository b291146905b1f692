"""Tokenise documents into Megatron-Core's indexed datasets, with whole documents held out.

What cannot be read or tokenised is skipped, named in the log and counted in data.json (see documents.py). A start that was
killed goes on at the next one with the same inputs and settings (see dataset_files.py).

DIR/train.bin, .idx      token ids, one sequence a document, each ending in the end-of-document token
DIR/heldout.bin, .idx    the same, of the documents held out
DIR/SPLIT.answers.npy    places of the answers, where they alone are learnt: [2, answers] int64, first and last + 1 tokens
DIR/data.json            `DataDescription`
DIR/used_token_ids.npy   the ids that occur, int64, ascending
DIR/lengths.png          share of tokens in documents longer than 1K ... 128K
DIR/tokenizer/           the tokenizer
DIR/manifest.json        sizes and sha256 of all files; a folder without it is not finished
"""

import contextlib
import hashlib
import itertools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from tokenizers import Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home
from megatron_hylo.data.chat import chat_field
from megatron_hylo.data.dataset_files import DatasetFiles
from megatron_hylo.data.documents import Document, OnBadText, TextCheck, TextField, Unreadable
from megatron_hylo.data.encode import Encoded, EncoderSettings, Spans, plain_encoder
from megatron_hylo.data.encode_pool import cores, encode_batches
from megatron_hylo.data.inputs import InputFile, InputReader
from megatron_hylo.data.lengths import length_table, plot_lengths
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.tokenizer import USED_IDS, check_ids, vocabulary_of
from megatron_hylo.io import (
    DamagedError,
    atomic_directory,
    check_free,
    output_lock,
    plain_os_errors,
    read_json,
    read_verified_json,
    staging_directory,
    verify_manifest_if_any,
    write_json,
)
from megatron_hylo.io.progress import Track, no_progress

__all__ = ["DataDescription", "build_dataset", "end_of_document_token", "heldout_score", "plain_encoder", "preprocess"]
logger = logging.getLogger("megatron_hylo.data")
SPLITS = ("train", "heldout")
# Text that models were pretrained on ends in these; an instruct model's `eos_token` ends a chat turn instead.
DOCUMENT_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
BATCH_CHARACTERS = 2_000_000  # bounds the memory of a batch's encodings, about 200 bytes a token
BATCH_DOCUMENTS = 1024
SAVE_SECONDS = 5.0  # of work that a kill loses at most
PARALLEL_BYTES = 2**24  # of input, from which on processes are worth their start
TICKS = 1000  # steps of the progress that is shown
FORMAT = 1  # of the parts
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
class _Settings:
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
        return SPLITS if self.heldout_fraction else SPLITS[:1]


@dataclass(frozen=True)
class _Batch:
    """Documents that are encoded together, and where the reading stood behind them."""

    documents: list[Document]
    state: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]

    @property
    def answers(self) -> list[Spans | None] | None:
        found: list[Spans | None] = [document.answers for document in self.documents]
        return found if any(answers is not None for answers in found) else None


def build_dataset(
    documents: Iterable[Document | Unreadable],
    tokenizer: Any,
    out_dir: str | Path,
    heldout_fraction: float = 0.05,
    end_token_id: int | None = None,
    max_documents: int | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
    on_bad_text: OnBadText = "skip",
    special_tokens: bool = False,
) -> DataDescription:
    """Tokenise documents into `out_dir`, which appears only when it is whole.

    Whether a document is held out depends on a hash of its name alone, so neither on the order nor on the other
    documents; only in a small set where that would leave one side empty, the nearest document changes side. No token is
    added but the end token, and text that looks like a special token is tokenised as text.

    Args:
        documents: read once, in order; those that are empty, unreadable, or fail in the tokenizer are skipped and counted.
        tokenizer: transformers' PreTrainedTokenizerFast.
        out_dir: folder to make.
        heldout_fraction: expected part of the documents held out, in [0, 1); 0 makes no held-out set.
        end_token_id: end-of-document token; by default what `end_of_document_token` finds.
        max_documents: take no more than this many.
        vocab_size: rows of the embedding of the model that the data is for; None: not checked. A token beyond them is an
            error where it occurs.
        overwrite: replace `out_dir`.
        on_bad_text: what becomes of documents with invalid bytes or half a surrogate pair, as in `TextCheck`.
        special_tokens: text that looks like a special token is that token, as chat templates write them.

    Returns:
        What was written, as in data.json.

    Raises:
        ConfigError: no text, a fraction out of range, a slow tokenizer, a token beyond the model's vocabulary, `out_dir`
            exists, or with `on_bad_text` error the first document that cannot be used.
    """
    settings = _settings(
        tokenizer, heldout_fraction, end_token_id, max_documents, vocab_size, on_bad_text, special_tokens, "all"
    )
    out_dir = Path(out_dir)
    with output_lock(out_dir):
        check_free(out_dir, overwrite)
        parts = staging_directory(
            out_dir, "parts", "settings", {"start": time.time_ns()}
        )  # of nothing that could be read again
        try:
            return _make(lambda _: iter(documents), None, tokenizer, settings, parts, out_dir, overwrite, 1, no_progress)
        finally:
            shutil.rmtree(parts, ignore_errors=True)


def preprocess(
    input: str | Path,
    output: str | Path,
    tokenizer: str | Path,
    heldout_fraction: float = 0.05,
    max_documents: int | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
    on_bad_text: OnBadText = "skip",
    more_inputs: Sequence[str | Path] = (),
    key: str | None = None,
    chat: bool = False,
    loss: Loss = "all",
    workers: int | None = None,
    track: Track = no_progress,
) -> DataDescription:
    """Tokenise text into a dataset folder for training.

    A start that was killed or failed for want of space goes on at the next one; with changed inputs or settings, which is
    said, it begins anew. The result is the same, byte by byte.

    Args:
        input: folder of .txt, .md or .rst files, such a file, a .jsonl file, a .parquet file, or a pattern of files; UTF-8, or
            what a byte order mark says; all but Parquet perhaps compressed (.gz, .bz2, .xz, .zst).
        output: dataset folder to make.
        tokenizer: Hugging Face folder, folder with a .gguf file, or model folder.
        heldout_fraction: part of the documents held out for evaluation.
        max_documents: take no more than this many.
        vocab_size: vocabulary of the model; by default of the model folder that `tokenizer` is, if it is one.
        overwrite: replace the output folder.
        on_bad_text: skip leaves out documents with invalid bytes or half a surrogate pair, replace puts U+FFFD there, error
            ends at the first; lines that are not JSON or have no text are left out too, or end it. Counts are in data.json.
        more_inputs: others like `input`, read after it.
        key: field or column with the text; "text", or with `chat` "messages".
        chat: the field is a list of {"role", "content"}, written by the tokenizer's chat template.
        loss: all tokens are learnt, or with `chat` the assistant's answers alone.
        workers: processes that encode; by default one a core, where there are 16 MB of input.
        track: shows progress, by the bytes of the input.

    Raises:
        ConfigError: as `build_dataset`, there is no tokenizer or text, or the disk is full.
    """
    output, folder = expand_home(output), expand_home(tokenizer)
    inputs = [expand_home(path) for path in (input, *more_inputs)]
    if loss == "answers" and not chat:
        raise ConfigError("loss answers is for chat data, where it is known what an answer is: give --chat true, or loss all")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    check_free(output, overwrite, [*inputs, folder])
    verify_manifest_if_any(folder, ("tokenizer",) if (folder / "tokenizer").is_dir() else ())
    found = load_transformers_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    if found is None:
        raise ConfigError(f"{tokenizer} holds no tokenizer; give a folder with tokenizer.json, a .gguf file, or a model folder")
    if vocab_size is None and (folder / "hylo.json").is_file():
        vocab_size = read_verified_json(folder, "hylo.json", ("model",))["model"]["vocab_size"]
    field = chat_field(found, key or "messages", loss == "answers") if chat else TextField(key or "text")
    settings = _settings(found, heldout_fraction, None, max_documents, vocab_size, on_bad_text, chat, loss)
    reader = InputReader(inputs, field)
    identities = [f.identity if isinstance(f, InputFile) else (f.where, 0, 0) for f in reader.files]
    description = {
        "format": FORMAT,
        "key": field.key,
        "inputs": [list(identity) for identity in identities],
        "tokenizer": hashlib.sha256(found.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template": found.get_chat_template() if chat else None,
        **asdict(settings),
    }
    processes = workers or (cores() if sum(max(0, size) for _, size, _ in identities) >= PARALLEL_BYTES else 1)
    with output_lock(output), plain_os_errors():
        parts = _resumed_parts(output, description)
        try:
            made = _make(reader.items, reader, found, settings, parts, output, overwrite, processes, track)
        except (ConfigError, DamagedError) as error:
            if not isinstance(error.__cause__, OSError):  # after an error of the disk the next start goes on
                shutil.rmtree(parts, ignore_errors=True)
            raise
        shutil.rmtree(parts, ignore_errors=True)
    return made


def _settings(
    tokenizer: Any,
    heldout_fraction: float,
    end_token_id: int | None,
    max_documents: int | None,
    vocab_size: int | None,
    on_bad_text: OnBadText,
    special_tokens: bool,
    loss: Loss,
) -> _Settings:
    """The settings, checked."""
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
    return _Settings(heldout_fraction, end, vocabulary, vocab_size, max_documents, on_bad_text, special_tokens, loss)


def _resumed_parts(output: Path, description: dict[str, Any]) -> Path:
    """The folder of the parts; of a former start with other inputs or settings they are removed, which is said."""
    file = output.parent / f".{output.name}.parts" / "settings.json"
    if file.is_file():
        with contextlib.suppress(DamagedError, ConfigError):
            former = read_json(file)
            changed = [name for name in description if former.get(name) != description[name]]
            if changed:
                logger.warning(
                    "the start of %s that did not end had other inputs or settings (%s); beginning anew",
                    output, ", ".join(_change(name, former.get(name), description[name]) for name in changed),
                )  # fmt: skip
    return staging_directory(output, "parts", "settings", description)


def _change(name: str, before: Any, now: Any) -> str:
    if name == "inputs":
        former = {entry[0]: entry for entry in before or []}
        for path, *rest in now:
            if path not in former:
                return f"inputs: {path} is new"
            if former[path][1:] != rest:
                return f"inputs: {path} has changed"
        return "inputs: others, or in another order"
    return name if len(f"{before}{now}") > 40 else f"{name}: {before} -> {now}"


def _make(
    items: Callable[[tuple[int, int]], Iterator[Document | Unreadable]],
    reader: InputReader | None,
    tokenizer: Any,
    settings: _Settings,
    parts: Path,
    out_dir: Path,
    overwrite: bool,
    processes: int,
    track: Track,
) -> DataDescription:
    """Tokenise into the parts, from where they are on, and put the dataset together."""
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
        with atomic_directory(out_dir, overwrite) as folder:
            return _finish(files, tokenizer, settings, check, folder, out_dir)


def _finish(
    files: DatasetFiles, tokenizer: Any, settings: _Settings, check: TextCheck, folder: Path, out_dir: Path
) -> DataDescription:
    """Write the dataset into its folder."""
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


def _write(batch: _Batch, found: Encoded, files: DatasetFiles, settings: _Settings, failures: TextCheck) -> None:
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
    settings: _Settings,
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
        nonlocal threshold
        if threshold is None:
            threshold = _heldout_threshold(documents, ended, settings.heldout_fraction)
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


def _heldout_threshold(first: list[Document], all_there: bool, fraction: float) -> float:
    """The score below which documents are held out: the fraction, moved so far that neither side of a small set is empty."""
    if not all_there or not fraction or not first:
        return fraction
    scores = sorted({heldout_score(document.name) for document in first})
    if len(scores) < 2:
        raise ConfigError("one document cannot be both trained on and held out: give several files, or heldout_fraction 0")
    return min(max(fraction, math.nextafter(scores[0], 1.0)), scores[-1])
