"""Pictures for the tests of decoding: procedural photographs of camera size, and their encoding."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw


def photograph(width: int, height: int, seed: int = 0, noise: float = 3.0) -> Image.Image:
    """A retina-like picture: smooth shading, branching dark lines, texture at all scales, sensor noise."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    canvas += np.asarray([150.0, 75.0, 40.0], dtype=np.float32)
    for cells, strength in ((4, 40.0), (16, 16.0), (64, 8.0), (256, 4.0)):
        coarse = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
        canvas += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    vessels = Image.new("L", (width, height))
    draw = ImageDraw.Draw(vessels)
    for _ in range(25):
        steps = rng.normal(0, 1, (40, 2)).cumsum(axis=0) * min(width, height) / 40
        points = [tuple(p) for p in steps + rng.random(2) * (width, height)]
        draw.line(points, fill=90, width=max(1, int(rng.integers(1, 10) * width / 2048)))
    canvas -= np.asarray(vessels, dtype=np.float32)[..., None] * [0.5, 0.7, 0.3]
    canvas += rng.normal(0, noise, (height, width, 3))
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
