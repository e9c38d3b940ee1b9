"""Resamples move patients as a whole, repeat exactly, and give intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fundusfm.evaluation import bootstrap
from fundusfm.evaluation.bootstrap import Resamples, interval

PATIENTS = ["b", "a", "b", "c", "a", "b"]


def _all_weights(resamples: Resamples) -> np.ndarray:
    return np.concatenate(list(resamples.chunks()))


def test_resamples__patients_move_together() -> None:
    weight_RN = _all_weights(Resamples(PATIENTS, 50, seed=1))
    assert weight_RN.shape == (50, 6)
    for patient in set(PATIENTS):
        columns = [n for n, name in enumerate(PATIENTS) if name == patient]
        assert (weight_RN[:, columns] == weight_RN[:, columns[:1]]).all()
    # Three patients are drawn in every resample, each counted once by the first of its images.
    assert (weight_RN[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert len(np.unique(weight_RN, axis=0)) > 5


def test_resamples__same_for_any_chunk_and_item_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _all_weights(Resamples(PATIENTS, 40, seed=7))
    monkeypatch.setattr(bootstrap, "_CHUNK_BYTES", 8 * 6 * 7)
    resamples = Resamples(PATIENTS, 40, seed=7)
    assert max(len(chunk) for chunk in resamples.chunks()) == 7
    np.testing.assert_array_equal(_all_weights(resamples), whole)
    np.testing.assert_array_equal(_all_weights(Resamples(PATIENTS[::-1], 40, seed=7)), whole[:, ::-1])
    assert (_all_weights(Resamples(PATIENTS, 40, seed=8)) != whole).any()


def test_estimate__interval_of_a_mean_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    value_N = rng.normal(2.0, 1.0, 400)
    resamples = Resamples([str(n) for n in range(400)], 4000, seed=0)
    estimate = resamples.estimate(lambda weight_RN: weight_RN @ value_N / weight_RN.sum(axis=1))
    half = 1.96 * value_N.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(value_N.mean())
    assert estimate.low == pytest.approx(value_N.mean() - half, abs=0.012)
    assert estimate.high == pytest.approx(value_N.mean() + half, abs=0.012)


def test_estimate__grows_when_images_of_a_patient_agree() -> None:
    value_P = np.random.default_rng(1).normal(size=60)
    value_N, metric_of = np.repeat(value_P, 10), lambda v: lambda w: w @ v / w.sum(axis=1)
    by_patient = Resamples([str(n // 10) for n in range(600)], 2000, 0).estimate(metric_of(value_N))
    by_image = Resamples([str(n) for n in range(600)], 2000, 0).estimate(metric_of(value_N))
    assert by_patient.high - by_patient.low > 2.5 * (by_image.high - by_image.low)


def test_interval__ignores_undefined_draws_and_says_when_there_is_nothing() -> None:
    assert interval(0.5, np.array([np.nan, 0.4, 0.6])).low == pytest.approx(0.405)
    assert not interval(0.5, np.array([np.nan])).defined
    assert not interval(math.nan, np.array([0.5])).defined
