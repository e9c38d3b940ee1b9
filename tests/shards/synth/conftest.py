"""Eyes with findings of the test's choice, drawn by the room's own functions."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fundusfm.shards.synth.camera import CAMERAS
from fundusfm.shards.synth.eye import draw_eye
from fundusfm.shards.synth.findings import EyeTruth, Finding, PatientTruth

SEED = 11
Draw = Callable[..., Any]


@pytest.fixture
def draw() -> Draw:
    """draw(eye, finding, ..., number=, camera=, modality=, size=) -> image as float array, 0 to 255."""

    def draw_one(
        eye: str, *findings: Finding, number: int = 0, camera: int = 0, modality: str = "CFP", size: int = 128
    ) -> Any:
        truth = EyeTruth(eye, findings, 0)
        patient = PatientTruth(number, 60, (truth,), has_oct=True, has_ffa=True, has_report=True)
        pictures = draw_eye(SEED, patient, truth, CAMERAS[camera], size)
        jpeg = next(p.jpeg for p in pictures if p.modality == modality)
        return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.float64)

    return draw_one
