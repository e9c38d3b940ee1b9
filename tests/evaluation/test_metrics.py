"""Weighted metrics against scikit-learn and torchmetrics, on data full of ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    cohen_kappa_score,
    confusion_matrix,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_cohen_kappa,
)

from fundusfm.evaluation.metrics import Ranking, auroc, confusions, quadratic_kappa
from tests.goldens import load


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_items=st.integers(2, 60), num_values=st.integers(1, 12))
def test_areas__equal_scikit_learn_with_weights_and_ties(seed: int, num_items: int, num_values: int) -> None:
    rng = np.random.default_rng(seed)
    score_N = rng.integers(0, num_values, num_items) / 7
    positive_N = rng.random(num_items) < rng.random()
    weight_RN = rng.integers(0, 4, (5, num_items)).astype(np.float64)
    auroc_R, precision_R = Ranking(score_N, positive_N).areas(weight_RN)
    for row, weight_N in enumerate(weight_RN):
        if not weight_N[positive_N].sum() or not weight_N[~positive_N].sum():
            assert math.isnan(auroc_R[row])
            assert math.isnan(precision_R[row])
            continue
        assert auroc_R[row] == pytest.approx(roc_auc_score(positive_N, score_N, sample_weight=weight_N))
        expected = average_precision_score(positive_N, score_N, sample_weight=weight_N)
        assert precision_R[row] == pytest.approx(expected)


def test_areas__equal_torchmetrics() -> None:
    rng = np.random.default_rng(3)
    score_N = rng.integers(0, 40, 500) / 40
    positive_N = rng.random(500) < 0.2
    auroc_1, precision_1 = Ranking(score_N, positive_N).areas(np.ones((1, 500)))
    scores, targets = torch.from_numpy(score_N), torch.from_numpy(positive_N).long()
    assert auroc_1[0] == pytest.approx(float(binary_auroc(scores, targets)), abs=1e-6)
    assert precision_1[0] == pytest.approx(float(binary_average_precision(scores, targets)), abs=1e-6)


def test_curve__equals_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    score_N, positive_N = rng.integers(0, 9, 80) / 9, rng.random(80) < 0.4
    false_T, true_T = Ranking(score_N, positive_N).curve()
    expected_false, expected_true, _ = roc_curve(positive_N, score_N, drop_intermediate=False)
    np.testing.assert_allclose(false_T, expected_false)
    np.testing.assert_allclose(true_T, expected_true)


def test_auroc__one_class_is_undefined() -> None:
    assert math.isnan(auroc(np.arange(4.0), np.ones(4, dtype=bool)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_items=st.integers(2, 60), num_grades=st.integers(2, 5))
def test_quadratic_kappa__equals_scikit_learn(seed: int, num_items: int, num_grades: int) -> None:
    rng = np.random.default_rng(seed)
    true_N, predicted_N = rng.integers(0, num_grades, (2, num_items))
    weight_RN = rng.integers(0, 4, (4, num_items)).astype(np.float64)
    confusion_RKK = confusions(true_N, predicted_N, num_grades, weight_RN)
    kappa_R = quadratic_kappa(confusion_RKK)
    grades = list(range(num_grades))
    for row, weight_N in enumerate(weight_RN):
        if not weight_N.sum():
            assert math.isnan(kappa_R[row])
            continue
        matrix = confusion_matrix(true_N, predicted_N, labels=grades, sample_weight=weight_N)
        np.testing.assert_allclose(confusion_RKK[row], matrix)
        kinds = set(true_N[weight_N > 0]) | set(predicted_N[weight_N > 0])
        if len(kinds) < 2:
            assert math.isnan(kappa_R[row])
            continue
        options = {"weights": "quadratic", "labels": grades, "sample_weight": weight_N}
        expected = cohen_kappa_score(true_N, predicted_N, **options)
        assert kappa_R[row] == pytest.approx(expected)


def test_quadratic_kappa__equals_torchmetrics() -> None:
    rng = np.random.default_rng(9)
    true_N = rng.integers(0, 4, 300)
    predicted_N = np.clip(true_N + rng.integers(-1, 2, 300), 0, 3)
    kappa_1 = quadratic_kappa(confusions(true_N, predicted_N, 4, np.ones((1, 300))))
    predicted, true = torch.from_numpy(predicted_N), torch.from_numpy(true_N)
    expected = multiclass_cohen_kappa(predicted, true, 4, weights="quadratic")
    assert kappa_1[0] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden__areas_of_eyeclip(case: str) -> None:
    """Of the published measures those that we have too: areas of each class against the rest, their mean."""
    arrays, description = load("eyeclip/eval_metrics")
    logits_NK, label_N = arrays[f"{case}_logits"].astype(np.float64), arrays[f"{case}_labels"]
    score_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    weight_1N = np.ones((1, len(label_N)))
    areas = [Ranking(score_NK[:, k], label_N == k).areas(weight_1N) for k in range(score_NK.shape[1])]
    wanted = description["metrics"][case]
    assert np.mean([float(one[0][0]) for one in areas]) == pytest.approx(wanted["auc_roc"], abs=1e-6)
    assert np.mean([float(one[1][0]) for one in areas]) == pytest.approx(wanted["auc_pr"], abs=1e-6)
    counts = confusions(label_N, score_NK.argmax(1), score_NK.shape[1], weight_1N)[0]
    assert np.trace(counts) / len(label_N) == pytest.approx(wanted["acc1_percent"] / 100, abs=1e-6)
