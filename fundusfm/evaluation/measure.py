"""Features -> results: every method on the same images, with the same resamples. No tower is called here.

Legend: N images, L labels, D shared width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fundusfm.evaluation.arrays import Features, Flags, Floats, Integers
from fundusfm.evaluation.baselines import source_scores
from fundusfm.evaluation.bootstrap import Resamples, interval
from fundusfm.evaluation.cohort import SplitFeatures, findings, grades_of, question_of, targets
from fundusfm.evaluation.few_shot import (
    Embedded,
    Phrases,
    Support,
    adapter_scores,
    draw_support,
    probe_scores,
)
from fundusfm.evaluation.metrics import confusions, quadratic_kappa, rates
from fundusfm.evaluation.neighbours import neighbour_scores
from fundusfm.evaluation.probe import hold_out, probe_grades, probe_labels
from fundusfm.evaluation.results import (
    FEW_SHOT,
    HISTOGRAM,
    NEIGHBOURS,
    PRETRAINED,
    PREVALENCE,
    PROBE,
    SOURCE,
    UNTRAINED,
    ZERO_SHOT,
    Difference,
    MethodResult,
    ScaleResult,
)
from fundusfm.evaluation.scoring import Question, difference, measure, measure_sources
from fundusfm.evaluation.zero_shot import contrast_with_normal, cosines
from fundusfm.shards.index import ShardIndex

# eye -> label -> unit row
Ensembles = Mapping[str, Mapping[str, Features]]


@dataclass(frozen=True)
class Sets:
    """Annotated images of disjoint patients: to train on, to choose the regularisation, to report.

    `select_from_train` tells that the second were part of the training split.
    """

    train: SplitFeatures
    select: SplitFeatures
    reported: SplitFeatures
    select_from_train: bool


def make_sets(train: SplitFeatures, select: SplitFeatures | None, reported: SplitFeatures, seed: int) -> Sets:
    """Without images for selection, a quarter of the training patients becomes them."""
    if select is not None:
        return Sets(train, select, reported, False)
    held_out_N = hold_out(train.facts.patients, seed)
    kept, chosen = (train.take(np.flatnonzero(flags_N)) for flags_N in (~held_out_N, held_out_N))
    return Sets(kept, chosen, reported, True)


class Measurement:
    """Measures methods one after another on the same question."""

    def __init__(
        self, sets: Sets, index: ShardIndex, image_size: int, *, num_resamples: int, seed: int
    ) -> None:
        self.sets, self.index = sets, index
        self.question: Question = question_of(index, sets.reported.facts, image_size)
        self._num_resamples, self._seed = num_resamples, seed

    def probe(self, tower: str) -> MethodResult:
        """Linear probe on a tower's features."""
        parts = [self._labelled(part, tower) for part in (self.sets.train, self.sets.select)]
        found = probe_labels(parts[0], parts[1], self.sets.reported.features[tower], self.question.in_macro_L)
        return self._result(tower, PROBE, f"C = {found.strength:g}", found.output)

    def neighbours(self, tower: str, num_neighbours: int) -> MethodResult:
        """k-NN on a tower's features."""
        feature_NF, target_NL = self._labelled(self.sets.train, tower)
        reported_NF = self.sets.reported.features[tower]
        score_NL = neighbour_scores(feature_NF, target_NL, reported_NF, num_neighbours)
        return self._result(tower, NEIGHBOURS, f"k = {num_neighbours}", score_NL)

    def zero_shot(self, tower: str, ensembles: Ensembles) -> MethodResult:
        """Prompts against a tower's embeddings."""
        cosine_NL = self._cosines(tower, ensembles, self.index.labels)
        is_finding_L = findings(self.index.labels, self.index.ordered)
        score_NL = contrast_with_normal(cosine_NL, self.index.labels, is_finding_L)
        return self._result(tower, ZERO_SHOT, "no training image", score_NL)

    def support(self, shots: int) -> Support:
        """Training images of the findings, for all few-shot methods and towers the same; perhaps too few."""
        labels, train = self.index.labels, self.sets.train.facts
        return draw_support(targets(train, labels), findings(labels, self.index.ordered), shots, self._seed)

    def few_shot_probe(self, tower: str, support: Support) -> MethodResult:
        """A probe on a few images of each finding."""
        features = [part.features[tower] for part in (self.sets.train, self.sets.reported)]
        score_NL = probe_scores(features[0], support, features[1], len(self.index.labels))
        return self._result(tower, FEW_SHOT, _told(support), score_NL)

    def adapters(
        self, tower: str, support: Support, phrases: Phrases, *, released: bool
    ) -> list[MethodResult]:
        """Prompts and a few images of each finding; none where fewer than two findings have both."""
        train, reported = (
            Embedded(part.embeddings[tower], part.facts.eyes)
            for part in (self.sets.train, self.sets.reported)
        )
        scores = adapter_scores(
            train, support, reported, phrases, self.index.labels, seed=self._seed, released=released
        )
        return [self._result(tower, name, _told(support), score_NL) for name, score_NL in scores.items()]

    def source(self) -> MethodResult:
        """How far the source alone leads."""
        facts = self.sets.train.facts
        target_NL = targets(facts, self.index.labels)
        score_NL = source_scores(facts.sources, target_NL, self.sets.reported.facts.sources)
        return self._result(SOURCE, PREVALENCE, "no pixels", score_NL)

    def scale_probe(self, scale: str, tower: str) -> ScaleResult | None:
        """A probe over the grades of a scale; None without two grades in training or any elsewhere."""
        grades = self.index.ordered[scale]
        parts = [grades_of(part.facts, grades) for part in (self.sets.train, self.sets.select)]
        rows, true_N = grades_of(self.sets.reported.facts, grades)
        if len(set(parts[0][1].tolist())) < 2 or not len(parts[1][0]) or not len(rows):
            return None
        train, select = (
            (part.features[tower][own], grade_N)
            for part, (own, grade_N) in zip((self.sets.train, self.sets.select), parts, strict=True)
        )
        found = probe_grades(train, select, self.sets.reported.features[tower][rows], len(grades))
        return self._scale(scale, tower, PROBE, f"C = {found.strength:g}", rows, true_N, found.output)

    def scale_zero_shot(self, scale: str, tower: str, ensembles: Ensembles) -> ScaleResult | None:
        """The grade whose prompts lie nearest; None where a grade has no prompts or no image a grade."""
        grades = self.index.ordered[scale]
        rows, true_N = grades_of(self.sets.reported.facts, grades)
        cosine_NK = self._cosines(tower, ensembles, grades)[rows]
        if not len(rows) or np.isnan(cosine_NK).any():
            return None
        return self._scale(scale, tower, ZERO_SHOT, "nearest grade", rows, true_N, cosine_NK.argmax(axis=1))

    def _labelled(self, part: SplitFeatures, tower: str) -> tuple[Features, Flags]:
        return part.features[tower], targets(part.facts, self.index.labels)

    def _cosines(self, tower: str, ensembles: Ensembles, labels: Sequence[str]) -> Floats:
        reported = self.sets.reported
        return cosines(reported.embeddings[tower], reported.facts.eyes, labels, ensembles)

    def _result(self, tower: str, method: str, setting: str, score_NL: Floats) -> MethodResult:
        options = {"num_resamples": self._num_resamples, "seed": self._seed}
        scores = measure(score_NL, self.question, **options)
        sources = self.sets.reported.facts.sources
        several = len(set(sources)) > 1
        within = measure_sources(score_NL, self.question, sources, **options) if several else ()
        return MethodResult(tower, method, setting, scores, within, score_NL)

    def _scale(
        self,
        scale: str,
        tower: str,
        method: str,
        setting: str,
        rows: Integers,
        true_N: Integers,
        grade_N: Integers,
    ) -> ScaleResult:
        grades = tuple(self.index.ordered[scale])
        patients = [self.sets.reported.facts.patients[row] for row in rows]
        resamples = Resamples(patients, self._num_resamples, self._seed)
        seen_1KK = confusions(true_N, grade_N, len(grades), np.ones((1, len(rows))))
        drawn_RKK = resamples.draws(lambda weight_RN: confusions(true_N, grade_N, len(grades), weight_RN))
        kappa = interval(float(quadratic_kappa(seen_1KK)[0]), quadratic_kappa(drawn_RKK))
        seen, drawn = rates(seen_1KK), rates(drawn_RKK)
        found = {name: interval(float(value_1[0]), drawn[name]) for name, value_1 in seen.items()}
        confusion = tuple(tuple(row) for row in seen_1KK[0].astype(int).tolist())
        return ScaleResult(scale, grades, tower, method, setting, kappa, confusion, len(rows), found)


def measure_methods(
    measurement: Measurement, num_neighbours: int, ensembles: Mapping[str, Ensembles]
) -> tuple[MethodResult, ...]:
    """Every method on every tower; `ensembles` holds the prompts by tower, none for a set without."""
    towers = (PRETRAINED, UNTRAINED)
    methods = [measurement.zero_shot(tower, ensembles[tower]) for tower in towers if tower in ensembles]
    methods += [measurement.probe(tower) for tower in (*towers, HISTOGRAM)]
    methods += [measurement.neighbours(tower, num_neighbours) for tower in (*towers, HISTOGRAM)]
    if len(set(measurement.sets.train.facts.sources)) > 1:
        methods.append(measurement.source())
    return tuple(methods)


def measure_few_shot(
    measurement: Measurement, shots: int, phrases: Mapping[str, Phrases], *, released: bool
) -> tuple[MethodResult, ...]:
    """Every few-shot method on every tower; none where fewer than two findings have images of their own."""
    support = measurement.support(shots)
    if len(support.labels) < 2:
        return ()
    methods = [measurement.few_shot_probe(tower, support) for tower in (PRETRAINED, UNTRAINED, HISTOGRAM)]
    for tower, own in phrases.items():
        methods += measurement.adapters(tower, support, own, released=released)
    return tuple(methods)


def _told(support: Support) -> str:
    return f"{len(support.row_S)} images of {len(support.labels)} labels"


def measure_scales(measurement: Measurement, ensembles: Mapping[str, Ensembles]) -> tuple[ScaleResult, ...]:
    """Every ordered scale by probe and by prompts."""
    found: list[ScaleResult | None] = []
    for scale in measurement.index.ordered:
        found += [measurement.scale_probe(scale, tower) for tower in (PRETRAINED, UNTRAINED, HISTOGRAM)]
        found += [measurement.scale_zero_shot(scale, tower, own) for tower, own in ensembles.items()]
    return tuple(result for result in found if result is not None)


def differences(methods: tuple[MethodResult, ...]) -> tuple[Difference, ...]:
    """The pretrained tower against every other one, method by method."""
    ours = {m.method: m for m in methods if m.tower == PRETRAINED}
    return tuple(
        Difference(m.method, m.tower, difference(ours[m.method].scores, m.scores))
        for m in methods
        if m.tower != PRETRAINED and m.method in ours
    )


def source_counts(features: SplitFeatures, labels: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """label -> source -> number of images with that label, every source named."""
    facts = features.facts
    counts = Counter(
        (label, s) for own, s in zip(facts.labels, facts.sources, strict=True) for label in own or ()
    )
    return {
        label: {source: counts[label, source] for source in sorted(set(facts.sources))} for label in labels
    }
