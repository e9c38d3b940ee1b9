"""Towers and a shard set -> results and exhibits: read once, then measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fundusfm.errors import UserError
from fundusfm.evaluation.captions import (
    Written,
    caption_examples,
    check_metrics,
    measure_captions,
    write_captions,
)
from fundusfm.evaluation.cohort import Plan, SplitFeatures, findings, plan_splits, visible
from fundusfm.evaluation.drawn import draw
from fundusfm.evaluation.examples import (
    Example,
    Sample,
    data_uri,
    example_keys,
    retrieval_examples,
    samples,
)
from fundusfm.evaluation.exams import ExamRows, embed_exams, written_reports
from fundusfm.evaluation.features import Album, Pixels, Source, Towers, extract, eye_of, prompt_ensembles
from fundusfm.evaluation.few_shot import Phrases
from fundusfm.evaluation.measure import (
    Ensembles,
    Measurement,
    Sets,
    differences,
    make_sets,
    measure_few_shot,
    measure_methods,
    measure_scales,
    source_counts,
)
from fundusfm.evaluation.report import Exhibits
from fundusfm.evaluation.results import (
    FEW_SHOT,
    PRETRAINED,
    PROBE,
    REPORTED,
    ZERO_SHOT,
    MethodResult,
    Results,
    RetrievalResult,
    SplitFacts,
)
from fundusfm.evaluation.retrieval import measure_retrieval
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.phrasebook import gather_prompts
from fundusfm.stream.tokens import Tokens

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """Everything that the towers gave: split -> features, prompts by tower, exams with reports, pictures.

    `drawn`: what the objective itself shows, by name; `written` is None unless it writes reports; `aligned`:
    whether images and texts share a space. `scales`: by tower and eye, what it multiplies cosines by.
    """

    plan: Plan
    splits: dict[str, SplitFeatures]
    ensembles: dict[str, Ensembles]
    exams: ExamRows
    album: Album
    drawn: dict[str, Pixels]
    aligned: bool = True
    written: Written | None = None
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read(source: Source, towers: Towers, tokens: Tokens, say: Say) -> Reading:
    """Call the towers: each image, report and prompt once. `say` hears what is going on."""
    index, recipe = source.index, source.recipe
    objective = towers[PRETRAINED]
    if objective.writes_reports:
        check_metrics()
    plan = plan_splits(index)
    reports = written_reports(source, plan.reported)
    album = Album(example_keys(reports))
    splits = {}
    for split in plan.splits:
        say(f"reading the images of {split}")
        reported = split == plan.reported
        is_support = split == plan.train and recipe.evaluation.shots > 0
        embed = (reported or is_support) and objective.aligns_text
        splits[split] = extract(source, split, towers, embed=embed, album=album if reported else None)
        _check_budget(splits[split], split, source)
    eyes = {eye for features in splits.values() for eye in features.facts.eyes}
    prompts = gather_prompts(recipe.data, [index], index.labels)
    prompted = towers if prompts and objective.aligns_text else {}
    ensembles = {n: prompt_ensembles(t, tokens, prompts, recipe, eyes) for n, t in prompted.items()}
    scales = {
        name: {eye: t.contrast_scale(eye_of(eye)) for eye in ensembles[name]} for name, t in prompted.items()
    }
    exams, written = ExamRows([], {}), None
    if reports and objective.aligns_text:
        say(f"reading the reports of {plan.reported}")
        exams = embed_exams(source, plan.reported, towers, tokens, reports)
    if objective.writes_reports:
        say(f"writing reports about {plan.reported}")
        written = write_captions(source, plan.train, plan.reported, towers, tokens, reports)
    drawn = draw(source, plan.reported, objective, tokens)
    return Reading(plan, splits, ensembles, exams, album, drawn, objective.aligns_text, written, scales)


def _check_budget(features: SplitFeatures, split: str, source: Source) -> None:
    num_exams = len(set(features.facts.keys)) + features.num_unreadable
    if features.num_unreadable > source.recipe.data.error_budget * num_exams:
        raise UserError(
            f"{features.num_unreadable} of {num_exams} exams of the split {split!r} cannot be read",
            where=source.index.root,
            fix="run `fundusfm shards check`, or raise data.error_budget to measure without them",
        )


def measure_reading(
    source: Source, reading: Reading, facts: Mapping[str, str]
) -> tuple[Results, Measurement]:
    """All numbers. `facts` describe the run for the report."""
    index, recipe = source.index, source.recipe
    options = {"num_resamples": recipe.evaluation.num_resamples, "seed": recipe.seed}
    sets = _sets(reading, index.root, recipe.seed)
    measurement = Measurement(sets, index, recipe.data.image_size, **options)
    methods = measure_methods(measurement, recipe.evaluation.neighbours, reading.ensembles)
    methods += _few_shot(source, reading, measurement)
    results = Results(
        facts=dict(facts),
        splits=_split_facts(reading, sets),
        source_counts=source_counts(sets.reported, index.labels),
        methods=methods,
        differences=differences(methods),
        scales=measure_scales(measurement, reading.ensembles),
        retrieval=_measure_retrieval(reading.exams, **options),
        notes=tuple(_notes(source, reading, methods)),
        captions=measure_captions(reading.written, **options) if reading.written else (),
    )
    return results, measurement


def _few_shot(source: Source, reading: Reading, measurement: Measurement) -> tuple[MethodResult, ...]:
    shots = source.recipe.evaluation.shots
    if not shots:
        return ()
    phrases = {n: Phrases(rows, reading.scales[n]) for n, rows in reading.ensembles.items()}
    released = source.recipe.objective.fidelity is Fidelity.released
    return measure_few_shot(measurement, shots, phrases, released=released)


def _sets(reading: Reading, where: str, seed: int) -> Sets:
    plan, splits = reading.plan, reading.splits
    train, reported = (splits[s].annotated(s, where) for s in (plan.train, plan.reported))
    if len(set(train.facts.patients)) < 2:
        raise UserError("the train split has fewer than two annotated patients", where=where)
    select = splits[plan.select] if plan.select else None
    if select is None or all(own is None for own in select.facts.labels):
        return make_sets(train, None, reported, seed)
    return make_sets(train, select.annotated("val", where), reported, seed)


def _split_facts(reading: Reading, sets: Sets) -> tuple[SplitFacts, ...]:
    own = sets.select_from_train
    roles = {
        reading.plan.select: "nothing (no labels)" if own else "choose C",
        reading.plan.train: "fit the probes, a quarter of patients to choose C" if own else "fit the probes",
        reading.plan.reported: REPORTED,
    }
    return tuple(
        SplitFacts(
            split,
            roles[split],
            len(features.facts),
            sum(labels is not None for labels in features.facts.labels),
            len(set(features.facts.patients)),
        )
        for split, features in reading.splits.items()
    )


def _measure_retrieval(exams: ExamRows, *, num_resamples: int, seed: int) -> tuple[RetrievalResult, ...]:
    texts, patients = [r.text for r in exams.reports], [r.patient for r in exams.reports]
    return tuple(
        RetrievalResult(tower, direction)
        for tower, rows in exams.rows.items()
        for direction in measure_retrieval(*rows, texts, patients, num_resamples=num_resamples, seed=seed)
    )


def _notes(source: Source, reading: Reading, methods: Sequence[MethodResult]) -> list[str]:
    """What a reader must know before trusting a mean."""
    index, plan, notes = source.index, reading.plan, []
    if plan.reported != "test":
        notes.append("There is no test split: the results are on val, and C was chosen on training patients.")
    if not visible(index, source.recipe.data.image_size).all():
        shown = visible(index, source.recipe.data.image_size)
        hidden = ", ".join(label for label, seen in zip(index.labels, shown, strict=True) if not seen)
        notes.append(f"Not in the mean, because images of this size do not show it: {hidden}.")
    if not findings(index.labels, index.ordered).all():
        notes.append("Grades of an ordered scale are measured by kappa and are not in the mean.")
    undefined = [
        s.label for s in methods[0].scores.labels if s.in_macro and not s.num_positive * s.num_negative
    ]
    if undefined:
        notes.append(
            f"Not in the mean, because one class is missing in {plan.reported}: {', '.join(undefined)}."
        )
    notes += _unmeasured(reading)
    if source.recipe.evaluation.shots and not any(m.method == FEW_SHOT for m in methods):
        notes.append(
            "Fewer than two labels have a training image that shows them alone: no few-shot reading."
        )
    unreadable = sum(features.num_unreadable for features in reading.splits.values())
    if unreadable:
        notes.append(f"Left out because they cannot be read: {unreadable} exams.")
    return notes


def _unmeasured(reading: Reading) -> list[str]:
    """What could not be asked, and why."""
    notes = []
    if not reading.aligned:
        notes.append(
            "The objective has no space that images and texts share: zero-shot and retrieval do not apply."
        )
    elif not reading.ensembles:
        notes.append("The shard set has no prompts: zero-shot reading was not measured.")
    reported = reading.plan.reported
    if reading.aligned and not reading.exams.reports:
        notes.append(f"No exam of {reported} has a written report: retrieval was not measured.")
    if reading.written is not None and not reading.written.reports:
        notes.append(f"No exam of {reported} has a written report: what was learned was not measured.")
    return notes


def make_exhibits(
    results: Results, measurement: Measurement, reading: Reading, metrics: Sequence[Mapping[str, float]]
) -> Exhibits:
    """Curves, sample images and retrieval examples of the report."""
    method = results.find(PRETRAINED, ZERO_SHOT) or results.find(PRETRAINED, PROBE)
    assert method is not None
    return Exhibits(
        target_NL=measurement.question.target_NL,
        metrics=metrics,
        samples=_samples(method, measurement, reading),
        sample_method=f"the {method.tower} tower ({method.method})",
        examples=_examples(reading),
        pictures={name: data_uri(pixels_HWC, None) for name, pixels_HWC in reading.drawn.items()},
        written=caption_examples(reading.written) if reading.written else (),
    )


def _samples(method: MethodResult, measurement: Measurement, reading: Reading) -> list[Sample]:
    labels = reading.splits[reading.plan.reported].facts.labels
    place = {row: n for n, row in enumerate(row for row, own in enumerate(labels) if own is not None)}
    pictures = {place[row]: pixels_HWC for row, pixels_HWC in reading.album.samples.items()}
    facts, question = measurement.sets.reported.facts, measurement.question
    shown = question.in_macro_L & question.target_NL.any(axis=0)
    return samples(pictures, facts, method.score_NL, question.labels, np.asarray(shown).tolist())


def _examples(reading: Reading) -> list[Example]:
    return retrieval_examples(reading.exams, reading.album.of_exam) if reading.exams.reports else []
