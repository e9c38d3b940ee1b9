"""Exams with a written report, and their rows for retrieval.

Legend: E exams, D shared width, T tokens, B exams or texts of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fundusfm.evaluation.arrays import Features, Flags
from fundusfm.evaluation.drawn import exam_batches
from fundusfm.evaluation.features import Source, Towers, rows_of
from fundusfm.objectives.base import Objective
from fundusfm.shards.exam import ORIGIN_REPORT
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.items import ImagesView
from fundusfm.stream.tokens import Tokens

_TEXTS_PER_CHUNK = 64


@dataclass(frozen=True)
class Report:
    """The written report of an exam; `key` is where the exam lies."""

    key: str
    patient: str
    text: str


@dataclass
class ReportBatch:
    """The reports of a batch of exams."""

    reports: list[Report]
    padding: bool = False


class ReportsView:
    """Exams as (patient, text): the first written report in a language of the recipe, or None.

    Texts that were made from labels are no reports.
    """

    def __init__(self, images: ImagesView, languages: Sequence[str]) -> None:
        self._images, self._languages = images, languages

    def usable(self, offsets: Offsets) -> Flags:
        return self._images.usable(offsets)

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> tuple[str, str | None]:
        written = [t for t in stored.exam.texts if t.origin == ORIGIN_REPORT]
        names = [t.name for t in written if not self._languages or t.lang in self._languages]
        return stored.exam.patient, stored.read(names[0]).decode() if names else None

    def collate(
        self, items: Sequence[tuple[str, str | None]], keys: list[str], faults: list[Fault]
    ) -> ReportBatch:
        found = zip(keys, items, strict=True)
        return ReportBatch([Report(key, patient, text) for key, (patient, text) in found if text is not None])


def written_reports(source: Source, split: str) -> list[Report]:
    """The reports of a split in the order of the files."""
    view = ReportsView(ImagesView(source.recipe.data), source.recipe.data.languages)
    return [report for batch in source.batches(split, view) for report in batch.reports]


@dataclass(frozen=True)
class ExamRows:
    """Exams with images and report that could be read, and by tower image_ED and text_ED."""

    reports: list[Report]
    rows: dict[str, tuple[Features, Features]]


@torch.inference_mode()
def embed_exams(
    source: Source, split: str, towers: Towers, tokens: Tokens, reports: list[Report]
) -> ExamRows:
    """Unit rows of the exams of `reports`: images through the objective's own view, texts as they read."""
    found: dict[str, dict[str, Features]] = {name: {} for name in towers}
    for batch in exam_batches(source, split, next(iter(towers.values())), tokens):
        for name, tower in towers.items():
            found[name].update(zip(batch.keys, rows_of(tower.embed_exams(batch)[0]), strict=True))
    readable = next(iter(found.values()))
    kept = [report for report in reports if report.key in readable]
    texts = [report.text for report in kept]
    rows = {
        name: (np.stack([found[name][report.key] for report in kept]), _embed_texts(tower, tokens, texts))
        for name, tower in towers.items()
        if kept
    }
    return ExamRows(kept, rows)


def _embed_texts(tower: Objective, tokens: Tokens, texts: list[str]) -> Features:
    chunks = [texts[start : start + _TEXTS_PER_CHUNK] for start in range(0, len(texts), _TEXTS_PER_CHUNK)]
    rows = []
    for chunk in chunks:
        token_BT, mask_BT = (tensor.to(tower.device) for tensor in tokens(chunk))
        rows.append(rows_of(tower.embed_texts(token_BT, mask_BT, "")))
    return np.concatenate(rows)
