"""Perplexity by position in long held-out text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.eval.recall import LENGTHS
from megatron_hylo.eval.recall_haystack import TextEncoder, check_tokenizer, is_dataset, load_haystack
from megatron_hylo.eval.results import Sample, Score, hash_of, mean_by_group
from megatron_hylo.io.progress import Track, no_progress

WINDOWS = 8


def run_by_position(
    lm: Any,
    lengths: Sequence[int] = LENGTHS,
    windows: int = WINDOWS,
    *,
    data: str | Path,
    seed: int = 0,
    track: Track = no_progress,
) -> tuple[list[Score], list[Sample]]:
    """Measure perplexity by position, on texts that all reach the longest length, so that buckets compare the same texts.

    Args:
        lm: `HyloLM`.
        lengths: ends of the buckets, 2 at least, since the first token is not predicted; each begins where the one before it
            ends, the first at 0.
        windows: texts, at most; the longest documents' beginnings, and where there are too few of that length documents end to
            end, which the scores note.
        data: dataset folder made by `hylo preprocess`, whose held-out documents are used, or text files.
        seed: decides which documents are joined.
        track: progress display.

    Returns:
        Scores of suite "ppl", task "by_position", metric "perplexity", whose length is the bucket's end; a sample for each text
        and bucket. Nothing on other ranks than the first.

    Raises:
        ConfigError: no text of the longest length, even end to end.
    """
    ends = sorted(set(lengths))
    texts, joined = _texts(lm, ends[-1], windows, data, seed)
    found: list[tuple[int, list[float]]] = []
    for number in track(range(len(texts))[lm.rank :: lm.world_size], "perplexity by position"):
        (log_probs,) = lm.token_log_probs([texts[number]])
        losses = -log_probs.double()  # of tokens 1 and on
        edges = [0, *ends]
        found.append((number, [losses[max(low - 1, 0) : high - 1].mean().item() for low, high in zip(edges, edges[1:])]))
    parts = lm.gather_object(found)
    if parts is None:
        return [], []
    measured = sorted(pair for part in parts for pair in part)
    notes = [f"{joined} of {len(texts)} texts are documents end to end"] * (joined > 0)
    notes += [f"past the model's window of {lm.max_length:,}"] * (ends[-1] > lm.max_length)
    hashes = [hash_of(text) for text in texts]
    scores, samples = [], []
    for bucket, end in enumerate(ends):
        values = [losses[bucket] for _, losses in measured]
        loss, error = mean_by_group(values, list(range(len(values))))
        value = math.exp(min(loss, 700.0))
        note = "; ".join(notes if end > lm.max_length else notes[: joined > 0])
        scores.append(
            Score(
                "ppl", "by_position", "perplexity", value, None if error is None else value * error, len(values), end,
                higher_is_better=False, note=note,
            )
        )  # fmt: skip
        samples += [
            Sample(
                "ppl", "by_position", "perplexity", f"by_position/{end}/{i}", math.exp(min(losses[bucket], 700.0)), end,
                read_sha256=hashes[i],
            )
            for i, losses in measured
        ]  # fmt: skip
    return scores, samples


def _texts(lm: Any, length: int, windows: int, data: str | Path, seed: int) -> tuple[list[list[int]], int]:
    """Token ids of the texts, and how many of them, the last ones, are of several documents."""
    encoder = TextEncoder(lm.tokenizer)
    beginning = encoder.beginning
    take = length - len(beginning)
    texts: list[list[int]] = []
    if is_dataset(data):
        check_tokenizer(data, lm.tokenizer)
        store = DocumentStore(Path(data) / "heldout")
        for number in np.argsort(-store.lengths, kind="stable")[:windows].tolist():
            if store.lengths[number] >= take:
                texts.append(beginning + store.read(number, 0, take).tolist())
    missing = windows - len(texts)
    if missing:
        haystack = load_haystack(data, encoder, lm.tokenizer, length * missing, seed)
        ends = range(take, haystack.tokens + 1, take)
        texts += [beginning + haystack.ids[end - take : end].tolist() for end in list(ends)[:missing]]
    if not texts:
        raise ConfigError(f"{data} has less held-out text than {length:,} tokens; give smaller lengths, or more text")
    return texts, len(texts) - (windows - missing)
