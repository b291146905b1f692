"""Recall of numbers hidden in long real text, by length of the text and depth in it.

Three tasks, all of five-digit numbers, right only if every token of the answer is right:

- passkey: one number in a text, asked for at its end. Each example is a text of its own: a second number would be a distractor.
- several_needles: five numbers told apart by one word, all like each other, over the depths.
- key_value: ten numbers told apart by two words, all like each other, over the depths.

A text of the last two is asked about once for each of its facts, each question directly after the text, never after another
question: a model sees what it would if that question were the only one, and reads the text once. Examples of one text are not
independent of each other; standard errors count texts.

Teacher-forced (the default), an answer is right if each of its tokens is the most likely one after the right ones before it.
That is so exactly where greedy generation writes the answer, so both ways give the same score; generated, the decoded text is
compared, which sees the whole path (cache, decoding) and reads a text again for each question.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.parts import Part, run_part
from megatron_hylo.eval.recall_ask import Question, teacher_forced, written
from megatron_hylo.eval.recall_haystack import Haystack, TextEncoder, load_haystack
from megatron_hylo.eval.recall_text import FACTS, RECALL_EVAL_TASKS, RecallEvalTask, make_facts
from megatron_hylo.eval.results import Found, Sample, Score, hash_of, mean, mean_by_group
from megatron_hylo.io.progress import Track, no_progress

logger = logging.getLogger("megatron_hylo.eval")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 100
MOST_SNAP = 64  # tokens that a fact may move to where a sentence ends, or a 32nd of the text if that is less
MOST_FACTS = 0.5  # part of a text that facts and question may take
TOKENS_A_CALL = {"cuda": 2**19, "cpu": 2**12}  # of the texts made at a time; those longer than that one by one
SHOWN = 200  # characters of a prompt's end that a sample keeps


@dataclass(frozen=True)
class Place:
    """Place of one question's fact.

    Args:
        name: of the example, the same for every model with the same tokenizer, e.g. "passkey/1024/0.25/17".
        depth: part of the text before the fact, as asked for.
        token: at which the fact begins.
    """

    name: str
    depth: float
    token: int


@dataclass(frozen=True)
class Text:
    """A text with facts in it, and questions about them.

    Args:
        task, length, number: which it is; with its longest question and that one's answer it has exactly `length` tokens.
        ids: tokens of the text.
        questions, places: one each for every fact that is asked about.
    """

    task: RecallEvalTask
    length: int
    number: int
    ids: list[int]
    questions: list[Question]
    places: list[Place]


def run_recall(
    lm: Any,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    tasks: Sequence[RecallEvalTask] = RECALL_EVAL_TASKS,
    trials: int = TRIALS,
    *,
    data: str | Path,
    generated: bool = False,
    seed: int = 0,
    track: Track = no_progress,
    part: Part = run_part,
) -> Found:
    """Measure recall of a model, longest texts first; the ranks of a torchrun share the texts.

    Args:
        lm: `HyloLM`.
        lengths: tokens of text, question and answer together.
        depths: 0: the fact begins the text, 1: it ends it.
        tasks: what to measure.
        trials: questions for each task and length, spread evenly over the depths: 20 a depth by default, one more at the first
            ones where the number of depths does not divide them.
        data: dataset folder made by `hylo preprocess`, whose held-out documents are the text, or text files.
        generated: let the model write the answers, instead of asking for each token after the right ones before it.
        seed: decides text, numbers and keys.
        track: progress display.
        part: runs a length, or knows its results.

    Returns:
        Scores of metric "exact" for each task and length at each depth and over all depths, and the mean of the tasks by
        length; of several_needles also metric "all", the part of the texts whose five numbers all came back. One sample an
        example. Nothing on other ranks than the first.

    Raises:
        ConfigError: no text, an unknown task, a length that its facts fill, or generation past the model's `max_length`.
    """
    _check(lm, lengths, depths, tasks, trials, generated)
    encoder = TextEncoder(lm.tokenizer)
    haystack = load_haystack(data, encoder, lm.tokenizer, max(lengths), seed)
    tokens = TOKENS_A_CALL.get(lm.device.type, TOKENS_A_CALL["cpu"])
    make = partial(make_text, depths=depths, trials=trials, haystack=haystack, encoder=encoder, seed=seed)

    def measure(length: int) -> Found:
        """Ask about all texts of a length, and score them."""
        calls = [(task, numbers) for task in dict.fromkeys(tasks) for numbers in _calls(task, length, trials, tokens)]
        found: list[tuple[RecallEvalTask, int, int, list[Sample]]] = []
        for task, numbers in track(calls[lm.rank :: lm.world_size], f"recall at {length:,} tokens"):
            texts = [make(task, length, number) for number in numbers]
            answered = zip(texts, _measure(lm, texts, generated), strict=True)
            found += [(task, length, text.number, samples) for text, samples in answered]
        of_ranks = lm.gather_object(found)
        if of_ranks is None:
            return [], []
        measured = sorted((text for one in of_ranks for text in one), key=lambda m: (RECALL_EVAL_TASKS.index(m[0]), *m[1:3]))
        return _scores(measured, lm.max_length, haystack.tokens), [sample for *_, samples in measured for sample in samples]

    scores: list[Score] = []
    samples: list[Sample] = []
    for length in track(sorted(set(lengths), reverse=True), "recall"):
        found = part(f"recall-{length}", partial(measure, length))
        scores += found[0]
        samples += found[1]
    return sorted(scores, key=_order), sorted(samples, key=_order)


def _order(found: Score | Sample) -> tuple[int, int]:
    """Place of a score or sample among others: by task, then length, means last."""
    tasks: tuple[str, ...] = RECALL_EVAL_TASKS
    return tasks.index(found.task) if found.task in tasks else len(tasks), found.length or 0


def make_text(
    task: RecallEvalTask,
    length: int,
    number: int,
    depths: Sequence[float],
    trials: int,
    haystack: Haystack,
    encoder: TextEncoder,
    seed: int,
) -> Text:
    """Make text `number` of a task and length; a function of its arguments alone.

    Raises:
        ConfigError: facts and question take more than half of the length.
    """
    generator = random.Random(f"recall {seed} {task} {length} {number}")
    inserted, asked, room = _facts(task, length, generator, encoder)
    first = number * len(asked)  # of this text's questions
    at_depths = [depths[(first + i) % len(depths)] for i in range(len(asked))]
    body, edges = haystack.cut(room, generator)
    snap = max(1, min(MOST_SNAP, room // 32))
    ids, starts = _insert(encoder.beginning, body, inserted, [_edge(edges, round(depth * room), snap) for depth in at_depths])
    count = min(len(asked), trials - first)
    names = [f"{task}/{length}/{at_depths[i]:g}/{first + i}" for i in range(count)]
    places = [Place(name, at_depths[i], starts[i]) for i, name in enumerate(names)]
    return Text(task, length, number, ids, asked[:count], places)


def check_room(
    lm: Any, lengths: Sequence[int], trials: int = TRIALS, seed: int = 0, tasks: Sequence[RecallEvalTask] = RECALL_EVAL_TASKS
) -> None:
    """Refuse a length that the facts of one of the texts would fill, before any is made.

    Args:
        lm, lengths, trials, seed, tasks: as in `run_recall`.

    Raises:
        ConfigError: names the task and the least length.
    """
    encoder = TextEncoder(lm.tokenizer)
    for task in tasks:
        for number in range(-(-trials // FACTS[task])):
            length = min(lengths)
            _facts(task, length, random.Random(f"recall {seed} {task} {length} {number}"), encoder)


def _facts(
    task: RecallEvalTask, length: int, generator: random.Random, encoder: TextEncoder
) -> tuple[list[list[int]], list[Question], int]:
    """Tokens of a text's facts, the questions about them, and the tokens that are left for the text."""
    facts = make_facts(task, generator)
    inserted = [encoder.ids(f"\n\n{fact.text}\n\n") for fact in facts]
    asked = [Question(*encoder.ids_with_answer(f"\n\n{f.question}", f.answer), f.answer.strip()) for f in facts]
    used = len(encoder.beginning) + sum(map(len, inserted)) + max(len(question.ids) for question in asked)
    if used > MOST_FACTS * length:
        enough = math.ceil(1.25 * used / MOST_FACTS / 128) * 128  # another length has other facts, which may be longer
        raise ConfigError(
            f"recall at length {length:,}: the facts of {task} and a question take {used:,} tokens, more than half; give "
            f"lengths of at least {enough:,}"
        )
    return inserted, asked, length - used


def _calls(task: RecallEvalTask, length: int, trials: int, tokens: int) -> Iterator[range]:
    """Numbers of the texts that are made and asked about together."""
    texts, count = range(-(-trials // FACTS[task])), max(1, tokens // length)
    for start in range(0, len(texts), count):
        yield texts[start : start + count]


def _insert(
    beginning: list[int], body: np.ndarray, texts: list[list[int]], places: list[int]
) -> tuple[list[int], dict[int, int]]:
    """The body with texts before its tokens `places`, and where each text begins then."""
    ids, starts, done = list(beginning), {}, 0
    for i in sorted(range(len(texts)), key=places.__getitem__):
        ids += body[done : places[i]].tolist()
        done = places[i]
        starts[i] = len(ids)
        ids += texts[i]
    return ids + body[done:].tolist(), starts


def _edge(edges: np.ndarray, place: int, most: int) -> int:
    """The edge that is nearest to a place, or the place itself if none is within `most` tokens."""
    right = min(int(np.searchsorted(edges, place)), len(edges) - 1)
    nearest = min((int(edges[i]) for i in (max(right - 1, 0), right)), key=lambda edge: abs(edge - place))
    return nearest if abs(nearest - place) <= most else place


def _measure(lm: Any, texts: list[Text], generated: bool) -> list[list[Sample]]:
    ids, questions = [text.ids for text in texts], [text.questions for text in texts]
    outputs = written(lm, ids, questions) if generated else [[""] * len(asked) for asked in questions]
    if generated:
        right = [[o == q.answer for o, q in zip(*pair, strict=True)] for pair in zip(outputs, questions, strict=True)]
    else:
        right = teacher_forced(lm, ids, questions)
    return [
        [_sample(lm, text, i, float(right[number][i]), outputs[number][i]) for i in range(len(text.questions))]
        for number, text in enumerate(texts)
    ]


def _sample(lm: Any, text: Text, number: int, score: float, output: str) -> Sample:
    question, place = text.questions[number], text.places[number]
    prompt = text.ids[-SHOWN:] + question.ids[: -question.answer_length]
    end = lm.tokenizer.decode(prompt)[-SHOWN:]
    return Sample(
        "recall", text.task, "exact", place.name, score, text.length, place.depth, end, question.answer, output,
        group=f"{text.task}/{text.length}/{text.number}", read_sha256=hash_of(text.ids + question.ids),
    )  # fmt: skip


def _scores(measured: list[tuple[RecallEvalTask, int, int, list[Sample]]], window: int, tokens_of_text: int) -> list[Score]:
    """Scores of each task and length, and the mean of the tasks by length."""
    scores: list[Score] = []
    for (task, length), group in groupby(measured, key=lambda m: m[:2]):
        cell = [(number, sample) for _, _, number, samples in group for sample in samples]
        notes = [f"past the model's window of {window:,}"] * (length > window)
        notes += [f"text repeated, it has {tokens_of_text:,} tokens"] * (length > tokens_of_text)

        def add(
            pairs: list[tuple[int, float]], metric: str = "exact", depth: float | None = None,
            task: RecallEvalTask = task, length: int = length, note: str = "; ".join(notes),
        ) -> None:  # fmt: skip
            """Add the mean of (number of the text, value) pairs, with the standard error between texts."""
            value, error = mean_by_group([value for _, value in pairs], [number for number, _ in pairs])
            scores.append(Score("recall", task, metric, value, error, len(pairs), length, depth, note=note))

        add([(number, sample.score) for number, sample in cell])
        for depth in sorted({sample.depth for _, sample in cell if sample.depth is not None}):
            add([(number, sample.score) for number, sample in cell if sample.depth == depth], depth=depth)
        if task == "several_needles":
            whole = [(number, [s.score for _, s in pairs]) for number, pairs in groupby(cell, key=lambda pair: pair[0])]
            if complete := [(number, min(text)) for number, text in whole if len(text) == FACTS[task]]:
                add(complete, "all")
    overall = [score for score in scores if score.metric == "exact" and score.depth is None]
    lengths = sorted({score.length for score in overall if score.length is not None})
    return scores + [mean(score for score in overall if score.length == length) for length in lengths]


def _check(
    lm: Any, lengths: Sequence[int], depths: Sequence[float], tasks: Sequence[str], trials: int, generated: bool
) -> None:
    unknown = sorted(set(tasks) - set(RECALL_EVAL_TASKS))
    if unknown or not tasks:
        raise ConfigError(
            f"recall has no task {', '.join(unknown) or '(none given)'}; give some of {', '.join(RECALL_EVAL_TASKS)}"
        )
    if not lengths or min(lengths) < 1 or trials < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(
            f"recall needs lengths and trials of at least 1 and depths between 0 and 1, got lengths {tuple(lengths)}, trials "
            f"{trials}, depths {tuple(depths)}"
        )
    if max(lengths) > lm.max_length:
        past = ", ".join(f"{length:,}" for length in sorted(lengths) if length > lm.max_length)
        if generated:
            raise ConfigError(
                f"recall at {past} tokens is past the model's window of {lm.max_length:,}, and generation would cut the text; "
                f"give smaller lengths, or a larger max_length"
            )
        logger.warning("recall at %s tokens is past the model's window of %s", past, f"{lm.max_length:,}")
