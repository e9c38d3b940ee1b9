"""Images and reports to look at beside the numbers: the first in the order of the files, not the best.

Legend: N images, H W C pixels, E exams.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fundusfm.evaluation.arrays import Floats
from fundusfm.evaluation.cohort import ImageFacts
from fundusfm.evaluation.exams import ExamRows, Report
from fundusfm.evaluation.features import Pixels
from fundusfm.evaluation.results import PRETRAINED

NUM_EXAMS, NUM_FOUND, NUM_TOP = 4, 3, 3
_SHOWN_PX, _QUALITY = 224, 85


@dataclass(frozen=True)
class Sample:
    """An image, its labels, and the findings read most strongly: (label, share of images scored lower)."""

    picture: str
    eye: str
    source: str
    labels: tuple[str, ...]
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class FoundReport:
    """A report in the order found; `right` if it reads like the exam's own."""

    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """An exam's images, its report, the rank of the first right report, and the first reports found."""

    pictures: tuple[str, ...]
    report: str
    rank: int
    found: tuple[FoundReport, ...]


def samples(
    pictures: Mapping[int, Pixels],
    facts: ImageFacts,
    score_NL: Floats,
    labels: Sequence[str],
    shown: Sequence[bool],
) -> list[Sample]:
    """Annotated images; `pictures` and `score_NL` are by row of `facts`, `shown` marks the labels to list."""
    columns = [n for n, keep in enumerate(shown) if keep and not np.isnan(score_NL[:, n]).any()]
    found = []
    for row, pixels_HWC in sorted(pictures.items()):
        lower = [(labels[n], float((score_NL[:, n] < score_NL[row, n]).mean())) for n in columns]
        top = tuple(sorted(lower, key=lambda pair: -pair[1])[:NUM_TOP])
        own = tuple(label for label in facts.labels[row] or () if label in labels)
        found.append(Sample(data_uri(pixels_HWC), facts.eyes[row], facts.sources[row], own, top))
    return found


def example_keys(reports: Sequence[Report]) -> frozenset[str]:
    """Keys of a few exams, spread evenly over the split."""
    step = max(1, len(reports) // NUM_EXAMS)
    return frozenset(report.key for report in reports[::step][:NUM_EXAMS])


def retrieval_examples(exams: ExamRows, pictures: Mapping[str, Sequence[Pixels]]) -> list[Example]:
    """The exams of `pictures` (by key), with the reports that the pretrained tower finds for them."""
    image_ED, text_ED = exams.rows[PRETRAINED]
    text_E = np.asarray([report.text for report in exams.reports], dtype=object)
    found = []
    for e, report in enumerate(exams.reports):
        if report.key in pictures:
            cosine_E, right_E = text_ED @ image_ED[e], text_E == report.text
            rank = 1 + int(((cosine_E >= cosine_E[right_E].max()) & ~right_E).sum())
            nearest = np.argsort(-cosine_E, kind="stable")[:NUM_FOUND]
            reports = tuple(FoundReport(str(text_E[o]), bool(right_E[o])) for o in nearest)
            found.append(Example(tuple(map(data_uri, pictures[report.key])), report.text, rank, reports))
    return found


def data_uri(pixels_HWC: Pixels, side_px: int | None = _SHOWN_PX) -> str:
    """A JPEG no larger than `side_px`, None as it is."""
    image = Image.fromarray(pixels_HWC)
    if side_px is not None:
        image.thumbnail((side_px, side_px))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
