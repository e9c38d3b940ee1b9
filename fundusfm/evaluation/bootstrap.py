"""Intervals by the bootstrap over patients: all images of a patient are drawn together, or not at all.

Legend: R resamples, N items (images or exams), P patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fundusfm.evaluation.arrays import Floats

_CHUNK_BYTES = 32 * 2**20
_TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; all three are nan where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def defined(self) -> bool:
        return not math.isnan(self.value)


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


class Resamples:
    """How often each item counts in each resample: patients are drawn with replacement, their items follow.

    The same patients, number and seed give the same resamples, whatever the order of the items or the memory,
    so two methods measured on the same items are compared pair by pair.
    """

    def __init__(self, patients: Sequence[str], num_resamples: int, seed: int) -> None:
        names_P, self._patient_N = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
        self.num_patients, self.num_items = len(names_P), len(patients)
        self.num_resamples, self._seed = num_resamples, seed

    def chunks(self) -> Iterator[Floats]:
        """weights_RN of a few resamples at a time, whole numbers as floats."""
        rng = np.random.default_rng(self._seed)
        even_P = np.full(self.num_patients, 1 / self.num_patients)
        step = max(1, _CHUNK_BYTES // (8 * max(1, self.num_items)))
        for start in range(0, self.num_resamples, step):
            count_RP = rng.multinomial(self.num_patients, even_P, size=min(step, self.num_resamples - start))
            yield count_RP[:, self._patient_N].astype(np.float64)

    def draws(self, metric: Callable[[Floats], Floats]) -> Floats:
        """`metric` (weights_RN -> values with R first) over all resamples."""
        return np.concatenate([metric(weights_RN) for weights_RN in self.chunks()])

    def estimate(self, metric: Callable[[Floats], Floats]) -> Estimate:
        """Value and interval of a metric of weights_RN -> values_R."""
        return interval(float(metric(np.ones((1, self.num_items)))[0]), self.draws(metric))


def interval(value: float, draws_R: Floats) -> Estimate:
    """The percentile interval around a value; resamples that lost a class (nan) are left out."""
    defined = draws_R[~np.isnan(draws_R)]
    if math.isnan(value) or not len(defined):
        return UNDEFINED
    low, high = np.percentile(defined, _TAILS)
    return Estimate(value, float(low), float(high))
