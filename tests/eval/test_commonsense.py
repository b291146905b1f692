"""Common sense and GSM8K through lm-eval's tasks, on rows as they come from PyPI, answered by models that know or guess."""

import hashlib
import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_hylo.config import ConfigError
from megatron_hylo.eval import commonsense
from megatron_hylo.eval.commonsense import COMMONSENSE, FILES, load_tasks, run_commonsense, run_gsm8k

ROWS = 60
LETTERS = ["A", "B", "C", "D"]


def row(task: str, number: int) -> tuple[dict, str]:
    """(a row in the package's fields, the right choice)."""
    count = 2 if task in ("piqa", "winogrande") else 4
    choices = [f"{task} {number} {letter} {'long ' * (i % 3)}end" for i, letter in enumerate(LETTERS[:count])]
    right = (number * 7) % count
    found = {"task_id": f"{task}/{number}", "choices": choices, "labels": LETTERS[:count], "answer": LETTERS[right]}
    texts = {
        "piqa": {"goal": f"goal {number}"},
        "winogrande": {"sentence": f"In {number} the _ was right."},
        "hellaswag": {"question": f"A man {number} [step] is on a roof. he"},
    }
    return found | texts.get(task, {"question": f"question {number}?"}), choices[right]


@pytest.fixture
def answers(tmp_path, monkeypatch) -> set[str]:
    """Rows in place of the download; returns the right choices, and GSM8K's answers as "question: answer"."""
    right = set()
    for task in ("arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande"):
        rows = [row(task, number) for number in range(ROWS)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(one) + "\n" for one, _ in rows))
        right |= {choice for _, choice in rows}
    rows = [{"task_id": f"GSM8K/{n}", "question": f"How much is {n}?", "answer": str(1000 + n)} for n in range(ROWS)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    monkeypatch.setattr(commonsense, "fetch_questions", lambda: tmp_path)
    return right


class Oracle(LM):
    """Scores right choices above all others, and writes GSM8K's answers in words."""

    def __init__(self, right: set[str]) -> None:
        super().__init__()
        self.right = right

    def value(self, prompt: str, answer: str) -> float:
        in_prompt = any(choice in prompt for choice in self.right)  # WinoGrande's
        return 0.0 if in_prompt or answer.strip() in self.right else -100.0

    def loglikelihood(self, requests):
        return [(self.value(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        numbers = [int(request.args[0].split("?")[0].split()[-1]) for request in requests]
        return [f" We know that 3 and 4 lead to ${1000 + n:,}." for n in numbers]


class Guesser(Oracle):
    """Scores choices by a hash of the whole request."""

    def value(self, prompt: str, answer: str) -> float:
        return -float(int(hashlib.sha256((prompt + answer).encode()).hexdigest(), 16) % 1000) * len(answer.strip())


def test_a_model_that_knows_scores_all(answers):
    scores, samples = run_commonsense(Oracle(answers))
    assert {(s.task, s.metric) for s in scores} == {
        ("arc_challenge", "acc"), ("arc_challenge", "acc_norm"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"),
        ("openbookqa", "acc"), ("openbookqa", "acc_norm"), ("piqa", "acc"), ("piqa", "acc_norm"), ("winogrande", "acc"),
        ("mean", "acc_norm"),
    }  # fmt: skip
    assert all(score.value == 1.0 for score in scores)
    assert all(sample.score == 1.0 and sample.expected == sample.output for sample in samples)
    assert len({sample.example for sample in samples}) == len(samples) == 5 * ROWS
    assert scores[-1].note == "5 of 7 tasks, without arc_easy, race; rows from PyPI" and scores[-1].examples == 5 * ROWS
    assert next(s for s in scores if s.task == "hellaswag").note.startswith("subset: 1,000 of 10,042 rows")


def test_a_model_that_guesses_scores_at_chance(answers):
    scores, samples = run_commonsense(Guesser(answers))
    for score in scores[:-1]:
        chance = 0.5 if score.task in ("piqa", "winogrande") else 0.25
        assert score.value == pytest.approx(chance, abs=3 * (chance * (1 - chance) / ROWS) ** 0.5)
    wrong = [sample for sample in samples if sample.score == 0.0]
    assert wrong and all(sample.expected != sample.output for sample in wrong)
    assert scores[-1].stderr == pytest.approx(0.027, abs=0.003)  # of 5 x 60 examples


def test_answers_of_gsm8k_are_the_last_number(answers):
    scores, samples = run_gsm8k(Oracle(answers), limit=5)
    assert [(s.metric, s.value, s.examples) for s in scores] == [("exact_match", 1.0, 5), ("exact_match_strict", 0.0, 5)]
    assert scores[0].note == "subset: the first 5 of 60 rows; rows from PyPI"
    assert samples[2].example == "gsm8k/2" and samples[2].expected == "#### 1002" and "$1,002." in samples[2].output


def test_prompts_are_lm_evals_own(answers):
    """Each template applied by hand to what its data set would hold."""
    expected = {
        "arc_challenge": ("Question: question 1?\nAnswer:", " arc_challenge 1 A end"),
        "hellaswag": ("A man 1 is on a roof. He", " hellaswag 1 A end"),
        "openbookqa": ("question 1?", " openbookqa 1 A end"),
        "piqa": ("Question: goal 1\nAnswer:", " piqa 1 A end"),
        "winogrande": ("In 1 the winogrande 1 A end", " was right."),
    }
    for name, (task, _) in load_tasks(list(expected)).items():
        task.build_all_requests(limit=2, rank=0, world_size=1)
        first = next(one for one in task.instances if one.doc_id == 1 and one.idx == 0)
        assert first.args == expected[name], name
        published = load_yaml(Path(lm_eval.tasks.__path__[0]) / FILES[name], resolve_func=True)
        for setting in ("doc_to_text", "doc_to_choice", "doc_to_target", "metric_list"):
            used = getattr(task.config, setting)
            assert used == published[setting] or used.__code__ == published[setting].__code__, (name, setting)


def test_tasks_without_data_are_refused_by_name(answers, caplog):
    with pytest.raises(ConfigError, match="no task 'arc'; choose out of arc_challenge"):
        load_tasks(["arc"])
    with pytest.raises(ConfigError, match="no data for race here; --online downloads"):
        load_tasks(["race"])
    assert set(COMMONSENSE) - set(load_tasks(COMMONSENSE)) == {"arc_easy", "race"}
    assert "no data for arc_easy, race" in caplog.text
