"""RULER's tasks as lm-eval task objects over examples of our own: prompts, generation settings and scorers are lm-eval's."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import ruler
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_hylo.eval.ruler.sources import generators
from megatron_hylo.eval.ruler.texts import Example

METRIC = "string_match"
TEXT, NUMBER = datasets.Value("large_string"), datasets.Value("int64")
FIELDS = {"index": NUMBER, "input": TEXT, "outputs": datasets.Sequence(TEXT), "gen_prefix": TEXT, "max_length": NUMBER}
FILES = {"qa_1": "qa_squad", "qa_2": "qa_hotpot"}  # of the others as the task


@functools.cache
def published_settings(task: str) -> dict[str, Any]:
    """Read lm-eval's YAML file of a task; functions stay names."""
    return load_yaml(Path(ruler.__path__[0]) / f"{FILES.get(task, task)}.yaml", resolve_func=False)


def answer_tokens(task: str) -> int:
    """Tokens that a model may generate for an answer."""
    return int(published_settings(task)["generation_kwargs"]["max_gen_toks"])


class RulerTask(ConfigurableTask):
    """One task at one length.

    Unlike lm-eval's it has one metric, the score at this length, so that no example is counted as -1 at another one.

    Args:
        task: RULER's name.
        length: tokens of the context.
        examples: one or more; `set_examples` may replace them.
    """

    def __init__(self, task: str, length: int, examples: Sequence[Example]) -> None:
        settings = published_settings(task)
        self._examples = list(examples)
        scorer: Callable = getattr(generators().common_utils, settings["process_results"].rpartition(".")[2])
        mean = generators().common_utils.aggregate_metrics

        def score(example: Example, answers: list[str]) -> dict[str, float]:
            """Score an example's answers as lm-eval's task does, under the name of this project's metric."""
            return {METRIC: scorer(example, answers)[str(length)]}

        super().__init__(
            config={name: value for name, value in settings.items() if name not in ("custom_dataset", "tag")}
            | {
                "task": f"{task}_{length}",
                "process_results": score,
                "metric_list": [{"metric": METRIC, "aggregation": mean, "higher_is_better": True}],
                "num_fewshot": 0,
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the examples as the dataset."""
        self.set_examples(self._examples)

    def set_examples(self, examples: Sequence[Example]) -> None:
        """Replace the examples."""
        columns = {name: [example[name] for example in examples] for name in FIELDS}
        self.dataset = {"test": datasets.Dataset.from_dict(columns, datasets.Features(FIELDS))}

    def model_input(self, example: Example, chat_template: Callable | None) -> str:
        """Return the whole prompt as lm-eval gives it to a model, with the answer's prefix and the chat template, if any."""
        return self.fewshot_context(
            example,
            num_fewshot=0,
            apply_chat_template=chat_template is not None,
            chat_template=chat_template,
            gen_prefix=self.doc_to_prefix(example),
        )
