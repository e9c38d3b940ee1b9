"""Encoded image -> uint8 square: crop, decode at the largest DCT scale that is fine enough, resize.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the work, as its blocks are cosine
series. simplejpeg decodes JPEG, PIL all else; `torch.nn.functional.interpolate` (antialiased, on bytes)
resizes: bicubic, and on a black canvas bilinear, as FLAIR has it. `tests/bench/data.py` prints the
measurements behind these choices.

EXIF orientation is ignored, as in every training loader: building shards turns images upright and drops EXIF.

Shapes: H height, W width, C the three colours red, green, blue.
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from fundusfm.recipe.schema import Fit

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Scaled pixels kept per output pixel: at 1.5 the result is 4 dB closer to a full decode than at 1.
MARGIN = 1.5
_DENOMINATORS = (8, 4, 2)
# A header of a few bytes can claim gigapixels; refuse before asking for the memory.
_MAX_PIXELS = 300_000_000


class ImageError(ValueError):
    """Bytes that are no whole, readable image; the text is the cause."""


class Box(NamedTuple):
    """A rectangle in pixels, `left <= x < right`, `top <= y < bottom`."""

    left: float
    top: float
    right: float
    bottom: float


class ScaledCrop(NamedTuple):
    """A crop of the image decoded at 1/`denominator`; the edges are whole pixels of that smaller image."""

    denominator: int
    left: int
    top: int
    right: int
    bottom: int


def image_size(raw: bytes) -> tuple[int, int]:
    """Width and height, read from the header alone; ImageError if there is none."""
    header = _jpeg_header(raw)
    return _open(raw).size if header is None else header


def scaled_crop(box: Box | None, width: int, height: int, size: int, fit: Fit = Fit.squeeze) -> ScaledCrop:
    """The crop that `decode_crop` uses for `box` (None: the whole image) of a JPEG of this width and height.

    The denominator is the largest of 8, 4, 2, 1 that leaves `MARGIN * size` pixels along each side of the
    box that becomes `size` pixels long: both if it is squeezed, the longer one if it is padded. Each edge is
    then rounded to the nearest multiple of the denominator and held inside the image: it moves by at most
    half a scaled pixel, which is a third of an output pixel (at denominator 1, to a whole pixel).
    """
    box = box or Box(0, 0, width, height)
    sides = (box.right - box.left, box.bottom - box.top)
    tightest = max(sides) if fit is Fit.pad else min(sides)
    denominator = next((d for d in _DENOMINATORS if tightest >= d * MARGIN * size), 1)
    left, right = _on_grid(box.left, box.right, denominator, width)
    top, bottom = _on_grid(box.top, box.bottom, denominator, height)
    return ScaledCrop(denominator, left, top, right, bottom)


def decode_crop(
    raw: bytes, box: Box | None, size: int, out_HWC: Bytes | None = None, *, fit: Fit = Fit.squeeze
) -> Bytes:
    """The pixels of `box` (None: the whole image) as a (size, size, 3) square, brought into it as `fit` says.

    `box` is in pixels of the full image and is rounded as `scaled_crop` says. The result is written into
    `out_HWC` where given. ImageError if the bytes are no whole image: a file cut short is never half used.
    A few changed bytes inside a JPEG may pass as other pixels; the digests of the shards are there for that.
    """
    header = _jpeg_header(raw)
    if header is None:
        crop_HWC = _crop_other(raw, box)
    else:
        crop_HWC = _crop_jpeg(raw, scaled_crop(box, *header, size, fit), *header)
    return _resize(crop_HWC, size, fit, out_HWC)


def _jpeg_header(raw: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of any colour space; None for any other image."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:  # not a JPEG, or of a kind that only PIL knows
        return None
    _refuse_huge(width, height)
    return width, height


def _refuse_huge(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than the {_MAX_PIXELS} that are read")


def _crop_jpeg(raw: bytes, crop: ScaledCrop, width: int, height: int) -> Bytes:
    scaled_width, scaled_height = -(-width // crop.denominator), -(-height // crop.denominator)
    try:
        image_HWC = simplejpeg.decode_jpeg(raw, min_width=scaled_width, min_height=scaled_height)
    except ValueError as error:
        raise ImageError(f"damaged JPEG: {error}") from error
    assert image_HWC.shape == (scaled_height, scaled_width, 3)
    pixels: Bytes = image_HWC[crop.top : crop.bottom, crop.left : crop.right]
    return pixels


def _crop_other(raw: bytes, box: Box | None) -> Bytes:
    """The crop at full scale, by PIL."""
    image = _open(raw)
    width, height = image.size
    (left, right), (top, bottom) = (0, width), (0, height)
    if box is not None:
        left, right = _on_grid(box.left, box.right, 1, width)
        top, bottom = _on_grid(box.top, box.bottom, 1, height)
    try:
        return _rgb(image.crop((left, top, right, bottom)))
    except Exception as error:  # PIL's plugins raise anything at all on damaged bytes
        raise ImageError(f"damaged {image.format} image: {error}") from error


def _open(raw: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known format") from error
    except Exception as error:  # PIL's plugins raise anything at all on damaged bytes
        raise ImageError(f"damaged image: {error}") from error
    _refuse_huge(*image.size)
    return image


def _rgb(image: Image.Image) -> Bytes:
    """Bytes of an image of any mode; PIL itself would cut 16-bit grey at 255 and so turn it white."""
    if image.mode.startswith("I"):
        high_byte_HW = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(high_byte_HW[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _on_grid(low: float, high: float, denominator: int, length: int) -> tuple[int, int]:
    """Both edges in scaled pixels: rounded half up, inside the image, at least one pixel apart."""
    scaled_length = -(-length // denominator)
    start = min(max(math.floor(low / denominator + 0.5), 0), scaled_length - 1)
    stop = min(max(math.floor(high / denominator + 0.5), start + 1), scaled_length)
    return start, stop


def _resize(image_HWC: Bytes, size: int, fit: Fit, out_HWC: Bytes | None) -> Bytes:
    height, width, mode = size, size, "bicubic"
    if fit is Fit.pad:
        longer = max(image_HWC.shape[:2])
        height, width = (max(1, side * size // longer) for side in image_HWC.shape[:2])
        mode = "bilinear"
    if image_HWC.shape[:2] != (height, width):
        # The batch axis comes before the permutation: with its true stride torch sees channels-last, which is
        # the fast kernel and gives the result in the same layout.
        image_1CHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
        resized_1CHW = F.interpolate(image_1CHW, (height, width), mode=mode, antialias=True)
        image_HWC = resized_1CHW[0].permute(1, 2, 0).numpy()
    if out_HWC is None and height == width:
        return np.ascontiguousarray(image_HWC)
    out_HWC = np.empty((size, size, 3), dtype=np.uint8) if out_HWC is None else out_HWC
    out_HWC[:height, :width] = image_HWC
    out_HWC[height:], out_HWC[:height, width:] = 0, 0
    return out_HWC
