"""Questions about long texts, asked of a model: the text read once for all of its questions, or the answers generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from megatron_hylo.eval.lm_reader import IGNORED, pad_right, read_prompts


@dataclass(frozen=True)
class Question:
    """A question after a text.

    Args:
        ids: tokens of question and answer.
        answer_length: tokens of the answer, the last ones.
        answer: its text.
    """

    ids: list[int]
    answer_length: int
    answer: str


def teacher_forced(lm: Any, texts: Sequence[list[int]], questions: Sequence[Sequence[Question]]) -> list[list[bool]]:
    """Say whether each token of each answer is the most likely one after the right ones before it.

    A text of several questions is read once, and its cache copied for each of them: no question sees another one.

    Args:
        lm: `HyloLM`.
        texts: token ids.
        questions: of each text, in the order of the results.
    """
    results = [[False] * len(asked) for asked in questions]
    alone = [(i, asked[0]) for i, asked in enumerate(questions) if len(asked) == 1]
    answers = lm.answers_correct([texts[i] + q.ids for i, q in alone], [q.answer_length for _, q in alone]) if alone else []
    for (i, _), answer in zip(alone, answers, strict=True):
        results[i][0] = answer.exact
    shared = [i for i, asked in enumerate(questions) if len(asked) > 1]

    def work(batch: list[int]) -> None:
        """Read the texts of one batch once each, and ask each text's questions from copies of its cache."""
        chosen = [shared[i] for i in batch]
        reader, _ = read_prompts(lm.model, [texts[i] for i in chosen], lm.device, lm.prefill_tokens)
        reader.select(torch.tensor([line for line, i in enumerate(chosen) for _ in questions[i]], device=lm.device))
        flat = [(i, number, question) for i in chosen for number, question in enumerate(questions[i])]
        ids = pad_right([q.ids[:-1] for _, _, q in flat], 0, lm.device)
        wanted = [[IGNORED] * (len(q.ids) - 1 - q.answer_length) + q.ids[len(q.ids) - q.answer_length :] for _, _, q in flat]
        targets = pad_right(wanted, IGNORED, lm.device)
        _, most_likely = reader.score(ids, targets, lm.logits_at_once)
        exact = (most_likely | (targets == IGNORED)).all(1)
        for (i, number, _), right in zip(flat, exact.tolist(), strict=True):
            results[i][number] = right

    if shared:
        sizes = [len(texts[i]) + max(len(q.ids) for q in questions[i]) for i in shared]
        lm.runner.run(sizes, work, lm.track, "answers", [len(questions[i]) for i in shared])
    return results


def written(lm: Any, texts: Sequence[list[int]], questions: Sequence[Sequence[Question]]) -> list[list[str]]:
    """Answers that the model writes, without spaces at their ends; arguments as of `teacher_forced`.

    As many tokens are asked for as the right answer has: a longer number whose beginning is right is then another text, as it
    is to teacher forcing.
    """
    results = [[""] * len(asked) for asked in questions]
    flat = [(i, number, q) for i, asked in enumerate(questions) for number, q in enumerate(asked)]
    flat.sort(key=lambda found: found[2].answer_length)
    for count, group in groupby(flat, key=lambda found: found[2].answer_length):
        members = list(group)
        for (i, number, _), text in zip(
            members, lm.continuations([texts[i] + q.ids[:-count] for i, _, q in members], count, []), strict=True
        ):
            results[i][number] = text.strip()
    return results
