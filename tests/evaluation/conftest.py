"""One evaluation of the fake cohort, shared by the tests of the glue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fundusfm.evaluation.measure import Measurement
from fundusfm.evaluation.pipeline import Reading, make_exhibits, measure_reading, read
from fundusfm.evaluation.report import Exhibits
from fundusfm.evaluation.results import Results
from tests.evaluation.fakes import FakeSource, fake_tokens, make_source, make_towers

FACTS = {"run": "fake-run", "measured on": "fake", "pretrained on this set": "yes"}
METRICS = [
    {"step": 1, "train/loss": 3.0, "train/loss_patient": 1.0, "exams_per_s": 9.0},
    {"step": 2, "train/loss": 2.0, "train/loss_patient": 0.5, "exams_per_s": 8.0},
    {"step": 2, "val/loss": 2.5},
]


@dataclass(frozen=True)
class Evaluated:
    source: FakeSource
    reading: Reading
    results: Results
    measurement: Measurement
    exhibits: Exhibits


def run_evaluation(source: FakeSource, towers: dict[str, Any] | None = None) -> Evaluated:
    """The whole pipeline on a fake cohort."""
    reading = read(source, towers or make_towers(), fake_tokens, lambda text: None)  # type: ignore[arg-type]
    results, measurement = measure_reading(source, reading, FACTS)  # type: ignore[arg-type]
    return Evaluated(
        source, reading, results, measurement, make_exhibits(results, measurement, reading, METRICS)
    )


@pytest.fixture(scope="session")
def evaluated() -> Evaluated:
    return run_evaluation(make_source())
