"""Tokenise documents into Megatron-Core's indexed datasets, with whole documents held out.

What cannot be read or tokenised is skipped, named in the log and counted in data.json (see documents.py).

DIR/train.bin, .idx      token ids, one sequence a document, each ending in the end-of-document token
DIR/heldout.bin, .idx    the same, of the documents held out
DIR/data.json            `DataDescription`
DIR/used_token_ids.npy   the ids that occur, int64, ascending
DIR/lengths.png          share of tokens in documents longer than 1K ... 128K
DIR/tokenizer/           the tokenizer
DIR/manifest.json        sizes and sha256 of all files; a folder without it is not finished
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home
from megatron_hylo.data.documents import Document, OnBadText, TextCheck, TextField, Unreadable
from megatron_hylo.data.inputs import chat_field, read_inputs
from megatron_hylo.data.lengths import length_table, plot_lengths
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.tokenizer import USED_IDS, check_ids, vocabulary_of
from megatron_hylo.io import atomic_directory, check_free, read_verified_json, verify_manifest_if_any, write_json

logger = logging.getLogger("megatron_hylo.data")
SPLITS = ("train", "heldout")
# Text that models were pretrained on ends in these; an instruct model's `eos_token` ends a chat turn instead.
DOCUMENT_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
BATCH_CHARACTERS = 2_000_000  # bounds the memory of a batch's encodings, about 200 bytes a token
BATCH_DOCUMENTS = 1024
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


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
    check = TextCheck(on_bad_text)
    texts = itertools.islice(check.usable(documents), max_documents)
    first = list(itertools.islice(texts, BATCH_DOCUMENTS))
    if not first:
        raise ConfigError(f"there is no text in the documents{': ' * bool(check.skipped)}{check.summary()}; give others")
    threshold = _heldout_threshold(first, len(first) < BATCH_DOCUMENTS, heldout_fraction)
    dtype = DType.optimal_dtype(vocabulary)
    with atomic_directory(out_dir, overwrite) as folder, ExitStack() as stack:
        splits = SPLITS if heldout_fraction else SPLITS[:1]
        builders = {split: IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype) for split in splits}
        for builder in builders.values():
            stack.enter_context(closing(builder.data_file))
        counts, heldout_names, used = {split: [0, 0] for split in SPLITS}, [], np.zeros(vocabulary, bool)
        lengths: list[int] = []
        for document, ids in _tokenise(
            itertools.chain(first, texts), plain_encoder(tokenizer, special_tokens), end, dtype, check
        ):
            if vocab_size is not None and vocabulary > vocab_size:
                check_ids(int(ids.max()), vocab_size, f"{document.source}/{document.name}", "the model")
            used[ids] = True
            split = "heldout" if heldout_score(document.name) < threshold else "train"
            builders[split].add_document(ids, [len(ids)])
            counts[split][0] += 1
            counts[split][1] += len(ids)
            lengths.append(len(ids))
            if split == "heldout":
                heldout_names.append(f"{document.source}/{document.name}")
        check.report(sum(number for number, _ in counts.values()))
        for split, builder in builders.items():
            if not counts[split][0]:
                raise ConfigError(
                    f"no document for {split} out of {sum(n for n, _ in counts.values())} with heldout_fraction "
                    f"{heldout_fraction}: change the fraction{', or give other text: ' * bool(check.skipped)}{check.summary()}"
                )
            builder.finalize(str(folder / f"{split}.idx"))
        tokenizer.save_pretrained(folder / "tokenizer")
        ids = np.flatnonzero(used)
        np.save(folder / USED_IDS, ids)
        plot_lengths(np.array(lengths), folder / "lengths.png")
        description = DataDescription(
            vocab_size=vocabulary,
            largest_token_id=int(ids[-1]),
            end_token_id=end,
            dtype=np.dtype(dtype).name,
            vocabulary_sha256=vocabulary_of(tokenizer, "").identity,
            train_documents=counts["train"][0],
            train_tokens=counts["train"][1],
            heldout_documents=counts["heldout"][0],
            heldout_tokens=counts["heldout"][1],
            heldout_fraction=heldout_fraction,
            heldout_names=heldout_names,
            skipped=dict(check.skipped),
            replaced_documents=check.replaced,
        )
        write_json(folder / "data.json", asdict(description))
    logger.info("%s: %d documents, %d tokens; held out: %d documents, %d tokens", out_dir, *counts["train"], *counts["heldout"])
    logger.info("%s", length_table(np.array(lengths)))
    return description


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
) -> DataDescription:
    """Tokenise text into a dataset folder for training.

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
        chat: the field is a list of {"role", "content"}, written by the tokenizer's chat template; all of it is trained on.

    Raises:
        ConfigError: as `build_dataset`, or there is no tokenizer or text.
    """
    output, folder = expand_home(output), expand_home(tokenizer)
    inputs = [expand_home(path) for path in (input, *more_inputs)]
    check_free(output, overwrite, [*inputs, folder])
    verify_manifest_if_any(folder, ("tokenizer",) if (folder / "tokenizer").is_dir() else ())
    found = load_transformers_tokenizer(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    if found is None:
        raise ConfigError(f"{tokenizer} holds no tokenizer; give a folder with tokenizer.json, a .gguf file, or a model folder")
    if vocab_size is None and (folder / "hylo.json").is_file():
        vocab_size = read_verified_json(folder, "hylo.json", ("model",))["model"]["vocab_size"]
    field = chat_field(found, key or "messages") if chat else TextField(key or "text")
    return build_dataset(
        read_inputs(inputs, field), found, output, heldout_fraction, None, max_documents, vocab_size, overwrite, on_bad_text,
        special_tokens=chat,
    )  # fmt: skip


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


def plain_encoder(tokenizer: Any, special_tokens: bool = False) -> Tokenizer:
    """A copy of the tokenizer's Rust part: no truncation or padding; special tokens in a text are text by default."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = not special_tokens  # "<|endoftext|>" in a document is text about that token
    return encoder


def _vocabulary_size(tokenizer: Any) -> int:
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one with a tokenizer.json")
    return max(tokenizer.get_vocab().values()) + 1


def _heldout_threshold(first: list[Document], all_there: bool, fraction: float) -> float:
    """The score below which documents are held out: the fraction, moved so far that neither side of a small set is empty."""
    if not all_there or not fraction:
        return fraction
    scores = sorted({heldout_score(document.name) for document in first})
    if len(scores) < 2:
        raise ConfigError("one document cannot be both trained on and held out: give several files, or heldout_fraction 0")
    return min(max(fraction, math.nextafter(scores[0], 1.0)), scores[-1])


def _tokenise(
    documents: Iterable[Document], encoder: Tokenizer, end: int, dtype: type[np.number], check: TextCheck
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids [tokens + 1]; batches are encoded on all cores."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    done = tokens = 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tokenising", total=None)
        for batch in _batches(documents):
            for document, found in zip(batch, _encode(batch, encoder, check), strict=True):
                if found is None:
                    continue
                ids = np.array([*found, end], dtype=dtype)
                done, tokens = done + 1, tokens + len(ids)
                yield document, ids
            progress.update(task, description=f"tokenising: {done:,} documents, {tokens:,} tokens")


def _encode(batch: list[Document], encoder: Tokenizer, check: TextCheck) -> Iterator[list[int] | None]:
    """Ids of each document; None where the tokenizer fails, or knows no character of it, which is counted."""
    try:
        encodings = encoder.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
    except STOPS:
        raise
    except BaseException as error:  # a panic in the tokenizer's Rust code is no Exception
        if len(batch) == 1:
            check.failed(batch[0], error)
            yield None
        else:  # it does not say at which document
            middle = len(batch) // 2
            yield from _encode(batch[:middle], encoder, check)
            yield from _encode(batch[middle:], encoder, check)
        return
    for document, encoding in zip(batch, encodings, strict=True):
        if not encoding.ids:
            check.failed(document, "it makes no token of the text")
        yield encoding.ids or None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
