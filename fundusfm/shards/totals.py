"""What a set holds, counted: by split, eye, modality, label and source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fundusfm.shards.exam import Exam

COUNTED = ("eyes", "modalities", "labels", "sources", "languages")
Totals = dict[str, Any]


def count_exams(exams: Iterable[Exam]) -> Totals:
    """Counts of exams, images, texts and, per image, of each eye, modality, label and source.

    An image without labels of its own counts for none; labels of an exam as a whole count once an exam.
    `made_texts` are those that were made from labels.
    """
    counters: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    totals: Totals = {"exams": 0, "images": 0, "texts": 0, "made_texts": 0}
    for exam in exams:
        totals["exams"] += 1
        totals["images"] += len(exam.images)
        totals["texts"] += len(exam.texts)
        totals["made_texts"] += sum(text.origin == "labels" for text in exam.texts)
        counters["languages"].update(text.lang for text in exam.texts)
        counters["labels"].update(exam.labels or ())
        for image in exam.images:
            counters["eyes"][image.eye] += 1
            counters["modalities"][image.modality] += 1
            counters["sources"][image.source] += 1
            counters["labels"].update(image.labels or ())
    return {**totals, **{name: dict(sorted(counter.items())) for name, counter in counters.items()}}


def add_totals(parts: Iterable[Mapping[str, Any]]) -> Totals:
    """Sum of totals of several shards."""
    total = count_exams(())
    for part in parts:
        for name, value in part.items():
            if isinstance(value, Mapping):
                summed = Counter(total[name]) + Counter(value)
                total[name] = dict(sorted(summed.items()))
            else:
                total[name] = total.get(name, 0) + value
    return total
