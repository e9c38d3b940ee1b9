"""Metrics against FLAIR's published code, which rounds the numbers of each class before it averages."""

from __future__ import annotations

import numpy as np

from fundusfm.evaluation.metrics import auroc, confusions, one_against_rest, quadratic_kappa, rates
from tests.goldens import load


def test_metrics__of_three_classes() -> None:
    arrays, _ = load("flair/metrics_3class")
    true_N, probability_NK = arrays["refs"], arrays["probs"]
    confusion_1KK = confusions(true_N, probability_NK.argmax(axis=1), 3, np.ones((1, len(true_N))))
    confusion_KK = confusion_1KK[0]
    np.testing.assert_array_equal(confusion_KK, arrays["cm"])
    np.testing.assert_allclose(round(float(quadratic_kappa(confusion_1KK)[0]), 3), arrays["kappa"])
    areas_K = [round(auroc(probability_NK[:, k], true_N == k), 3) for k in range(3)]
    np.testing.assert_allclose(areas_K, arrays["auc_class"])
    np.testing.assert_allclose(np.mean(areas_K), arrays["auc_avg"])
    by_class = {name: value_1K[0] for name, value_1K in one_against_rest(confusion_1KK).items()}
    for name in ("sensitivity", "specificity", "f1"):
        rounded_K = np.round(by_class[name], 3)
        np.testing.assert_allclose(rounded_K, arrays[f"{name}_class"], err_msg=name)
        np.testing.assert_allclose(rounded_K.mean(), arrays[f"{name}_avg"], err_msg=name)
    np.testing.assert_allclose(np.round(by_class["sensitivity"], 3), arrays["acc_class"])
    np.testing.assert_allclose(round(float(rates(confusion_1KK)["sensitivity"][0]), 3), arrays["aca"])
