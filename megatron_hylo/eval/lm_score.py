"""Log-probabilities of given tokens after their prompts, in batches; a prompt that several answers share is read once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.eval.lm_reader import IGNORED, Reader, pad_right, read_prompts


def score_tokens(lm: Any, rows: Sequence[list[int]], counts: Sequence[int], description: str) -> list[tuple[Tensor, Tensor]]:
    """Score the last tokens of sequences, each token predicted from those before it.

    Args:
        lm: `HyloLM`.
        rows: token ids.
        counts: how many of each row's last tokens are scored, fewer than it has.
        description: of the progress display.

    Returns:
        Log-probabilities, fp32 [count], and whether each token is the most likely one, both on the CPU.
    """
    results: list[Any] = [None] * len(rows)

    def work(batch: list[int]) -> None:
        """Score one batch of rows, padded on the right, and put the results, on the CPU, in their places."""
        ids = pad_right([rows[i][:-1] for i in batch], 0, lm.device)
        wanted = [[IGNORED] * (len(rows[i]) - 1 - counts[i]) + rows[i][len(rows[i]) - counts[i] :] for i in batch]
        targets = pad_right(wanted, IGNORED, lm.device)
        reader = Reader(lm.model, lm.prefill_tokens)
        log_probs, greedy = (found.cpu() for found in reader.score(ids, targets, lm.logits_at_once))
        for line, index in enumerate(batch):
            end = len(rows[index]) - 1
            place = slice(end - counts[index], end)
            results[index] = (log_probs[line, place].clone(), greedy[line, place].clone())

    if rows:
        lm.runner.run([len(row) for row in rows], work, lm.track, description)
    return results


def score_shared(
    lm: Any, groups: Sequence[tuple[list[int], list[int]]], answers: Sequence[list[int]]
) -> dict[int, tuple[float, bool]]:
    """Score answers to the same prompt: it is read once, and its cache copied for each answer.

    Args:
        lm: `HyloLM`.
        groups: (prompt, numbers of its answers).
        answers: token ids by number.

    Returns:
        By number, the log-probability of the whole answer and whether each of its tokens is the most likely one.
    """
    results: dict[int, tuple[float, bool]] = {}

    def work(batch: list[int]) -> None:
        """Read the prompts of one batch once each, and score all answers from copies of their caches."""
        reader, logits = read_prompts(lm.model, [groups[i][0] for i in batch], lm.device, lm.prefill_tokens)
        owners = [line for line, i in enumerate(batch) for _ in groups[i][1]]
        numbers = [number for i in batch for number in groups[i][1]]
        rows = torch.tensor(owners, device=lm.device)
        first = torch.tensor([answers[number][0] for number in numbers], device=lm.device)
        log_probs = logits.float().log_softmax(-1)[rows, first]
        greedy = logits.argmax(-1)[rows] == first
        longer = [place for place, number in enumerate(numbers) if len(answers[number]) > 1]
        if longer:
            reader.select(rows[longer])
            ids = pad_right([answers[numbers[place]][:-1] for place in longer], 0, lm.device)
            targets = pad_right([answers[numbers[place]][1:] for place in longer], IGNORED, lm.device)
            more, also = reader.score(ids, targets, lm.logits_at_once)
            log_probs[longer] += more.sum(1)
            greedy[longer] &= (also | (targets == IGNORED)).all(1)
        for number, log_prob, most in zip(numbers, log_probs.tolist(), greedy.tolist()):
            results[number] = (log_prob, most)

    if groups:
        sizes = [len(prompt) + max(len(answers[number]) for number in numbers) for prompt, numbers in groups]
        repeats = [len(numbers) for _, numbers in groups]
        lm.runner.run(sizes, work, lm.track, "log-likelihoods, shared prompts", repeats)
    return results
