"""Datasets of text that a model writes itself: its own distribution, at no cost but sampling.

Documents are sampled in shards, batches of rows that each read `length` tokens. What is done is kept beside the output, so a
start that was killed goes on at the shard where it was, and makes the same bytes.

OUTPUT is a dataset folder as `hylo preprocess` makes it (data/preprocess.py), with
OUTPUT/sampled.json     teacher, settings, and what the text is like: share cut off, repetition, documents left out and why
"""

import logging
import math
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.open_model import open_as_hybrid
from megatron_hylo.data.dataset_files import DatasetFiles
from megatron_hylo.data.documents import TextCheck
from megatron_hylo.data.make_dataset import DataDescription, dataset_settings, finish_dataset, heldout_score, heldout_threshold
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.data.tokenizer import check_dataset
from megatron_hylo.eval.lm_facts import model_identity
from megatron_hylo.hf import HyloForCausalLM
from megatron_hylo.hf.cache_hylo import cache_nbytes, free_bytes
from megatron_hylo.io import check_free, output_lock, plain_os_errors, staging_directory, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checks import require_finite
from megatron_hylo.serve.text_prompts import Draft, Prompts
from megatron_hylo.serve.text_sampler import repetition, sample_documents

logger = logging.getLogger("megatron_hylo.serve")
FORMAT = 1  # of the parts
TICKS = 1000  # steps of the progress that is shown
SOURCE = "sampled"  # of the documents' names
MOST_ROWS = {"cuda": 1024, "cpu": 32}  # of a batch; more bring little
MEMORY_SHARE = 0.85  # of the free memory
LOGITS_BYTES = 24  # an entry: logits in their dtype and fp32, probabilities, random numbers
SPARE = 1.02  # times the tokens that the last shard has to bring
LEAST_CUT = 64  # tokens of a document that was cut off; fewer are left out


@dataclass
class Figures:
    """Counts of the documents so far; all but the first two are of those that are kept."""

    sampled: int = 0  # documents
    left_out: dict[str, int] = field(default_factory=dict)  # documents, by reason
    documents: int = 0
    tokens: int = 0  # end tokens included
    given: int = 0  # of these, those of prompts
    cut: int = 0  # documents
    repeated: float = 0.0  # tokens times `repetition`

    def to_dict(self) -> dict[str, Any]:
        """Shares and means, as sampled.json has them."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "given_tokens": self.given,
            "mean_length": self.tokens / max(1, self.documents),
            "cut_share": self.cut / max(1, self.documents),
            "repetition": self.repeated / max(1, self.tokens),
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        said = self.to_dict()
        out = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {said['mean_length']:,.0f} a document; "
            f"{said['cut_share']:.1%} cut off at the end of their row; repetition {said['repetition']:.3f} (part of 8-grams "
            f"that came before in their document); left out: {out or 'none'}"
        )


@dataclass(frozen=True)
class SampleSettings:
    """Settings that decide the text; see `sample_text`."""

    tokens: int
    length: int
    temperature: float
    top_p: float
    chat_share: float
    starts: str | None
    starts_share: float
    start_tokens: int
    max_repetition: float
    heldout_fraction: float
    batch_size: int | None
    precision: str
    seed: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.length, self.start_tokens, self.batch_size or 1) < 1:
            raise ConfigError(
                f"tokens, length, start_tokens and batch_size must be at least 1, got {self.tokens}, {self.length}, "
                f"{self.start_tokens} and {self.batch_size}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 < self.max_repetition <= 1:
            raise ConfigError(
                f"need temperature >= 0, 0 < top_p <= 1 and 0 < max_repetition <= 1, got {self.temperature}, {self.top_p} and "
                f"{self.max_repetition}"
            )


def sample_text(
    teacher: str | Path,
    output: str | Path,
    tokens: int,
    length: int = 2048,
    temperature: float = 1.0,
    top_p: float = 0.95,
    chat_share: float = 0.0,
    starts: str | Path | None = None,
    starts_share: float | None = None,
    start_tokens: int = 64,
    max_repetition: float = 0.5,
    heldout_fraction: float = 0.05,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    overwrite: bool = False,
    track: Track = no_progress,
) -> tuple[DataDescription, Figures]:
    """Sample documents from a model into a dataset folder, and go on where a killed start was.

    Args:
        teacher: model folder, training checkpoint, Hugging Face folder or .gguf file.
        output: dataset folder to make.
        tokens: to write, training and held-out ones together; the last shard may bring a few more.
        length: tokens that a row of the batch reads: several documents end to end, none is longer.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the most likely tokens that hold this much probability.
        chat_share: part of the documents that are a user's turn and its answer in the tokenizer's chat template, both sampled.
        starts: dataset folder of the same tokenizer, with whose training documents' first tokens others begin.
        starts_share: part of the documents that do; by default .5 where there are starts.
        start_tokens: how many tokens.
        max_repetition: documents of which more 8-grams than this part came before in them are left out.
        heldout_fraction: part of the documents held out for evaluation.
        batch_size: rows of a batch; by default what the memory holds, 1,024 at most.
        dtype: of weights and cache.
        seed: decides prompts and tokens.
        overwrite: replace the output folder.
        track: shows progress, by the tokens written.

    Returns:
        data.json's content, and what the text is like.

    Raises:
        ConfigError: settings out of range, rows longer than the model's positions, starts of another tokenizer, no room.
    """
    output = Path(output)
    share = starts_share if starts_share is not None else 0.5 if starts is not None else 0.0
    settings = SampleSettings(
        tokens, length, temperature, top_p, chat_share, None if starts is None else str(starts), share, start_tokens,
        max_repetition, heldout_fraction, batch_size, str(dtype).removeprefix("torch."), seed,
    )  # fmt: skip
    check_free(output, overwrite, [teacher, starts])
    model, tokenizer = open_as_hybrid(teacher, dtype)
    require_finite(model, teacher)
    _check_length(model, settings, teacher)
    if starts is not None:
        check_dataset(starts, teacher, model.config.vocab_size)
    data = dataset_settings(tokenizer, heldout_fraction, None, None, model.config.vocab_size, "skip", False, "all")
    prompts = Prompts(
        tokenizer, _ends(model, tokenizer, data.end), data.end, chat_share,
        None if starts is None else DocumentStore(Path(starts) / "train"), share, start_tokens,
    )  # fmt: skip
    if prompts.longest >= length:
        raise ConfigError(f"prompts of {prompts.longest:,} tokens leave no room in rows of {length:,}; give a larger length")
    about = {"format": FORMAT, "teacher": model_identity(Path(teacher), track), "device": model.device.type, **asdict(settings)}
    with output_lock(output), plain_os_errors():
        parts = staging_directory(output, "parts", "settings", about)
        with closing(DatasetFiles(parts, data.splits, np.dtype(DType.optimal_dtype(data.vocabulary)), False)) as files:
            figures = _fill(
                files, model, prompts, settings, min(data.vocabulary, model.config.vocab_size), data.end, output, track
            )
            check = TextCheck()
            check.skipped.update(figures.left_out)

            def describe(folder: Path) -> None:
                """Write sampled.json beside the dataset: teacher, settings and figures of the text."""
                named = about | {"teacher": str(teacher), "teacher_identity": about["teacher"]}
                write_json(folder / "sampled.json", named | {"text": figures.to_dict()})

            made = finish_dataset(files, tokenizer, data, check, output, overwrite, describe)
        shutil.rmtree(parts, ignore_errors=True)
    logger.info("%s", figures)
    return made, figures


def _fill(
    files: DatasetFiles,
    model: HyloForCausalLM,
    prompts: Prompts,
    settings: SampleSettings,
    vocabulary: int,
    end: int,
    output: Path,
    track: Track,
) -> Figures:
    """Sample shards until there are enough tokens."""
    former = files.state or {"shards": 0, "rows": 0, "threshold": None, "figures": asdict(Figures())}
    figures = Figures(**former["figures"])
    shards, threshold = former["shards"], former["threshold"]
    rows = former["rows"] or settings.batch_size or rows_that_fit(model, settings.length)
    done = min(1.0, figures.tokens / settings.tokens)
    if shards:
        logger.info("going on with %s at shard %d, %s tokens are written", output, shards, f"{figures.tokens:,}")
    ticks = iter(track(range(math.floor(done * TICKS), TICKS), f"sampling, from {done:.0%} on" if done else "sampling"))
    ticked = math.floor(done * TICKS)
    next(ticks, None)

    def show(share: float) -> None:
        """Move the progress bar to this share of the tokens, between 0 and 1."""
        nonlocal ticked
        while ticked + 1 < min(share, 1.0) * TICKS:
            ticked += 1
            next(ticks, None)

    while figures.tokens < settings.tokens:
        kept = figures.tokens / (shards * rows * settings.length) if shards else 1.0
        if shards and not figures.tokens:
            raise ConfigError(f"nothing of {figures.sampled:,} sampled documents can be used: {figures}; change the sampling")
        left = SPARE * (settings.tokens - figures.tokens)  # with some to spare, so that no small shard has to follow
        wanted = min(rows, math.ceil(left / (settings.length * kept)))
        start, before, size = time.monotonic(), figures.tokens, wanted * settings.length * kept

        def each_step(step: int, before: int = before, size: float = size) -> None:
            """Show the part of all tokens that is sampled after a step of this batch."""
            show((before + step / settings.length * size) / settings.tokens)

        documents = list(
            sample_documents(
                model, prompts, wanted, settings.length, settings.temperature, settings.top_p, vocabulary,
                (settings.seed, shards), each_step,
            )
        )  # fmt: skip
        seconds = time.monotonic() - start
        chosen = [draft for draft in documents if _keep(draft, figures, settings.max_repetition)]
        names = [f"{shards}-{number}" for number in range(len(chosen))]
        if threshold is None and chosen:
            threshold = heldout_threshold(names, settings.heldout_fraction)
        for name, draft in zip(names, chosen):
            ids = np.array([*draft.ids, end], files.dtype).tobytes()
            split = "heldout" if threshold is not None and heldout_score(name) < threshold else "train"
            files.add(split, f"{SOURCE}/{name}", ids, None)
        shards += 1
        files.save({"shards": shards, "rows": rows, "threshold": threshold, "figures": asdict(figures)})
        logger.info(
            "shard %d: %d rows of %s tokens in %.0f s, %s tokens/s; so far %s",
            shards, wanted, f"{settings.length:,}", seconds, f"{wanted * settings.length / seconds:,.0f}", figures,
        )  # fmt: skip
    show(1.0)
    for _ in ticks:
        pass
    return figures


def _keep(draft: Draft, figures: Figures, most: float) -> bool:
    """Count a document; False for one that is left out."""
    figures.sampled += 1
    repeated = repetition(draft.ids)
    if len(draft.ids) == draft.given:
        reason = "empty"
    elif draft.kind == "chat" and not draft.ended:
        reason = "cut within a chat"
    elif not draft.ended and len(draft.ids) < LEAST_CUT:
        reason = f"cut before {LEAST_CUT} tokens"
    elif repeated > most:
        reason = f"of repetition above {most:g}"
    else:
        count = len(draft.ids) + 1
        figures.documents += 1
        figures.tokens += count
        figures.given += draft.given
        figures.cut += not draft.ended
        figures.repeated += count * repeated
        return True
    figures.left_out[reason] = figures.left_out.get(reason, 0) + 1
    return False


def rows_that_fit(model: HyloForCausalLM, columns: int) -> int:
    """Rows of a batch whose cache of so many columns and logits the free memory holds, `MOST_ROWS` at most.

    Raises:
        ConfigError: not even one.
    """
    most = MOST_ROWS[model.device.type]
    if model.device.type != "cuda":
        return most
    free = free_bytes(model.device)
    assert free is not None, "a GPU says it"
    row = cache_nbytes(model.config, columns, model.dtype.itemsize) + LOGITS_BYTES * model.config.vocab_size
    rows = min(most, int(MEMORY_SHARE * free / row))
    if rows < 1:
        raise ConfigError(
            f"a row of {columns:,} tokens takes {row / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of the GPU's memory are "
            f"free; give a smaller length"
        )
    return rows if rows < 64 else rows // 64 * 64


def _ends(model: HyloForCausalLM, tokenizer: Any, end: int) -> list[int]:
    """Tokens that end a document: the one between documents, the tokenizer's, and those of generation_config.json."""
    own = model.generation_config.eos_token_id
    found = [end, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})


def _check_length(model: HyloForCausalLM, settings: SampleSettings, teacher: str | Path) -> None:
    longest = model.config.max_position_embeddings
    if longest is not None and settings.length > longest:
        raise ConfigError(
            f"rows of {settings.length:,} tokens are past the {longest:,} positions that {teacher} was made for, where what it "
            f"writes is poor; give --length {longest}"
        )
