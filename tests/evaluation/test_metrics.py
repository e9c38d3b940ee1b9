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
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_cohen_kappa,
)

from fundusfm.evaluation.metrics import (
    Ranking,
    auroc,
    confusions,
    one_against_rest,
    quadratic_kappa,
    rates,
)
from tests.goldens import load

_EYECLIP_NAMES = {
    **{name: name for name in ("sensitivity", "specificity", "precision", "mcc")},
    "F1": "f1",
    "G": "geometric_mean",
    "acc": "binary_accuracy",
}
_SKLEARN_RATES = {"sensitivity": recall_score, "precision": precision_score, "f1": f1_score}


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
    """Areas of each class against the rest and their means, and all rates of the confusion matrix.

    Zero-shot there leaves the first class out of every mean, which is not done here.
    """
    arrays, description = load("eyeclip/eval_metrics")
    logits_NK, label_N = arrays[f"{case}_logits"].astype(np.float64), arrays[f"{case}_labels"]
    score_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    weight_1N = np.ones((1, len(label_N)))
    areas = [Ranking(score_NK[:, k], label_N == k).areas(weight_1N) for k in range(score_NK.shape[1])]
    wanted = description["metrics"][case]
    assert np.mean([float(one[0][0]) for one in areas]) == pytest.approx(wanted["auc_roc"], abs=1e-6)
    assert np.mean([float(one[1][0]) for one in areas]) == pytest.approx(wanted["auc_pr"], abs=1e-6)
    confusion_1KK = confusions(label_N, score_NK.argmax(1), score_NK.shape[1], weight_1N)
    means, by_class = rates(confusion_1KK), one_against_rest(confusion_1KK)
    assert means["accuracy"][0] == pytest.approx(wanted["acc1_percent"] / 100, abs=1e-6)
    assert by_class["f1"][0].tolist() == pytest.approx(wanted["per_class_F1"], abs=1e-12)
    for theirs, ours in _EYECLIP_NAMES.items():
        assert means[ours][0] == pytest.approx(wanted[theirs], abs=1e-12), theirs
        assert by_class[ours][0, 1:].mean() == pytest.approx(wanted[f"zeroshot_{theirs}"], abs=1e-12), theirs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_items=st.integers(1, 40), num_grades=st.integers(2, 5))
def test_rates__equal_scikit_learn(seed: int, num_items: int, num_grades: int) -> None:
    rng = np.random.default_rng(seed)
    true_N, predicted_N = rng.integers(0, num_grades, (2, num_items))
    weight_RN = np.append(np.ones((1, num_items)), rng.integers(0, 3, (2, num_items)), axis=0)
    weight_RN = weight_RN[weight_RN.any(axis=1)]
    found = one_against_rest(confusions(true_N, predicted_N, num_grades, weight_RN))
    for row, weight_N in enumerate(weight_RN):
        for grade in range(num_grades):
            given = {"y_true": true_N == grade, "y_pred": predicted_N == grade, "sample_weight": weight_N}
            for name, score in _SKLEARN_RATES.items():
                expected = score(**given, zero_division=np.nan)
                assert found[name][row, grade] == pytest.approx(expected, nan_ok=True), name


def test_rates__a_grade_with_nothing_to_count_is_left_out_of_the_mean() -> None:
    means = rates(np.array([[[3.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]], np.zeros((3, 3))]))
    assert means["sensitivity"][0] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert means["accuracy"][0] == pytest.approx(5 / 8)
    assert all(math.isnan(value_R[1]) for value_R in means.values())
