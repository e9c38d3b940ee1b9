"""From millimetres to pixels: where the retina lies in an image, masks of shapes on it, and random textures.

Shape letters: H rows, W columns, K points of an outline or a vessel, 2 = x and y in mm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[np.float32]
_CANVAS_PX = 900  # masks are drawn about this large and averaged down, which smooths their edges


@dataclass(frozen=True)
class View:
    """A square image of `size` pixels onto the retina; `mirrored` for left eyes.

    `centre_mm` lies in the middle of the field of view, which is a disc of `field_radius_mm` and `radius_px`.
    """

    size: int
    centre_mm: tuple[float, float]
    field_radius_mm: float
    radius_px: float
    mirrored: bool

    @property
    def px_per_mm(self) -> float:
        return self.radius_px / self.field_radius_mm

    @cached_property
    def grid_mm(self) -> tuple[Array, Array]:
        """x_HW and y_HW of every pixel's centre in the frame of the anatomy."""
        offset = ((np.arange(self.size) + 0.5 - self.size / 2) / self.px_per_mm).astype(np.float32)
        x = (-offset if self.mirrored else offset) + np.float32(self.centre_mm[0])
        return np.broadcast_to(x, (self.size,) * 2), np.broadcast_to(
            (offset + np.float32(self.centre_mm[1]))[:, None], (self.size,) * 2
        )

    @cached_property
    def field_distance(self) -> Array:
        """Distance of every pixel from the middle of the field, 1 at the edge of the field of view."""
        offset = ((np.arange(self.size) + 0.5 - self.size / 2) / self.radius_px).astype(np.float32)
        return np.hypot(offset[None, :], offset[:, None])

    def to_px(self, points_K2: Any) -> Any:
        """Image coordinates of points given in mm."""
        sign = np.array([-1.0 if self.mirrored else 1.0, 1.0])
        return (np.asarray(points_K2) - self.centre_mm) * sign * self.px_per_mm + self.size / 2

    def holds(self, x_mm: float, y_mm: float, margin: float = 0.93) -> bool:
        """Whether a point lies well inside the round field."""
        return (
            float(np.hypot(x_mm - self.centre_mm[0], y_mm - self.centre_mm[1]))
            < margin * self.field_radius_mm
        )

    def mask(self, outlines: Iterable[Any], levels: Iterable[float] | None = None) -> Array:
        """Coverage (0 to 1) of filled outlines in mm, later over earlier; `levels` are their densities."""
        factor = max(2, round(_CANVAS_PX / self.size))
        canvas = Image.new("L", (self.size * factor,) * 2)
        draw = ImageDraw.Draw(canvas)
        shapes = list(outlines)
        fills = [255] * len(shapes) if levels is None else [round(255 * level) for level in levels]
        for corners, fill in zip(self._polygons(shapes, factor), fills, strict=True):
            if corners:
                draw.polygon(corners, fill=fill)
        return from_bytes(canvas.reduce(factor))

    def _polygons(self, outlines: list[Any], factor: int) -> Iterator[list[int]]:
        """Corners (x, y, x, y, ...) of each outline on a canvas `factor` times as large; none if beside it.

        All are moved at once: one by one, such small sums would take as long as the drawing.
        """
        if not outlines:
            return
        place_P2 = np.rint(self.to_px(np.concatenate(outlines)) * factor).astype(int)
        ends = np.cumsum([len(outline_K2) for outline_K2 in outlines]).tolist()
        starts = [0, *ends[:-1]]
        high_N2, low_N2 = (f.reduceat(place_P2, starts) for f in (np.maximum, np.minimum))
        seen_N = np.all((high_N2 >= 0) & (low_N2 <= self.size * factor), axis=1)
        flat = place_P2.ravel().tolist()
        for start, end, is_seen in zip(starts, ends, seen_N.tolist(), strict=True):
            yield flat[2 * start : 2 * end] if is_seen else []

    def blur(self, mask_HW: Array, sigma_mm: float) -> Array:
        """A mask of 0..1, washed out by `sigma_mm`."""
        return soften(mask_HW, sigma_mm * self.px_per_mm)


def smooth_noise(rng: np.random.Generator, shape_HW: tuple[int, int], cells_HW: tuple[int, int]) -> Array:
    """Unit-variance noise with about one bump a cell, enlarged from a small grid."""
    grid = rng.standard_normal(cells_HW, dtype=np.float32)
    height, width = shape_HW
    enlarged = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    gain = np.float32(1.35)  # interpolation takes variance away
    return np.asarray(enlarged * gain, dtype=np.float32)


def fractal_noise(rng: np.random.Generator, size: int, cells: int, octaves: int) -> Array:
    """Octaves of `smooth_noise`, each half as wide as the last and 0.6 times as strong."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        total += smooth_noise(rng, (size, size), (cells << octave,) * 2) * np.float32(0.6**octave)
    return total


def smooth_step(value: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between; `low` may be the larger one."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def soften(image: Array, sigma_px: float) -> Array:
    """Gaussian blur of 0..1, grey or colour."""
    return from_bytes(Image.fromarray(to_bytes(image)).filter(ImageFilter.GaussianBlur(sigma_px)))


def to_bytes(image: Array) -> Any:
    """0..1 to rounded uint8."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def from_bytes(image: Image.Image) -> Array:
    """8-bit grey or colour to 0..1."""
    return np.asarray(np.asarray(image, dtype=np.float32) / np.float32(255), dtype=np.float32)
