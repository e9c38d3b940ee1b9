"""Weighted metrics for many resamples at once: scores are sorted once, each resample is a row of weights.

AUROC is the area under the ROC curve by trapezoids (ties count half), average precision the step-wise sum
over distinct scores: the definitions of scikit-learn. Kappa is Cohen's with squared distances between grades.
Rates of one grade against all others are those of EyeCLIP's and FLAIR's published evaluations.

Legend: R resamples, N items, T distinct scores, K grades.
"""

from __future__ import annotations

import numpy as np

from fundusfm.evaluation.arrays import Flags, Floats, Integers


class Ranking:
    """Items of one label in falling order of score, with ties grouped."""

    def __init__(self, score_N: Floats, positive_N: Flags) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        sorted_N = score_N[self._order_N]
        self._last_T = np.append(np.flatnonzero(sorted_N[1:] != sorted_N[:-1]), len(sorted_N) - 1)
        self._positive_N = positive_N[self._order_N].astype(np.float64)

    def areas(self, weight_RN: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision of each row of weights (R,), nan where a class has no weight."""
        above_RT, true_RT = self._cumulative(weight_RN)
        false_RT = above_RT - true_RT
        positives_R, negatives_R = true_RT[:, -1], false_RT[:, -1]
        gained_RT = np.diff(true_RT, axis=1, prepend=0.0)
        # Of the items at one score, each negative is passed by all earlier positives and half the new ones.
        trapezoid_RT = np.diff(false_RT, axis=1, prepend=0.0) * (true_RT - 0.5 * gained_RT)
        precision_RT = np.divide(true_RT, above_RT, out=np.zeros_like(true_RT), where=above_RT > 0)
        both_R = (positives_R > 0) & (negatives_R > 0)
        pairs_R = np.where(both_R, positives_R * negatives_R, np.nan)
        auroc_R = trapezoid_RT.sum(axis=1) / pairs_R
        precision_R = (gained_RT * precision_RT).sum(axis=1) / np.where(both_R, positives_R, np.nan)
        return auroc_R, precision_R

    def curve(self) -> tuple[Floats, Floats]:
        """The ROC curve: false and true positive rates from (0, 0) to (1, 1); both classes must exist."""
        above_1T, true_1T = self._cumulative(np.ones((1, len(self._order_N))))
        true_T, false_T = np.append(0.0, true_1T[0]), np.append(0.0, above_1T[0] - true_1T[0])
        return false_T / false_T[-1], true_T / true_T[-1]

    def _cumulative(self, weight_RN: Floats) -> tuple[Floats, Floats]:
        """Weight of all and of positive items at or above each distinct score (R, T)."""
        sorted_RN = weight_RN[:, self._order_N]
        true_RT = np.cumsum(sorted_RN * self._positive_N, axis=1)[:, self._last_T]
        return np.cumsum(sorted_RN, axis=1)[:, self._last_T], true_RT


def auroc(score_N: Floats, positive_N: Flags) -> float:
    """Plain AUROC, nan with one class."""
    return float(Ranking(score_N, positive_N).areas(np.ones((1, len(score_N))))[0][0])


def confusions(true_N: Integers, predicted_N: Integers, num_grades: int, weight_RN: Floats) -> Floats:
    """Confusion matrix of each row of weights (R, K, K): true grade down, predicted grade across."""
    cell_NC = np.eye(num_grades**2)[true_N * num_grades + predicted_N]
    counts: Floats = (weight_RN @ cell_NC).reshape(-1, num_grades, num_grades)
    return counts


def quadratic_kappa(confusion_RKK: Floats) -> Floats:
    """Quadratically weighted kappa (R,); nan where chance agreement is complete."""
    grades = np.arange(confusion_RKK.shape[-1])
    distance_KK = (grades[:, None] - grades[None, :]) ** 2.0
    row_RK, column_RK = confusion_RKK.sum(axis=2), confusion_RKK.sum(axis=1)
    total_R = row_RK.sum(axis=1)
    observed_R = (confusion_RKK * distance_KK).sum(axis=(1, 2)) * total_R
    expected_R = np.einsum("rk,kj,rj->r", row_RK, distance_KK, column_RK)
    kappa_R: Floats = 1 - observed_R / np.where(expected_R > 0, expected_R, np.nan)
    return kappa_R


def one_against_rest(confusion_RKK: Floats) -> dict[str, Floats]:
    """Rates of each grade against all others by name (R, K); nan where a rate has nothing to count.

    The mean of `sensitivity` over grades is balanced accuracy. `binary_accuracy` counts the rest that is read
    as any of the rest as right: with many grades it is high for anyone, and EyeCLIP reports its mean.
    """
    total_R1 = confusion_RKK.sum(axis=(1, 2))[:, None]
    hit_RK = np.diagonal(confusion_RKK, axis1=1, axis2=2)
    missed_RK, alarm_RK = confusion_RKK.sum(axis=2) - hit_RK, confusion_RKK.sum(axis=1) - hit_RK
    passed_RK = total_R1 - hit_RK - missed_RK - alarm_RK
    sensitivity_RK = _ratio(hit_RK, hit_RK + missed_RK)
    specificity_RK = _ratio(passed_RK, passed_RK + alarm_RK)
    margins_RK = (hit_RK + alarm_RK) * (hit_RK + missed_RK) * (passed_RK + alarm_RK) * (passed_RK + missed_RK)
    return {
        "sensitivity": sensitivity_RK,
        "specificity": specificity_RK,
        "precision": _ratio(hit_RK, hit_RK + alarm_RK),
        "f1": _ratio(2 * hit_RK, 2 * hit_RK + missed_RK + alarm_RK),
        "mcc": _ratio(hit_RK * passed_RK - missed_RK * alarm_RK, np.sqrt(margins_RK)),
        "geometric_mean": np.sqrt(sensitivity_RK * specificity_RK),
        "binary_accuracy": _ratio(hit_RK + passed_RK, total_R1 + 0 * hit_RK),
    }


def rates(confusion_RKK: Floats) -> dict[str, Floats]:
    """`accuracy` over all items, and the means over grades of `one_against_rest`, by name (R,).

    A grade for which a rate has nothing to count is left out of its mean.
    """
    right_R, total_R = np.trace(confusion_RKK, axis1=1, axis2=2), confusion_RKK.sum(axis=(1, 2))
    means = {"accuracy": _ratio(right_R, total_R)}
    for name, rate_RK in one_against_rest(confusion_RKK).items():
        counted_RK = ~np.isnan(rate_RK)
        means[name] = _ratio(np.nansum(rate_RK, axis=1), counted_RK.sum(axis=1))
    return means


def _ratio(part: Floats, whole: Floats) -> Floats:
    ratio: Floats = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
    return ratio
