"""k-NN against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from fundusfm.evaluation import neighbours
from fundusfm.evaluation.neighbours import neighbour_scores


def _data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    train_MF = rng.normal(size=(80, 6)).astype(np.float32)
    return train_MF, rng.random((80, 3)) < 0.4, rng.normal(size=(30, 6)).astype(np.float32)


def test_neighbour_scores__equals_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    train_MF, target_ML, feature_NF = _data()
    monkeypatch.setattr(neighbours, "_CHUNK_CELLS", 80 * 7)
    score_NL = neighbour_scores(train_MF, target_ML, feature_NF, 9)
    for column in range(3):
        reference = KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        expected = reference.fit(train_MF, target_ML[:, column]).predict_proba(feature_NF)[:, 1]
        np.testing.assert_allclose(score_NL[:, column], expected, atol=1e-4)


def test_neighbour_scores__fewer_images_than_neighbours_and_empty_rows() -> None:
    train_MF, target_ML, feature_NF = _data()
    score_NL = neighbour_scores(train_MF[:4], target_ML[:4], feature_NF * 0, 20)
    np.testing.assert_allclose(score_NL, np.broadcast_to(target_ML[:4].mean(axis=0), (30, 3)))
