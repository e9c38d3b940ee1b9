"""Linear probes on frozen features: a logistic regression for each label, or one over the grades of a scale.

The strength of the regularisation is chosen on images that are neither trained on nor reported.

Legend: N images, F features, L labels, K grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fundusfm.evaluation.arrays import Features, Flags, Floats, Integers
from fundusfm.evaluation.metrics import auroc, confusions, quadratic_kappa

# scikit-learn's C, the inverse of the penalty, from strong to weak.
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
_MAX_ITERATIONS = 2000
# Two threads on busy cores made the fits 20 to 40 times slower than one: the products are small.
_NUM_THREADS = 1
_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Probed:
    """What a probe says of the reported images: scores (N, L) or grades (N,), and the C that was chosen."""

    output: np.ndarray[Any, Any]
    strength: float


def hold_out(patients: Sequence[str], seed: int) -> Flags:
    """True for the images of a quarter of the patients (at least one), which choose the regularisation."""
    names_P, patient_N = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    chosen_P = np.zeros(len(names_P), dtype=bool)
    number = max(1, round(_HELD_OUT_SHARE * len(names_P)))
    chosen_P[np.random.default_rng(seed).permutation(len(names_P))[:number]] = True
    held_out_N: Flags = chosen_P[patient_N]
    return held_out_N


def probe_labels(
    train: tuple[Features, Flags], select: tuple[Features, Flags], feature_NF: Features, in_macro_L: Flags
) -> Probed:
    """One-vs-rest scores of `feature_NF`; `train` and `select` are (features, targets).

    C is chosen by macro AUROC on `select`. A label with a single class in training gets a column of nan.
    """
    scaler = StandardScaler().fit(train[0])
    train_NF, select_NF, reported_NF = (scaler.transform(f) for f in (train[0], select[0], feature_NF))
    with threadpool_limits(_NUM_THREADS):
        paths = [_path(train_NF, target_N, (select_NF, reported_NF)) for target_N in train[1].T]
    macros = [
        _macro_auroc([path[step][0] for path in paths], select[1], in_macro_L)
        for step in range(len(STRENGTHS))
    ]
    best = _argmax(macros)
    return Probed(np.stack([path[best][1] for path in paths], axis=1), STRENGTHS[best])


def probe_grades(
    train: tuple[Features, Integers], select: tuple[Features, Integers], feature_NF: Features, num_grades: int
) -> Probed:
    """Predicted grades of `feature_NF` by a multinomial probe; C is chosen by quadratic kappa on `select`."""
    scaler = StandardScaler().fit(train[0])
    train_NF, select_NF, reported_NF = (scaler.transform(f) for f in (train[0], select[0], feature_NF))
    probe = _probe()
    kappas, grades = [], []
    for strength in STRENGTHS:
        with threadpool_limits(_NUM_THREADS):
            probe.set_params(C=strength).fit(train_NF, train[1])
        predicted_N = probe.predict(select_NF)
        confusion_1KK = confusions(select[1], predicted_N, num_grades, np.ones((1, len(predicted_N))))
        kappas.append(float(quadratic_kappa(confusion_1KK)[0]))
        grades.append(probe.predict(reported_NF))
    best = _argmax(kappas)
    return Probed(grades[best], STRENGTHS[best])


def _probe() -> LogisticRegression:
    # Each C starts where the stronger penalty ended, which saves most of the iterations.
    return LogisticRegression(warm_start=True, max_iter=_MAX_ITERATIONS)


def _path(train_NF: Features, target_N: Flags, groups: tuple[Features, ...]) -> list[tuple[Floats, ...]]:
    """Scores of each group of images at each strength."""
    if target_N.all() or not target_N.any():
        return [tuple(np.full(len(g), np.nan) for g in groups) for _ in STRENGTHS]
    probe = _probe()
    path = []
    for strength in STRENGTHS:
        probe.set_params(C=strength).fit(train_NF, target_N)
        path.append(tuple(probe.decision_function(g).astype(np.float64) for g in groups))
    return path


def _macro_auroc(columns: list[Floats], target_NL: Flags, in_macro_L: Flags) -> float:
    areas = [
        auroc(score_N, target_NL[:, column])
        for column, score_N in enumerate(columns)
        if in_macro_L[column] and not np.isnan(score_N).any()
    ]
    defined = [area for area in areas if not np.isnan(area)]
    return float(np.mean(defined)) if defined else np.nan


def _argmax(values: Sequence[float]) -> int:
    """Place of the best value: the first of equals (the strongest penalty), the middle if none is defined."""
    if np.isnan(values).all():
        return len(values) // 2
    return int(np.nanargmax(values))
