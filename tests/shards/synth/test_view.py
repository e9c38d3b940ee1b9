"""Masks of many outlines at once are those of outlines drawn one by one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fundusfm.shards.synth.view import Array, View

SIZE, FACTOR = 96, 9  # of the image, and of the canvas that masks are drawn on


@pytest.fixture
def view() -> View:
    return View(SIZE, (1.2, -0.3), 6.5, 47.0, mirrored=True)


def one_by_one(view: View, outlines: list[Array], levels: list[float]) -> Array:
    canvas = Image.new("L", (SIZE * FACTOR,) * 2)
    draw = ImageDraw.Draw(canvas)
    for outline_K2, level in zip(outlines, levels, strict=True):
        corners = [(round(x), round(y)) for x, y in (view.to_px(outline_K2) * FACTOR).tolist()]
        draw.polygon(corners, fill=round(255 * level))
    return np.asarray(canvas.reduce(FACTOR), np.float32) / np.float32(255)


def shapes(rng: np.random.Generator, number: int, reach_mm: float) -> list[Array]:
    """Polygons of 3 to 30 corners about places up to `reach_mm` from the fovea, many off the image."""
    found = []
    for _ in range(number):
        angle_K = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 31))))
        circle_K2 = np.stack([np.cos(angle_K), np.sin(angle_K)], axis=1)
        found.append(rng.uniform(-reach_mm, reach_mm, 2) + circle_K2 * rng.uniform(0.02, 2))
    return found


@pytest.mark.parametrize("reach_mm", [2.0, 8.0, 30.0])
def test_mask(view: View, reach_mm: float) -> None:
    rng = np.random.default_rng(7)
    outlines, levels = shapes(rng, 60, reach_mm), rng.uniform(0.1, 1, 60).tolist()
    expected = one_by_one(view, outlines, levels)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(view.mask(outlines, levels), expected)


def test_mask__without_levels_is_full(view: View) -> None:
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    assert view.mask(iter([square, square + 1])).max() == 1


def test_mask__of_nothing_is_empty(view: View) -> None:
    assert not view.mask([]).any()


def test_mask__over_the_edge_is_cut_there(view: View) -> None:
    whole = np.array([[-50.0, -50.0], [50.0, -50.0], [50.0, 50.0], [-50.0, 50.0]])
    assert view.mask([whole]).min() == 1


def test_mask__a_level_for_each_outline(view: View) -> None:
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for levels in ([], [0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="zip"):
            view.mask([square, square], levels)
