"""Batched greedy decoding with a carried cache, until stop strings as lm-eval defines them."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_hylo.eval.lm_reader import read_prompts
from megatron_hylo.io.progress import Track, no_progress

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
        if tokens[-1] in self.end:
            return True
        if not self.stop:
            return False
        text = self.tokenizer.decode(tokens[-self.tail :], skip_special_tokens=True)
        return any(stop in text for stop in self.stop)


def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    stopper: Stopper,
    device: torch.device,
    piece: int,
    track: Track = no_progress,
) -> list[list[int]]:
    """Continue prompts of nearly one length with the most likely tokens.

    Sequences that are finished leave the batch when half of it is.

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
    new: list[list[int]] = [[] for _ in prompts]
    reader, logits = read_prompts(model, prompts, device, piece)
    rows = list(range(len(prompts)))  # prompts that are in the batch
    finished: set[int] = set()
    for _ in track(range(max(max_new_tokens)), "decode"):
        chosen = logits.argmax(-1)
        for row, token in zip(rows, chosen.tolist()):
            if row not in finished:
                new[row].append(token)
                if len(new[row]) == max_new_tokens[row] or stopper.is_finished(new[row]):
                    finished.add(row)
        if len(finished) == len(prompts):
            break
        left = [place for place, row in enumerate(rows) if row not in finished]
        if 2 * len(left) <= len(rows):
            kept = torch.tensor(left, device=device)
            reader.select(kept)
            chosen, rows = chosen[kept], [rows[place] for place in left]
        found = reader.read(chosen[:, None], last=True)
        assert found is not None, "asked for by last"
        logits = found
    return new
