"""The field of view of a fundus photograph: the bright disc inside the black frame.

Axes: H, W height and width; C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_THUMBNAIL_PX = 256  # the box is found on a copy of about this size: exact to a pixel of it, blind to noise
_RISE = 0.12  # how far above the surround, as a share of the way to the bright level, the field begins
_LINE_SHARE = 0.04  # a row or column belongs to the field if this share of it is bright
_MIN_SHARE = 0.1  # a smaller box is no field of view but a lamp, a label or noise


def field_of_view(image: Image.Image) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the field; the whole frame where no disc in a dark surround is found."""
    width, height = image.size
    whole = (0, 0, width, height)
    bright_HW = _brightness(image)
    surround, level = _corner_level(bright_HW), float(np.percentile(bright_HW[::4, ::4], 95))
    if level - surround < 16:
        return whole
    inside_HW = bright_HW > surround + _RISE * (level - surround)
    columns = _longest_run(inside_HW.mean(axis=0) > _LINE_SHARE)
    rows = _longest_run(inside_HW[:, slice(*columns)].sum(axis=1) > _LINE_SHARE * inside_HW.shape[1])
    share = (rows[1] - rows[0]) * (columns[1] - columns[0]) / inside_HW.size
    if share < _MIN_SHARE:
        return whole
    small_height, small_width = bright_HW.shape
    left, right = (round(x * width / small_width) for x in columns)
    top, bottom = (round(y * height / small_height) for y in rows)
    return left, top, right, bottom


def _brightness(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The brightest channel of a small copy: the retina is red, and a dim one shows in red alone."""
    pixels = np.asarray(image.reduce(max(1, max(image.size) // _THUMBNAIL_PX)))
    return (
        pixels if pixels.ndim == 2 else np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    )


def _corner_level(bright_HW: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Brightness of the surround: the third darkest corner, so that one label in a corner does not count."""
    side = max(1, min(bright_HW.shape) // 24)
    corners = [
        bright_HW[y, x] for y in (slice(side), slice(-side, None)) for x in (slice(side), slice(-side, None))
    ]
    return float(sorted(np.median(corner) for corner in corners)[2])


def _longest_run(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, int]:
    """[start, end) of the longest run of True; (0, 0) without any."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    if not edges.size:
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    return int(starts[longest]), int(ends[longest])
