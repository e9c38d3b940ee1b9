"""An objective without a space of texts, and with pictures of its own."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from fundusfm.evaluation.pipeline import make_exhibits, measure_reading, read
from fundusfm.evaluation.report import render
from fundusfm.evaluation.results import NEIGHBOURS, PRETRAINED, PROBE, UNTRAINED
from tests.evaluation.conftest import FACTS, METRICS, Evaluated
from tests.evaluation.fakes import FakeExamBatch, FakeTower, make_source


class Drawing(FakeTower):
    """Knows no text; draws the first image of a batch, whose brightness it was given normalised."""

    aligns_text = False
    embed_texts = embed_images = embed_exams = None

    def pictures(self, batch: FakeExamBatch) -> dict[str, torch.Tensor]:
        assert batch.images.dtype == torch.float32
        assert batch.images.min() < 0
        ramp = torch.linspace(0, 1, 300).expand(3, 20, -1)
        return {"reconstruction": ramp}


def test_pictures__in_the_report_and_no_question_about_texts() -> None:
    source = make_source(num_patients=30)
    towers = {PRETRAINED: Drawing(True), UNTRAINED: Drawing(False)}
    reading = read(source, towers, None, lambda text: None)  # type: ignore[arg-type]
    results, measurement = measure_reading(source, reading, FACTS)  # type: ignore[arg-type]
    assert {m.method for m in results.methods if m.tower == PRETRAINED} == {PROBE, NEIGHBOURS}
    assert results.retrieval == ()
    assert any("zero-shot and retrieval do not apply" in note for note in results.notes)
    assert not any("no prompts" in note for note in results.notes)
    html = render(results, make_exhibits(results, measurement, reading, METRICS))
    encoded = re.search(r'class="figure drawn" src="data:image/jpeg;base64,([^"]+)"', html)
    assert encoded
    assert 'alt="reconstruction of the first exams"' in html
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))
    assert shown.shape == (20, 300, 3)
    assert np.abs(shown[10, :, 0].astype(float) - np.linspace(0, 255, 300)).max() < 8


def test_no_pictures__no_section(evaluated: Evaluated) -> None:
    assert evaluated.reading.drawn == {}
    assert "What the model draws" not in render(evaluated.results, evaluated.exhibits)
