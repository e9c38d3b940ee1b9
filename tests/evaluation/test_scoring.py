"""Labels, means, sources and paired differences."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from fundusfm.evaluation.scoring import Question, difference, measure, measure_sources


def _question(seed: int = 0, num_images: int = 300, num_labels: int = 4) -> tuple[np.ndarray, Question]:
    rng = np.random.default_rng(seed)
    target_NL = rng.random((num_images, num_labels)) < 0.3
    score_NL = target_NL + rng.normal(0, 1.0, target_NL.shape)
    patients = tuple(f"p{n // 2}" for n in range(num_images))
    labels = tuple(f"label{n}" for n in range(num_labels))
    return score_NL, Question(labels, target_NL, patients, np.ones(num_labels, dtype=bool))


def test_measure__equals_scikit_learn_on_the_whole_set() -> None:
    score_NL, question = _question()
    scores = measure(score_NL, question, num_resamples=200, seed=0)
    expected = [roc_auc_score(question.target_NL[:, n], score_NL[:, n]) for n in range(4)]
    precision = [average_precision_score(question.target_NL[:, n], score_NL[:, n]) for n in range(4)]
    assert [s.auroc.value for s in scores.labels] == pytest.approx(expected)
    assert scores.macro_auroc.value == pytest.approx(np.mean(expected))
    assert scores.macro_average_precision.value == pytest.approx(np.mean(precision))
    assert scores.macro_auroc.low < scores.macro_auroc.value < scores.macro_auroc.high
    widest = max(s.auroc.high - s.auroc.low for s in scores.labels)
    assert scores.macro_auroc.high - scores.macro_auroc.low < widest
    assert (scores.num_images, scores.num_patients) == (300, 150)


def test_measure__missing_class_and_missing_score_leave_the_mean() -> None:
    score_NL, question = _question()
    question.target_NL[:, 1] = False
    score_NL[:, 2] = np.nan
    scores = measure(score_NL, question, num_resamples=50, seed=0)
    assert scores.macro_labels == ("label0", "label3")
    assert not scores.labels[1].auroc.defined
    assert (scores.labels[1].num_positive, scores.labels[1].num_negative) == (0, 300)
    assert not scores.labels[2].auroc.defined
    mean = (scores.labels[0].auroc.value + scores.labels[3].auroc.value) / 2
    assert scores.macro_auroc.value == pytest.approx(mean)


def test_measure__nothing_defined() -> None:
    score_NL, question = _question(num_labels=1)
    question.target_NL[:] = True
    scores = measure(score_NL, question, num_resamples=20, seed=0)
    assert math.isnan(scores.macro_auroc.value)
    assert scores.macro_labels == ()


def test_measure__labels_out_of_the_mean_are_still_listed() -> None:
    score_NL, question = _question()
    question.in_macro_L[0] = False
    scores = measure(score_NL, question, num_resamples=20, seed=0)
    assert "label0" not in scores.macro_labels
    assert scores.labels[0].auroc.defined


def test_difference__is_paired() -> None:
    score_NL, question = _question()
    better = measure(score_NL + 0.3 * question.target_NL, question, num_resamples=400, seed=0)
    worse = measure(score_NL, question, num_resamples=400, seed=0)
    change = difference(better, worse)
    assert change.value == pytest.approx(better.macro_auroc.value - worse.macro_auroc.value)
    assert change.low > 0
    assert change.high - change.low < 0.5 * (worse.macro_auroc.high - worse.macro_auroc.low)
    question.in_macro_L[0] = False
    fewer_labels = measure(score_NL, question, num_resamples=400, seed=0)
    assert not difference(better, fewer_labels).defined


def test_measure_sources__shows_a_confound() -> None:
    """A score that only knows the source is good overall and worthless within each source."""
    rng = np.random.default_rng(0)
    sources = ["one"] * 200 + ["two"] * 200
    target_NL = np.r_[rng.random(200) < 0.8, rng.random(200) < 0.1][:, None]
    question = Question(("x",), target_NL, tuple(map(str, range(400))), np.ones(1, dtype=bool))
    score_NL = np.r_[np.ones(200), np.zeros(200)][:, None]
    assert measure(score_NL, question, num_resamples=20, seed=0).macro_auroc.value > 0.8
    within = measure_sources(score_NL, question, sources, num_resamples=20, seed=0)
    assert [(s.source, s.num_images, s.macro_auroc.value) for s in within] == [
        ("one", 200, 0.5),
        ("two", 200, 0.5),
    ]


def test_measure__is_quick() -> None:
    score_NL, question = _question(num_images=1500, num_labels=10)
    start_s = time.process_time()
    measure(score_NL, question, num_resamples=1000, seed=0)
    assert time.process_time() - start_s < 10
