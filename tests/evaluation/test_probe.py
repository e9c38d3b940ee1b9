"""Probes: choose on the right images, survive missing classes, repeat exactly."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fundusfm.evaluation import probe
from fundusfm.evaluation.probe import STRENGTHS, hold_out, probe_grades, probe_labels


def _data(seed: int, num_images: int, num_features: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    feature_NF = rng.normal(size=(num_images, num_features)).astype(np.float32)
    target_NL = feature_NF[:, :3] + rng.normal(0, 1, (num_images, 3)) > 0.5
    return feature_NF * np.logspace(-3, 3, num_features, dtype=np.float32) + 5, target_NL


def test_probe_labels__equals_plain_scikit_learn_at_the_chosen_strength() -> None:
    train, select, (reported_NF, target_NL) = _data(0, 300), _data(1, 100), _data(2, 200)
    found = probe_labels(train, select, reported_NF, np.ones(3, dtype=bool))
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    for column in range(3):
        plain = LogisticRegression(C=found.strength, max_iter=5000)
        plain.fit((train[0] - mean) / std, train[1][:, column])
        expected = plain.decision_function((reported_NF - mean) / std)
        np.testing.assert_allclose(found.output[:, column], expected, atol=0.02)
        assert roc_auc_score(target_NL[:, column], found.output[:, column]) > 0.75
    again = probe_labels(train, select, reported_NF, np.ones(3, dtype=bool))
    np.testing.assert_array_equal(again.output, found.output)


def test_probe_labels__strength_depends_on_the_selection_images_alone() -> None:
    train, select, other = _data(0, 60), _data(1, 60), _data(2, 60)
    macro_L = np.ones(3, dtype=bool)
    strengths = {
        probe_labels(train, select, feature_NF, macro_L).strength
        for feature_NF in (other[0], other[0][:3] * 0)
    }
    assert len(strengths) == 1
    turned = (select[0], ~select[1])
    assert probe_labels(train, turned, other[0], macro_L).strength not in strengths


def test_probe_labels__one_class_in_training_gives_no_score() -> None:
    train, select = _data(0, 60), _data(1, 60)
    train[1][:, 1] = True
    output = probe_labels(train, select, select[0], np.ones(3, dtype=bool)).output
    assert np.isnan(output[:, 1]).all()
    assert not np.isnan(output[:, [0, 2]]).any()


def test_probe_labels__nothing_to_choose_by_takes_the_middle_of_the_grid() -> None:
    train, select = _data(0, 60), _data(1, 60)
    found = probe_labels(train, (select[0], np.zeros_like(select[1])), select[0], np.ones(3, dtype=bool))
    assert found.strength == STRENGTHS[len(STRENGTHS) // 2]


def test_probe_grades__finds_an_ordered_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    feature_NF = rng.normal(size=(600, 8)).astype(np.float32)
    grade_N = np.digitize(feature_NF[:, 0] + rng.normal(0, 0.2, 600), [-0.7, 0.0, 0.7])
    parts = [(feature_NF[a:b], grade_N[a:b]) for a, b in ((0, 300), (300, 400), (400, 600))]
    found = probe_grades(parts[0], parts[1], parts[2][0], 4)
    assert (found.output == parts[2][1]).mean() > 0.7
    monkeypatch.setattr(probe, "STRENGTHS", (found.strength,))
    turned = probe_grades((parts[0][0], 3 - parts[0][1]), parts[1], parts[2][0], 4)
    assert (3 - turned.output == found.output).mean() > 0.95


def test_hold_out__keeps_patients_whole() -> None:
    patients = [f"p{n // 3}" for n in range(120)]
    held_out_N = hold_out(patients, seed=0)
    assert held_out_N.sum() == 30
    out = {p for p, held in zip(patients, held_out_N, strict=True) if held}
    assert not out & {p for p, held in zip(patients, held_out_N, strict=True) if not held}
    assert (hold_out(patients, seed=0) == held_out_N).all()
    assert (hold_out(patients, seed=1) != held_out_N).any()
