"""Scores of images -> AUROC and average precision per label and over labels, with intervals over patients.

Legend: N images, L labels, R resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fundusfm.evaluation.arrays import Flags, Floats
from fundusfm.evaluation.bootstrap import UNDEFINED, Estimate, Resamples, interval
from fundusfm.evaluation.metrics import Ranking


@dataclass(frozen=True)
class Question:
    """Which labels are asked of which images.

    `target_NL` tells who has what, `patients` whom the images belong to. `in_macro_L` marks the labels
    that enter the mean; the others are only listed.
    """

    labels: tuple[str, ...]
    target_NL: Flags
    patients: tuple[str, ...]
    in_macro_L: Flags

    def only(self, chosen_N: Flags) -> Question:
        """The same labels asked of some of the images."""
        patients = tuple(p for p, chosen in zip(self.patients, chosen_N, strict=True) if chosen)
        return Question(self.labels, self.target_NL[chosen_N], patients, self.in_macro_L)


@dataclass(frozen=True)
class LabelScore:
    """One label; undefined with a single class, or where the method has no score for it."""

    label: str
    num_positive: int
    num_negative: int
    in_macro: bool
    auroc: Estimate
    average_precision: Estimate


@dataclass(frozen=True)
class Scores:
    """All labels of one method.

    The macro values are means over `macro_labels`, those that count and are defined. `draws_R` holds
    the macro AUROC of every resample, for paired differences.
    """

    labels: tuple[LabelScore, ...]
    macro_labels: tuple[str, ...]
    macro_auroc: Estimate
    macro_average_precision: Estimate
    num_images: int
    num_patients: int
    draws_R: Floats = field(repr=False)


def measure(score_NL: Floats, question: Question, *, num_resamples: int, seed: int) -> Scores:
    """AUROC and average precision of `score_NL`; a column of nan is a label that the method cannot score.

    A resample that loses a label's last positive leaves that label out of its mean.
    """
    resamples = Resamples(question.patients, num_resamples, seed)
    columns = zip(score_NL.T, question.target_NL.T, strict=True)
    rankings = [None if np.isnan(score_N).any() else Ranking(score_N, has_N) for score_N, has_N in columns]
    value_L2 = _areas(rankings, np.ones((1, resamples.num_items)))[0]
    draw_RL2 = resamples.draws(lambda weight_RN: _areas(rankings, weight_RN))
    macro_L = question.in_macro_L & ~np.isnan(value_L2[:, 0])
    macro = [_mean(value_L2[None, macro_L, kind])[0] for kind in (0, 1)]
    macro_draws = [_mean(draw_RL2[:, macro_L, kind]) for kind in (0, 1)]
    return Scores(
        labels=tuple(
            _label_score(question, n, value_L2[n], draw_RL2[:, n]) for n in range(len(question.labels))
        ),
        macro_labels=tuple(label for label, counts in zip(question.labels, macro_L, strict=True) if counts),
        macro_auroc=interval(macro[0], macro_draws[0]),
        macro_average_precision=interval(macro[1], macro_draws[1]),
        num_images=resamples.num_items,
        num_patients=resamples.num_patients,
        draws_R=macro_draws[0],
    )


def difference(first: Scores, second: Scores) -> Estimate:
    """Macro AUROC of `first` minus `second` with its paired interval; undefined for unlike labels."""
    if first.macro_labels != second.macro_labels or first.num_images != second.num_images:
        return UNDEFINED
    value = first.macro_auroc.value - second.macro_auroc.value
    return interval(value, first.draws_R - second.draws_R)


@dataclass(frozen=True)
class SourceScores:
    """One method on the images of one source alone; `macro_labels` are those with both classes there."""

    source: str
    num_images: int
    num_patients: int
    macro_labels: tuple[str, ...]
    macro_auroc: Estimate


def measure_sources(
    score_NL: Floats, question: Question, sources: Sequence[str], *, num_resamples: int, seed: int
) -> tuple[SourceScores, ...]:
    """The macro AUROC within each source, where knowing the source helps no more."""
    source_N = np.asarray(sources, dtype=np.str_)
    found = []
    for source in sorted(set(sources)):
        chosen_N = source_N == source
        scores = measure(score_NL[chosen_N], question.only(chosen_N), num_resamples=num_resamples, seed=seed)
        facts = (scores.num_images, scores.num_patients, scores.macro_labels, scores.macro_auroc)
        found.append(SourceScores(source, *facts))
    return tuple(found)


def _areas(rankings: Sequence[Ranking | None], weight_RN: Floats) -> Floats:
    """AUROC and average precision (R, L, 2)."""
    missing = np.full((2, len(weight_RN)), np.nan)
    areas = [missing if ranking is None else ranking.areas(weight_RN) for ranking in rankings]
    area_RL2: Floats = np.asarray(areas, dtype=np.float64).transpose(2, 0, 1)
    return area_RL2


def _mean(value_RL: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over no label is nan, and meant so
        mean: Floats = np.nanmean(value_RL, axis=1) if value_RL.shape[1] else np.full(len(value_RL), np.nan)
    return mean


def _label_score(question: Question, column: int, value_2: Floats, draw_R2: Floats) -> LabelScore:
    num_positive = int(question.target_NL[:, column].sum())
    return LabelScore(
        label=question.labels[column],
        num_positive=num_positive,
        num_negative=len(question.patients) - num_positive,
        in_macro=bool(question.in_macro_L[column]),
        auroc=interval(float(value_2[0]), draw_R2[:, 0]),
        average_precision=interval(float(value_2[1]), draw_R2[:, 1]),
    )
