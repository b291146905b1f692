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
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.paths import expand_home
from megatron_hylo.data.chat import chat_field
from megatron_hylo.data.documents import Document, OnBadText, TextField, Unreadable
from megatron_hylo.data.encode_pool import cores
from megatron_hylo.data.inputs import InputFile, InputReader
from megatron_hylo.data.load_tokenizer import find_tokenizer, load_transformers_tokenizer, no_tokenizer
from megatron_hylo.data.make_dataset import (
    DataDescription,
    Loss,
    dataset_settings,
    make_dataset,
)
from megatron_hylo.io import (
    DamagedError,
    check_free,
    output_lock,
    plain_os_errors,
    read_json,
    read_verified_json,
    staging_directory,
    verify_manifest_if_any,
)
from megatron_hylo.io.progress import Track, no_progress

logger = logging.getLogger("megatron_hylo.data")
PARALLEL_BYTES = 2**24  # of input, from which on processes are worth their start
FORMAT = 1  # of the parts


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
    settings = dataset_settings(
        tokenizer, heldout_fraction, end_token_id, max_documents, vocab_size, on_bad_text, special_tokens, "all"
    )
    out_dir = Path(out_dir)
    with output_lock(out_dir):
        check_free(out_dir, overwrite)
        parts = staging_directory(
            out_dir, "parts", "settings", {"start": time.time_ns()}
        )  # of nothing that could be read again
        try:
            return make_dataset(lambda _: iter(documents), None, tokenizer, settings, parts, out_dir, overwrite, 1, no_progress)
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
    found = load_transformers_tokenizer(find_tokenizer(folder))
    if found is None:
        raise no_tokenizer(folder)
    if vocab_size is None and (folder / "hylo.json").is_file():
        vocab_size = read_verified_json(folder, "hylo.json", ("model",))["model"]["vocab_size"]
    field = chat_field(found, key or "messages", loss == "answers") if chat else TextField(key or "text")
    settings = dataset_settings(found, heldout_fraction, None, max_documents, vocab_size, on_bad_text, chat, loss)
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
            made = make_dataset(reader.items, reader, found, settings, parts, output, overwrite, processes, track)
        except (ConfigError, DamagedError) as error:
            if not isinstance(error.__cause__, OSError):  # after an error of the disk the next start goes on
                shutil.rmtree(parts, ignore_errors=True)
            raise
        shutil.rmtree(parts, ignore_errors=True)
    return made


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
