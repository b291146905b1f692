"""Perplexity on the held-out windows of a dataset folder: those of `hylo evaluate`, by the model class of all suites.

Each window is read by itself, in one pass, and its first token is not predicted; perplexity_positions.py adds
values by position. Windows are equally long, so the mean of their mean losses is that of all tokens; those of one document are
alike, so the standard error is that between documents.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hylo.data.heldout import heldout_documents, heldout_windows
from megatron_hylo.data.tokenizer import check_ids
from megatron_hylo.eval.recall_haystack import check_tokenizer
from megatron_hylo.eval.results import Sample, Score, hash_of, mean_by_group
from megatron_hylo.io.progress import Track, no_progress

WINDOWS = 32


def read_windows(lm: Any, data: str | Path, sequence_length: int, limit: int | None = None) -> tuple[Tensor, list[int]]:
    """Windows of held-out text, int64 [at most limit or WINDOWS, sequence_length + 1], and the number of each one's document.

    Raises:
        ConfigError: no dataset folder, one of another tokenizer, or no document as long as a window.
    """
    windows = heldout_windows(f"{data}/heldout", sequence_length, limit or WINDOWS)
    check_tokenizer(data, lm.tokenizer)
    check_ids(windows, lm.model.config.vocab_size, data, "the model")
    return windows, heldout_documents(f"{data}/heldout", sequence_length, limit or WINDOWS)


def run_heldout(
    lm: Any, windows: Tensor, documents: Sequence[int], track: Track = no_progress
) -> tuple[list[Score], list[Sample]]:
    """Perplexity over all windows' tokens; its standard error is the perplexity times that of the mean loss between documents.

    Args:
        lm: `HyloLM`; ranks share the windows.
        windows: int64 [n, tokens + 1].
        documents: number of the document that each window is of.
        track: progress display.
    """
    mine = list(range(len(windows)))[lm.rank :: lm.world_size]
    size = max(1, lm.runner.tokens // windows.shape[1])
    found: list[tuple[int, float]] = []
    for start in track(range(0, len(mine), size), "perplexity"):
        numbers = mine[start : start + size]
        log_probs = lm.token_log_probs([windows[number].tolist() for number in numbers])
        found += [(number, -float(values.double().mean())) for number, values in zip(numbers, log_probs)]
    parts = lm.gather_object(found)
    if parts is None:
        return [], []
    losses = [loss for _, loss in sorted(pair for part in parts for pair in part)]
    loss, error = mean_by_group(losses, documents)
    value, length = math.exp(min(loss, 700.0)), windows.shape[1] - 1
    score = Score(
        "ppl", "heldout", "perplexity", value, None if error is None else value * error, len(losses), length,
        higher_is_better=False, note=f"past the model's window of {lm.max_length:,}" if length > lm.max_length else "",
    )  # fmt: skip
    return [score], [
        Sample(
            "ppl", "heldout", "perplexity", f"heldout/{length}/{number}", math.exp(min(loss, 700.0)), length,
            group=f"document {documents[number]}", read_sha256=hash_of(windows[number].tolist()),
        )
        for number, loss in enumerate(losses)
    ]  # fmt: skip
