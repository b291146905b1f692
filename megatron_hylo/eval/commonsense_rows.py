"""Rows of question sets from PyPI in the fields that lm-eval's templates read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _labelled(question: str) -> Callable[[Row], Row]:
    """Map a set of lettered choices to AI2's fields; `question` is the name of the question's."""
    return lambda row: {
        question: row["question"],
        "choices": {"text": row["choices"], "label": row["labels"]},
        "answerKey": row["answer"],
    }


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": row["goal"], "sol1": first, "sol2": second, "label": row["labels"].index(row["answer"])}


def _winogrande(row: Row) -> Row:
    first, second = row["choices"]
    number = str(row["labels"].index(row["answer"]) + 1)
    return {"sentence": row["sentence"], "option1": first, "option2": second, "answer": number}


def _hellaswag(row: Row) -> Row:
    """Rows hold the joined context; the template begins with an activity label, which they do not have, and cleans both."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    context, _, last = row["question"].rpartition(". ")
    if context and last[:1].islower():  # the beginning of the sentence that is continued, written as the template does
        context = f"{context}. {last.capitalize()}"
    else:
        context = row["question"]
    choices = [preprocess(choice) for choice in row["choices"]]
    return {"query": preprocess(context), "choices": choices, "label": str(row["labels"].index(row["answer"]))}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": f"#### {row['answer']}"}


MAPPERS: dict[str, Callable[[Row], Row]] = {
    "arc_challenge": _labelled("question"),
    "hellaswag": _hellaswag,
    "openbookqa": _labelled("question_stem"),
    "piqa": _piqa,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
}
OVERRIDES: dict[str, dict[str, Any]] = {"hellaswag": {"process_docs": None}}  # of a task's settings, for these rows
NOTES = {"hellaswag": "subset: 1,000 of 10,042 rows, without activity labels"}


def read_rows(folder: Path, task: str) -> list[Row]:
    """Rows of a task of MAPPERS out of the folder of `fetch_questions`, in the template's fields and in their order."""
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [MAPPERS[task](json.loads(line)) for line in lines]
