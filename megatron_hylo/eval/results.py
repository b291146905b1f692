"""Results of one evaluation: what was measured of which model, with the score of every example.

A results folder holds results.json (model, run, scores) and samples.jsonl (one line an example). Two folders can be compared
pair by pair, since an example has the same name in both.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import Suite
from megatron_hylo.io import atomic_directory, read_json, write_json
from megatron_hylo.io.folder_kinds import hint

SCHEMA = 1
RESULTS, SAMPLES = "results.json", "samples.jsonl"


@dataclass(frozen=True)
class Score:
    """A mean over examples of one task.

    Args:
        suite: the suite that the task belongs to.
        task: name of the task, as published where it is; "mean" for a suite's mean.
        metric: "exact", "acc", "acc_norm", "perplexity", ...
        value: a part of 1 for accuracies.
        stderr: standard error of the value; None where it has none.
        examples: how many were measured.
        length: tokens of the context, where the task has lengths.
        depth: place of the needed text in the context, 0 at its beginning, 1 at its end, where the task has depths.
        higher_is_better: False for perplexities and losses.
        note: how this differs from the published task, e.g. "subset"; empty if it does not.
    """

    suite: Suite
    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int
    length: int | None = None
    depth: float | None = None
    higher_is_better: bool = True
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One example.

    Args:
        suite, task, metric, length, depth: those of its `Score`.
        example: its name, the same for every model.
        score: of this example, e.g. 0.0 or 1.0.
        prompt_end: last characters of the prompt.
        expected: right answer.
        output: the model's answer; for multiple choice the text of its choice.
        group: what examples share that are not independent of each other, such as the text that several questions are about;
            empty for an example of its own.
        read_sha256: first digits of the hash of what the model read, so that examples of one name on other text are not taken
            for the same; empty where it is not known.
    """

    suite: Suite
    task: str
    metric: str
    example: str
    score: float
    length: int | None = None
    depth: float | None = None
    prompt_end: str = ""
    expected: str = ""
    output: str = ""
    group: str = ""
    read_sha256: str = ""


Found = tuple[list[Score], list[Sample]]  # of a suite, or a part of one


@dataclass
class EvalResult:
    """Everything that one evaluation found.

    Args:
        model: {"name", "path", "kind", "hash", "parameters", "kv_percent"}; what is unknown is None.
        run: {"command", "commit", "version", "libraries", "devices", "dtype", "seed", "time", "seconds", "settings"}.
        scores: means.
        samples: single examples, in the order of their measurement.
    """

    model: dict[str, Any]
    run: dict[str, Any]
    scores: list[Score] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json holds; the samples are not in it."""
        return {"schema": SCHEMA, "model": self.model, "run": self.run, "scores": [asdict(score) for score in self.scores]}

    def select(self, suite: Suite, task: str | None = None) -> Iterator[Score]:
        """Iterate over the scores of a suite, of one of its tasks if named."""
        return (s for s in self.scores if s.suite == suite and task in (None, s.task))

    def write(self, folder: str | Path, overwrite: bool = False, also: Callable[[Path], object] | None = None) -> None:
        """Write a results folder; it appears when it is complete.

        Args:
            folder: to make.
            overwrite: replace what is there.
            also: adds files to it; called with the folder before it appears, e.g. `report.write_report`.
        """
        with atomic_directory(folder, overwrite) as made:
            write_json(made / RESULTS, self.to_dict())
            with open(made / SAMPLES, "w") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in self.samples)
            if also is not None:
                also(made)


def read_results(folder: str | Path) -> EvalResult:
    """Read a results folder.

    Raises:
        ConfigError: the folder is not one, or was written by a version with another format.
    """
    file = Path(folder) / RESULTS
    if not file.is_file():
        meant = hint(folder, "results")
        raise ConfigError(
            f"{folder} is no results folder: it has no {RESULTS}{meant}; `hylo eval MODEL --output FOLDER` makes one"
        )
    try:
        if "schema" not in read_json(file):  # that of a quickstart, say
            raise ConfigError(f"{folder} is no results folder: its {RESULTS} is not of `hylo eval`")
        stored = read_json(file, needs=("schema", "model", "run", "scores"))
        if stored["schema"] != SCHEMA:
            raise ConfigError(f"{file} has format {stored['schema']}; this version reads {SCHEMA}: run `hylo eval` again")
        lines = (file.parent / SAMPLES).read_text().splitlines()
        scores = [_known(Score, values) for values in stored["scores"]]
        samples = [_known(Sample, json.loads(line)) for line in lines]
        return EvalResult(stored["model"], stored["run"], scores, samples)
    except ConfigError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{folder} cannot be read as a results folder: {error}; run `hylo eval` again") from error


def hash_of(read: str | Sequence[int]) -> str:
    """Return the first 16 digits of the sha256 of a text or of token ids, for `Sample.read_sha256`."""
    content = read.encode() if isinstance(read, str) else np.asarray(read, np.int64).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _known(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{name: values[name] for name in (f.name for f in fields(kind)) if name in values})


def mean(scores: Iterable[Score], task: str = "mean") -> Score:
    """Return the mean of scores of one suite and metric; its standard error takes them to be independent."""
    chosen = list(scores)
    errors = [score.stderr for score in chosen]
    stderr = None if None in errors else sum((error or 0.0) ** 2 for error in errors) ** 0.5 / len(chosen)
    first = chosen[0]
    lengths = {score.length for score in chosen}
    return Score(
        first.suite,
        task,
        first.metric,
        sum(score.value for score in chosen) / len(chosen),
        stderr,
        sum(score.examples for score in chosen),
        length=lengths.pop() if len(lengths) == 1 else None,
        higher_is_better=first.higher_is_better,
        note="; ".join(sorted({score.note for score in chosen} - {""})),
    )


def mean_by_group(values: Sequence[float], groups: Sequence[object]) -> tuple[float, float | None]:
    """Return a mean and its standard error where values of one group are not independent; no error for a single group.

    The error is the cluster-robust one: deviations are summed in each group before they are squared.

    Args:
        values: of each example.
        groups: what each example belongs to, such as the text that it asks about.
    """
    average = sum(values) / len(values)
    sums: dict[object, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - average
    if len(sums) < 2:
        return average, None
    squares = sum(deviation**2 for deviation in sums.values()) * len(sums) / (len(sums) - 1)
    return average, squares**0.5 / len(values)
