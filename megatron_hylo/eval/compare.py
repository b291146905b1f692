"""Comparison of evaluations: the same quantities side by side, and differences over the same examples.

A quantity is one number of a results folder: a task at a length, or the mean of several tasks. Its difference between two
models is the mean over examples that both were asked, which leaves out how hard the examples are and so has a smaller error
than the difference of two means. Examples are the same when suite, task, metric, length, depth, name and right answer are.

Standard errors: of a mean of examples, the sample's standard deviation / sqrt(n), with deviations summed in each group of
examples that are not independent (a text with several questions); of a mean of tasks, sqrt(sum of squares) / number of tasks.
Intervals hold 95 % and have Student's t of (groups - 1) degrees of freedom. Perplexities are compared by their logarithms, so
that their "difference" is the logarithm of a ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.results import EvalResult, Sample, Score, Suite, mean, mean_by_group

Z95 = 1.959963984540054
FEWEST = 5  # groups of examples without which an interval would say nothing
SUITES: dict[Suite, str] = {
    "ppl": "Perplexity", "recall": "Recall", "ruler": "RULER", "commonsense": "Common sense", "gsm8k": "GSM8K",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Quantity:
    """The key of a row of a comparison.

    Args:
        suite, task, metric, length: those of its scores; over all depths.
    """

    suite: Suite
    task: str
    metric: str
    length: int = 0  # 0: none

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean of tasks."""
        return self.task == "mean"

    @property
    def is_ratio(self) -> bool:
        """Whether models are compared by the ratio of their values."""
        return "perplexity" in self.metric


@dataclass(frozen=True)
class Estimate:
    """A value with its error.

    Args:
        value: the mean.
        stderr: its standard error; None where there is none.
        low, high: ends of the 95 % interval; None as well.
        examples: number of them.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    examples: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A model's value minus the baseline's over the same examples; of perplexities, the logarithm of their ratio.

    Args:
        examples: pairs.
        only_baseline, only_model: examples that one of both was not asked, or under that name another question.
        better: whether the interval says that the model is better (True) or worse (False); None if neither.
    """

    only_baseline: int = 0
    only_model: int = 0
    better: bool | None = None


@dataclass
class Row:
    """One quantity of all models; a model that was not asked has None.

    Args:
        quantity: what it is.
        higher_is_better: False for perplexities and losses.
        values: of each model.
        differences: of each model from the first, whose own is None; None also where no example is the same.
        notes: of the scores, e.g. "subset".
    """

    quantity: Quantity
    higher_is_better: bool
    values: list[Estimate | None]
    differences: list[Difference | None]
    notes: list[str] = field(default_factory=list)


def compare(results: Sequence[EvalResult]) -> list[Row]:
    """Compare evaluations; the first is the baseline.

    Args:
        results: one a model.

    Raises:
        ConfigError: an evaluation has two examples of one name.
    """
    samples = [_by_example(result) for result in results]
    scores = [_by_quantity(result) for result in results]
    rows = []
    for quantity in sorted({q for found in scores for q in found}, key=_order):
        there = [found.get(quantity) for found in scores]
        first = next(score for score in there if score is not None)
        differences: list[Difference | None] = [None]
        for number in range(1, len(results)):
            pair = [(scores[i], samples[i]) for i in (0, number)]
            differences.append(_difference(quantity, pair, first.higher_is_better))
        notes = list(dict.fromkeys(score.note for score in there if score is not None and score.note))
        groups = [len({s.group or key for key, s in found.get(quantity, {}).items()}) or None for found in samples]
        values = [None if score is None else estimate(score, count) for score, count in zip(there, groups)]
        rows.append(Row(quantity, first.higher_is_better, values, differences, notes))
    return rows


def estimate(score: Score, groups: int | None = None) -> Estimate:
    """A score with its 95 % interval.

    A part of the independent examples of one task has Wilson's interval, as has one of which all or none are right, where the
    standard error says nothing. Others have the value and its standard error; perplexities by their logarithm.

    Args:
        score: a mean over examples.
        groups: of examples that are independent of each other; by default every example is.
    """
    value, error, count = score.value, score.stderr, min(groups or score.examples, score.examples)
    if error is None or count < FEWEST:
        return Estimate(value, error, None, None, score.examples)
    half = t95(count - 1) * error
    if "perplexity" in score.metric and value > 0:
        low, high = value * math.exp(-half / value), value * math.exp(half / value)
    elif _is_part(score) and score.task != "mean" and (error == 0 or count == score.examples):
        low, high = wilson(value, count)
    elif _is_part(score):
        low, high = max(0.0, value - half), min(1.0, value + half)
    else:
        low, high = value - half, value + half
    return Estimate(value, error, low, high, score.examples)


def wilson(share: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (E. B. Wilson 1927).

    Args:
        share: part of the examples.
        examples: number of them, independent of each other.
    """
    square = Z95**2 / examples
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / examples + square / (4 * examples))
    return max(0.0, middle - half), min(1.0, middle + half)


def t95(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution, to 0.1 % from 4 degrees of freedom on.

    By the expansion in 1 / degrees of Abramowitz and Stegun 26.7.5.
    """
    z, n = Z95, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def rows_to_json(names: Sequence[str], results: Sequence[EvalResult], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison as `hylo compare --json` prints it."""
    models = [{"name": name, **{k: v for k, v in r.model.items() if k != "name"}} for name, r in zip(names, results)]
    return {
        "models": models,
        "rows": [
            asdict(row.quantity)
            | {"length": row.quantity.length or None, "higher_is_better": row.higher_is_better}
            | {"scale": "log ratio" if row.quantity.is_ratio else "difference"}
            | {"values": [v and asdict(v) for v in row.values], "differences": [d and asdict(d) for d in row.differences]}
            | {"notes": row.notes}
            for row in rows
        ],
    }


def _order(quantity: Quantity) -> tuple[Any, ...]:
    return (list(SUITES).index(quantity.suite), not quantity.is_mean, quantity.task, quantity.metric, quantity.length)


def _quantity(found: Score | Sample) -> Quantity:
    return Quantity(found.suite, found.task, found.metric, found.length or 0)


def _by_quantity(result: EvalResult) -> dict[Quantity, Score]:
    """Scores by quantity: of a task with depths that over all depths, or their mean."""
    found: dict[Quantity, Score] = {}
    depths: dict[Quantity, list[Score]] = {}
    for score in result.scores:
        if score.depth is None:
            found[_quantity(score)] = score
        else:
            depths.setdefault(_quantity(score), []).append(score)
    for quantity, scores in depths.items():
        found.setdefault(quantity, mean(scores, quantity.task))
    return found


def _is_part(score: Score) -> bool:
    return score.higher_is_better and 0 <= score.value <= 1


Key = tuple[float | None, str]  # depth and name of an example


def _by_example(result: EvalResult) -> dict[Quantity, dict[Key, Sample]]:
    found: dict[Quantity, dict[Key, Sample]] = {}
    for sample in result.samples:
        examples = found.setdefault(_quantity(sample), {})
        key = (sample.depth, sample.example)
        if key in examples:
            raise ConfigError(
                f"the results of {result.model.get('name')} have two examples {sample.example!r} of {sample.suite} "
                f"{sample.task}, so it is not known which belongs to which of another model's; run `hylo eval` again"
            )
        examples[key] = sample
    return found


Found = tuple[dict[Quantity, Score], dict[Quantity, dict[Key, Sample]]]  # of one model


def _difference(quantity: Quantity, pair: Sequence[Found], higher_is_better: bool) -> Difference | None:
    """Paired difference of a quantity; of a mean, the mean of its tasks' differences where both were asked the same tasks."""
    (our_scores, ours), (their_scores, theirs) = pair
    if not quantity.is_mean:
        return _paired(quantity, ours.get(quantity, {}), theirs.get(quantity, {}), higher_is_better)
    members = _members(quantity, our_scores)
    if not members or members != _members(quantity, their_scores):
        return None
    parts = [_paired(task, ours.get(task, {}), theirs.get(task, {}), higher_is_better) for task in sorted(members)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    errors = [part.stderr for part in known]
    value = sum(part.value for part in known) / len(known)
    error = None if None in errors else math.sqrt(sum((error or 0.0) ** 2 for error in errors)) / len(known)
    counts = {name: sum(getattr(part, name) for part in known) for name in ("examples", "only_baseline", "only_model")}
    return _with_interval(value, error, counts["examples"], counts, higher_is_better)


def _members(quantity: Quantity, scores: dict[Quantity, Score]) -> set[Quantity] | None:
    """Tasks that a mean is of: those with its metric, with another one only where a task does not have it, or all.

    The first of these whose mean has the value; None where none has.
    """
    mean_score = scores.get(quantity)
    tasks = {q for q in scores if (q.suite, q.length) == (quantity.suite, quantity.length) and not q.is_mean}
    exact = {q for q in tasks if q.metric == quantity.metric}
    for chosen in (exact, exact | {q for q in tasks if q.task not in {e.task for e in exact}}, tasks):
        if mean_score and chosen:
            value = sum(scores[q].value for q in chosen) / len(chosen)
            if math.isclose(value, mean_score.value, rel_tol=1e-9, abs_tol=1e-12):
                return chosen
    return None


def _paired(
    quantity: Quantity, ours: dict[Key, Sample], theirs: dict[Key, Sample], higher_is_better: bool
) -> Difference | None:
    both = [key for key in ours if key in theirs and ours[key].expected == theirs[key].expected]
    if not both:
        return None
    pairs = [(ours[key].score, theirs[key].score) for key in both]
    if quantity.is_ratio:
        values = [math.log(theirs_) - math.log(ours_) for ours_, theirs_ in pairs]
    else:
        values = [theirs_ - ours_ for ours_, theirs_ in pairs]
    groups = [ours[key].group or theirs[key].group or f"{key}" for key in both]
    value, error = mean_by_group(values, groups)
    counts = {"examples": len(both), "only_baseline": len(ours) - len(both), "only_model": len(theirs) - len(both)}
    return _with_interval(value, error, len(set(groups)), counts, higher_is_better)


def _with_interval(
    value: float, error: float | None, groups: int, counts: dict[str, int], higher_is_better: bool
) -> Difference:
    if error is None or groups < FEWEST:
        return Difference(value, error, None, None, counts["examples"], counts["only_baseline"], counts["only_model"])
    low, high = value - t95(groups - 1) * error, value + t95(groups - 1) * error
    better = (value > 0) == higher_is_better if low > 0 or high < 0 else None
    return Difference(value, error, low, high, counts["examples"], counts["only_baseline"], counts["only_model"], better)
