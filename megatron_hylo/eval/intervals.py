"""Intervals that hold 95 %: Student's t for means, Wilson's for parts of examples.

Written out because `hylo compare` starts without scipy, which is installed with lm-eval alone; tests compare with it.
"""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
FEWEST = 5  # independent examples without which an interval would say nothing
_FEW_DEGREES = (12.7062, 4.3027, 3.1824)  # Student's quantiles of 1, 2 and 3 degrees of freedom


def t95(degrees: float) -> float:
    """97.5 % quantile of Student's t distribution, to 0.1 %; of fewer than 4 degrees of freedom, rounded down to 1, 2 or 3.

    From 4 on by the expansion in 1 / degrees of Abramowitz and Stegun 26.7.5.

    Args:
        degrees: of freedom, at least 1.
    """
    if degrees < 4:
        return _FEW_DEGREES[max(1, int(degrees)) - 1]
    z, n = Z95, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))


def degrees_of_mean(errors: Sequence[float], groups: Sequence[int]) -> float:
    """Degrees of freedom of the standard error of a mean of tasks (F. E. Satterthwaite 1946).

    A task of which few texts were read says little about its own error, however many examples the other tasks have.

    Args:
        errors: standard error of each task's mean.
        groups: independent examples of each task, at least 2.
    """
    squares = [error**2 for error in errors]
    if not sum(squares):
        return min(groups) - 1
    return sum(squares) ** 2 / sum(square**2 / (count - 1) for square, count in zip(squares, groups, strict=True))


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


def is_binary(value: float, error: float, examples: int) -> bool:
    """Whether a standard error is that of examples that are right or wrong, without any that are right in part."""
    return examples > 1 and math.isclose(error**2, value * (1 - value) / (examples - 1), rel_tol=1e-6, abs_tol=1e-15)


def constant_difference(value: float, pairs: int) -> tuple[float, float]:
    """95 % interval of a mean difference of two shares whose pairs all have the same difference.

    Their standard error is 0 and says nothing. As many pairs may differ as Wilson's interval of none in so many allows, and
    each of those by as much as shares can.

    Args:
        value: the difference, from -1 to 1.
        pairs: number of them, independent of each other.
    """
    unseen = wilson(0.0, pairs)[1]
    return value - unseen * (1 + value), value + unseen * (1 - value)
