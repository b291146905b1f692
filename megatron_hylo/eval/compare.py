"""Comparison of evaluations: the same quantities side by side, and differences over the same examples.

A quantity is one number of a results folder: a task at a length, or the mean of several tasks. Its difference between two
models is the mean over examples that both were asked, which leaves out how hard the examples are and so has a smaller error
than the difference of two means. Examples are the same when suite, task, metric, length, depth, name and right answer are, and
the text, of which results have a hash.

Standard errors: of a mean of examples, the sample's standard deviation / sqrt(n), with deviations summed in each group of
examples that are not independent (a text with several questions, a document with several windows); of a mean of tasks,
sqrt(sum of squares) / number of tasks, since the tasks are all there are and not drawn. Intervals hold 95 % and have Student's
t of (groups - 1) degrees of freedom, for a mean of tasks Satterthwaite's. Perplexities are compared by their logarithms, so
that their "difference" is the logarithm of a ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.intervals import FEWEST, constant_difference, degrees_of_mean, is_binary, t95, wilson
from megatron_hylo.eval.results import EvalResult, Sample, Score, Suite, mean, mean_by_group

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
        values = [
            None if score is None else estimate(score, *_freedom(quantity, found, examples))
            for score, found, examples in zip(there, scores, samples)
        ]
        rows.append(Row(quantity, first.higher_is_better, values, differences, notes))
    return rows


def estimate(score: Score, groups: int | None = None, degrees: float | None = None) -> Estimate:
    """A score with its 95 % interval.

    A part of the independent examples of one task, each of them right or wrong, has Wilson's interval, as has any part whose
    standard error is 0 and says nothing. Others have the value and its standard error; perplexities by their logarithm.

    Args:
        score: a mean over examples.
        groups: of examples that are independent of each other; by default every example is.
        degrees: of freedom of the standard error; by default one less than groups.
    """
    value, error, count = score.value, score.stderr, min(groups or score.examples, score.examples)
    if error is None or count < FEWEST or not math.isfinite(value):
        return Estimate(value, error, None, None, score.examples)
    half = t95(count - 1 if degrees is None else degrees) * error
    right_or_wrong = score.task != "mean" and count == score.examples and is_binary(value, error, count)
    if "perplexity" in score.metric and value > 0:
        low, high = value * math.exp(-half / value), value * math.exp(half / value)
    elif _is_part(score) and (error == 0 or right_or_wrong):
        low, high = wilson(value, count)
    elif _is_part(score):
        low, high = max(0.0, value - half), min(1.0, value + half)
    else:
        low, high = value - half, value + half
    return Estimate(value, error, low, high, score.examples)


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


def _freedom(
    quantity: Quantity, scores: dict[Quantity, Score], samples: dict[Quantity, dict[Key, Sample]]
) -> tuple[int | None, float | None]:
    """Independent examples and degrees of freedom of a score, as `estimate` takes them; None where they are not known."""
    if not quantity.is_mean:
        return len({sample.group or key for key, sample in samples.get(quantity, {}).items()}) or None, None
    tasks = sorted(_members(quantity, scores) or ())
    counts = [_freedom(task, scores, samples)[0] or scores[task].examples for task in tasks]
    errors = [error for task in tasks if (error := scores[task].stderr) is not None]
    if not tasks or len(errors) < len(tasks) or min(counts) < 2:
        return None, None
    return len(counts) * min(counts), degrees_of_mean(errors, counts)


def _difference(quantity: Quantity, pair: Sequence[Found], higher_is_better: bool) -> Difference | None:
    """Paired difference of a quantity; of a mean, the mean of its tasks' differences where both were asked the same tasks."""
    (our_scores, ours), (their_scores, theirs) = pair
    if not quantity.is_mean:
        paired = _paired(quantity, ours.get(quantity, {}), theirs.get(quantity, {}))
        return None if paired is None else _with_interval(paired, higher_is_better)
    members = _members(quantity, our_scores)
    if not members or members != _members(quantity, their_scores):
        return None
    parts = [_paired(task, ours.get(task, {}), theirs.get(task, {})) for task in sorted(members)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return _with_interval(_mean_of_pairs(known), higher_is_better)


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


@dataclass(frozen=True)
class _Pairs:
    """Mean difference over pairs of examples, as of `Difference`; its error has `degrees` of freedom of `groups` of pairs."""

    value: float
    stderr: float | None
    groups: int
    degrees: float
    are_shares: bool  # all scores are from 0 to 1
    examples: int
    only_baseline: int
    only_model: int


def _paired(quantity: Quantity, ours: dict[Key, Sample], theirs: dict[Key, Sample]) -> _Pairs | None:
    both = [key for key in ours if key in theirs and _is_same(ours[key], theirs[key])]
    if not both:
        return None
    pairs = [(ours[key].score, theirs[key].score) for key in both]
    if quantity.is_ratio:
        values = [math.log(theirs_) - math.log(ours_) for ours_, theirs_ in pairs]
    else:
        values = [theirs_ - ours_ for ours_, theirs_ in pairs]
    names = [ours[key].group or theirs[key].group or f"{key}" for key in both]
    value, error = mean_by_group(values, names)
    groups = len(set(names))
    shares = not quantity.is_ratio and all(0 <= score <= 1 for pair in pairs for score in pair)
    return _Pairs(value, error, groups, groups - 1, shares, len(both), len(ours) - len(both), len(theirs) - len(both))


def _is_same(ours: Sample, theirs: Sample) -> bool:
    """Whether two examples of one name ask the same; of results without hashes what was read is not known."""
    known = ours.read_sha256 and theirs.read_sha256
    return ours.expected == theirs.expected and (not known or ours.read_sha256 == theirs.read_sha256)


def _mean_of_pairs(parts: Sequence[_Pairs]) -> _Pairs:
    """The mean of tasks' differences, which are independent of each other."""
    errors, counts = [part.stderr for part in parts if part.stderr is not None], [part.groups for part in parts]
    error = math.sqrt(sum(error**2 for error in errors)) / len(parts) if len(errors) == len(parts) else None
    return _Pairs(
        sum(part.value for part in parts) / len(parts),
        error,
        len(counts) * min(counts),
        0.0 if error is None else degrees_of_mean(errors, counts),
        all(part.are_shares for part in parts),
        *(sum(getattr(part, name) for part in parts) for name in ("examples", "only_baseline", "only_model")),
    )


def _with_interval(pairs: _Pairs, higher_is_better: bool) -> Difference:
    value, error = pairs.value, pairs.stderr
    counts = (pairs.examples, pairs.only_baseline, pairs.only_model)
    if error is None or pairs.groups < FEWEST or not math.isfinite(value):
        return Difference(value, error, None, None, *counts)
    half = t95(pairs.degrees) * error
    low, high = (value - half, value + half) if error or not pairs.are_shares else constant_difference(value, pairs.groups)
    better = (value > 0) == higher_is_better if low > 0 or high < 0 else None
    return Difference(value, error, low, high, *counts, better)
