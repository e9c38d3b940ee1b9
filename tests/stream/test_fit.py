"""Images on a black canvas: FLAIR's numbers, the scale to decode at, and every view obeys the recipe."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fundusfm.recipe.schema import DataConfig, Fit
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.stream.decode import Box, decode_crop, scaled_crop
from fundusfm.stream.items import ImagesView
from fundusfm.stream.transforms import DeviceTail
from fundusfm.stream.view_image import ImageOnlyView
from fundusfm.stream.views import PatientPairView
from tests.goldens import load
from tests.stream.pictures import encoded, photograph


@pytest.mark.parametrize("shape", ["wide", "tall", "square", "odd", "small"])
def test_golden__canvas_of_flair(shape: str) -> None:
    """The published code computes in float64; bytes are one level of 255 away at most."""
    arrays, _ = load("flair/image_canvas")
    raw = encoded(Image.fromarray(arrays[f"in_{shape}"]), "PNG")
    pixels_1CHW = torch.from_numpy(decode_crop(raw, None, 16, fit=Fit.pad)).permute(2, 0, 1)[None]
    found_1CHW = DeviceTail((0.0,) * 3, (1.0,) * 3).normalise(pixels_1CHW).numpy()
    for name in ("train", "infer"):
        wanted = arrays[f"{name}_{shape}"].reshape(found_1CHW.shape)
        np.testing.assert_allclose(found_1CHW, wanted, rtol=0, atol=1.001 / 255)
        assert not found_1CHW[wanted == 0].any()


def test_decode_crop__padded_into_a_used_slab() -> None:
    raw, slab_HWC = encoded(photograph(90, 60), "PNG"), np.full((32, 32, 3), 77, dtype=np.uint8)
    returned = decode_crop(raw, Box(10, 0, 70, 30), 32, slab_HWC, fit=Fit.pad)
    assert np.shares_memory(returned, slab_HWC)
    assert not slab_HWC[16:].any()
    assert slab_HWC[:16].any(axis=2).all()


def test_scaled_crop__a_padded_image_needs_its_longer_side_only() -> None:
    assert scaled_crop(None, 2400, 600, 224).denominator == 1
    assert scaled_crop(None, 2400, 600, 224, Fit.pad).denominator == 4
    raw = encoded(photograph(2400, 600), quality=95)
    padded = decode_crop(raw, None, 224, fit=Fit.pad)
    picture = Image.open(io.BytesIO(raw)).resize((224, 56), Image.Resampling.BILINEAR)
    assert np.abs(padded[:56].astype(int) - np.asarray(picture)).mean() < 1.5


@dataclass
class _Stored:
    exam: Exam
    raw: bytes

    def read(self, name: str) -> bytes:
        return self.raw


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("view_name", ["evaluation", "image_only", "patient_pair"])
def test_views__fit_as_the_recipe_says(view_name: str, training: bool) -> None:
    image = ImageRecord("left.cfp.0.jpg", "left", "CFP", 80, 40)
    stored: Any = _Stored(Exam("p", "e", "train", (image,)), encoded(photograph(80, 40)))
    black = {}
    for fit in Fit:
        config = DataConfig(image_size=32, fit=fit)
        config.augment.crop_ratio = (2.0, 2.0)
        views: dict[str, Any] = {
            "evaluation": ImagesView(config),
            "image_only": ImageOnlyView(config),
            "patient_pair": PatientPairView(config, None),  # type: ignore[arg-type]
        }
        found = views[view_name].load(stored, np.random.default_rng(0) if training else None)
        if view_name == "patient_pair":
            pixels_HWC = found.images[0][1]
        else:
            pixels_HWC = (found[0] if view_name == "evaluation" else found).pixels_HWC
        black[fit] = float((pixels_HWC == 0).all(axis=2).mean())
    assert black[Fit.squeeze] < 0.05
    assert 0.45 < black[Fit.pad] < 0.6
