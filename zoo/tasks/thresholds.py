"""Scores of a whole set from counts: a detector's F1 or ROC curve is no mean over examples, its histogram is a sum.

A histogram counts examples by their score's bin, the lowest scores first; an alarm at threshold b is a score in bin b
or above. All functions take NumPy arrays.
"""

import math

import numpy as np

__all__ = ["auprc", "auroc", "confusion", "holm_bonferroni", "mcnemar", "scores"]


def auroc(negative: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > that of a negative) + half of P(equal bin); NaN if either kind is missing."""
    if not negative.sum() or not positive.sum():
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + 0.5 * negative)).sum() / (negative.sum() * positive.sum()))


def auprc(negative: np.ndarray, positive: np.ndarray) -> float:
    """Area under the precision-recall curve by trapezes, from precision 1 at recall 0; NaN without positives."""
    if not positive.sum():
        return float("nan")
    true, false = (np.cumsum(counts[::-1]) for counts in (positive, negative))
    alarms = true + false
    true, alarms = true[alarms > 0], alarms[alarms > 0]
    precision, recall = true / alarms, true / positive.sum()
    return float(np.trapezoid(np.r_[1.0, precision], np.r_[0.0, recall]))


def confusion(negative: np.ndarray, positive: np.ndarray, threshold: int) -> tuple[float, float, float, float]:
    """(true alarms, false alarms, missed, rightly silent) at that bin."""
    true, false = positive[threshold:].sum(), negative[threshold:].sum()
    return true, false, positive.sum() - true, negative.sum() - false


def scores(true: float, false: float, missed: float, silent: float) -> dict[str, float]:
    """Precision, sensitivity, F1 and accuracy of such counts; 0 where nothing is there to divide by."""
    ratio = lambda a, b: float(a / b) if b else 0.0  # noqa: E731
    return {
        "f1": ratio(2 * true, 2 * true + false + missed),
        "precision": ratio(true, true + false),
        "sensitivity": ratio(true, true + missed),
        "accuracy": ratio(true + silent, true + false + missed + silent),
    }


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> float:
    """p-value that two detectors err equally often, from the examples on which exactly one of them is right.

    The binomial test where these are fewer than 25, otherwise chi-squared with one degree of freedom and correction
    for continuity. Source: McNemar, doi:10.1007/BF02295996.
    """
    first = int(np.sum(first_right & ~second_right))
    second = int(np.sum(second_right & ~first_right))
    total = first + second
    if total == 0:
        return 1.0
    if total < 25:
        tail = sum(math.comb(total, i) for i in range(min(first, second) + 1)) / 2**total
        return min(1.0, 2 * tail)
    return math.erfc(math.sqrt((max(abs(first - second) - 1, 0)) ** 2 / total / 2))


def holm_bonferroni(p_values: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, step by step from the smallest. Source: Holm 1979, jstor:4615733."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    result = np.empty_like(corrected)
    result[order] = corrected
    return result
