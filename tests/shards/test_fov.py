from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fundusfm.shards.fov import field_of_view


def disc(width: int, height: int, x: int, y: int, radius: int, level: int = 120) -> Image.Image:
    image = Image.new("RGB", (width, height), (6, 4, 5))
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=(level, level // 2, level // 4))
    return image


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(300, 900),
    height=st.integers(300, 900),
    share=st.floats(0.3, 0.45),
    level=st.integers(50, 255),
)
def test_box_encloses_the_disc(width: int, height: int, share: float, level: int) -> None:
    radius = int(min(width, height) * share)
    x, y = width // 2, height // 2
    found = field_of_view(disc(width, height, x, y, radius, level))
    slack = max(width, height) / 256 * 2 + 4
    true = (x - radius, y - radius, x + radius, y + radius)
    assert max(abs(f - t) for f, t in zip(found, true, strict=True)) <= slack


def test_text_in_a_corner_does_not_widen_the_box() -> None:
    image = disc(600, 400, 300, 200, 180)
    ImageDraw.Draw(image).rectangle((5, 5, 60, 18), fill="white")
    left, top, right, bottom = field_of_view(image)
    assert abs(left - 120) < 8
    assert abs(right - 480) < 8
    assert abs(top - 20) < 8
    assert abs(bottom - 380) < 8


def test_frames_without_a_disc_stay_whole() -> None:
    black, bright = Image.new("RGB", (50, 40)), Image.new("L", (50, 40), 180)
    spot = disc(400, 400, 200, 200, 8, 255)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 50), dtype=np.uint8))
    for image in (black, bright, spot, noise, Image.new("RGB", (1, 1), "white"), Image.new("L", (3, 500))):
        assert field_of_view(image) == (0, 0, *image.size)
