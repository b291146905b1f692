"""Batched greedy decoding with a carried cache, until stop strings as lm-eval defines them.

A step of one token is a thousand small kernels, and launching them takes a CPU ten times as long as a GPU takes to run them. So
a hybrid's steps on a GPU are one captured CUDA graph, on a cache of fixed size, each fed by the one before without waiting for
the CPU, which looks for finished texts every few steps.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_hylo.eval.lm_reader import read_prompts
from megatron_hylo.hf import HyloCache, HyloForCausalLM
from megatron_hylo.hf.decode_hylo import DecodeGraph, unsupported
from megatron_hylo.io.progress import Track, no_progress

CAPTURED_TOKENS = 8  # new tokens from which a captured graph pays: the first two steps cost as much as without it
UNSEEN_STEPS = 8  # of a captured graph between two looks at the tokens; what is written after a text's end is dropped
ROWS = 64  # a cache's size is a multiple: kernels are compiled for the divisors of its strides
SPARE_TOKENS = 4  # decoded before a stop string: the first token of a piece can lose its space or a character's bytes


class Stopper:
    """Says whether a continuation is finished: by the end-of-sequence token, or by a stop string in its text.

    Args:
        tokenizer: of transformers.
        end: ids that end a text for the model, if it has any; the tokenizer's end-of-sequence token ends it in any case.
        stop: texts that end a continuation.
    """

    def __init__(self, tokenizer: Any, end: int | list[int] | None, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.end = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        # the text of a special token is decoded to nothing
        self.stop = [text for text in stop if text and text != tokenizer.decode(tokenizer.eos_token_id)]
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + SPARE_TOKENS

    def is_finished(self, tokens: Sequence[int]) -> bool:
        """Whether the newest of a continuation's tokens ends it."""
        return tokens[-1] in self.end or self._stops(tokens[-self.tail :])

    def end_of(self, tokens: Sequence[int], new: int) -> int | None:
        """Return a continuation's tokens up to the first of the last `new` ones that ends it, in number; None: none does."""
        before = len(tokens) - new
        if self.end.isdisjoint(tokens[before:]) and not self._stops(tokens[max(0, before + 1 - self.tail) :]):
            return None
        return next((count for count in range(before + 1, len(tokens) + 1) if self.is_finished(tokens[:count])), None)

    def _stops(self, tokens: Sequence[int]) -> bool:
        if not self.stop:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in self.stop)


@torch.inference_mode()
def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    stopper: Stopper,
    device: torch.device,
    piece: int,
    track: Track = no_progress,
) -> list[list[int]]:
    """Continue prompts of nearly one length with the most likely tokens, until all of them are finished.

    Where steps are not captured, sequences that are finished leave the batch when half of it is.

    Args:
        model: causal LM of transformers.
        prompts: token ids.
        max_new_tokens: at most, of each prompt.
        stopper: says when one is finished.
        device: of the model.
        piece: tokens of a prompt in one pass.
        track: progress display over the steps.

    Returns:
        new tokens of each prompt, the one that ended it included.
    """
    most = max(max_new_tokens)
    cache = _fixed_cache(model, max(map(len, prompts)), most, device)
    reader, logits = read_prompts(model, prompts, device, piece, cache)
    graph = None
    if cache is not None:
        cache.graph = None  # that of a last piece of one token: with the cache a circle, which would stay in memory
        graph = DecodeGraph(model, cache, compiles=False)

    def step(chosen: torch.Tensor) -> torch.Tensor:
        """Return the logits [batch, vocabulary] after the chosen tokens [batch], by the CUDA graph where there is one."""
        found = reader.read(chosen[:, None], last=True) if graph is None else graph(chosen[:, None])[:, -1]
        assert found is not None, "asked for by last"
        return found

    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # prompts that are in the batch
    finished: set[int] = set()
    unseen = 1 if graph is None else UNSEEN_STEPS
    for made in track(range(0, most, unseen), "decode"):
        columns = [logits.argmax(-1)]
        while len(columns) < min(unseen, most - made):
            columns.append(step(columns[-1]).argmax(-1))
        for row, tokens in zip(rows, torch.stack(columns, 1).tolist()):
            if row not in finished:
                added = tokens[: max_new_tokens[row] - made]
                new[row] += added
                if (end := stopper.end_of(new[row], len(added))) is not None:
                    del new[row][end:]
                if end is not None or len(new[row]) == max_new_tokens[row]:
                    finished.add(row)
        if len(finished) == len(prompts):
            break
        chosen = columns[-1]
        left = [place for place, row in enumerate(rows) if row not in finished]
        if graph is None and 2 * len(left) <= len(rows):
            kept = torch.tensor(left, device=device)
            reader.select(kept)
            chosen, rows = chosen[kept], [rows[place] for place in left]
        logits = step(chosen)
    return new


def _fixed_cache(model: Any, tokens: int, new: int, device: torch.device) -> HyloCache | None:
    """A cache of fixed size for so many tokens and new ones, where steps are to be captured; None where they are not."""
    if not isinstance(model, HyloForCausalLM) or new < CAPTURED_TOKENS:
        return None
    cache = HyloCache(-(-(tokens + new) // ROWS) * ROWS)
    captured = device.type == "cuda" or model.decodes_with_fixed_shapes
    return cache if captured and unsupported(model, cache) is None else None
