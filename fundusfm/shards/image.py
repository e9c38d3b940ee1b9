"""Any image file to a plain 8-bit RGB or grey picture of training size; all else of the file is dropped."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from fundusfm.shards.fov import field_of_view

MAX_PIXELS = 400_000_000
JPEG_QUALITY = 92
# Named one by one: Pillow would hand PostScript to an interpreter and open formats nobody photographs in.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
_MAX_JPEG_SIDE = 65_500
_DRAFT_MARGIN = (
    2  # a JPEG is decoded at no less than twice the wanted size, so the resize still has pixels to average
)
_CROP_MARGIN = 4  # and four times if it is to be cropped
CROPS = ("none", "fov")


class ImageError(ValueError):
    """An image that cannot be used; the text is the reason, in a form that can be counted."""


def decode_image(raw: bytes, *, size: int | None = None, crop: str = "none") -> Image.Image:
    """An upright 8-bit picture of mode `RGB` or `L`; ImageError with the reason if there is none in `raw`.

    `size`: length of the short side after the (antialiased) resize; a smaller image stays as it is.
    `crop`: `fov` cuts to the field of view first.
    """
    if not raw:
        raise ImageError("the file is empty (0 bytes)")
    draft = size * (_CROP_MARGIN if crop == "fov" else _DRAFT_MARGIN) if size else None
    image = _to_8_bit(_open(raw, draft))
    if crop == "fov":
        image = image.crop(field_of_view(image))
    return _shrink(image, size) if size else image


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG without subsampling of colour (vessels and haemorrhages are thin and red) and without metadata."""
    if max(image.size) > _MAX_JPEG_SIDE:
        raise ImageError(f"a side of the image is longer than {_MAX_JPEG_SIDE} pixels")
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _open(raw: bytes, draft: int | None) -> Image.Image:
    """The one frame, upright, fully decoded; a JPEG at a reduced scale, its short side at least `draft`."""
    try:
        with _own_pixel_limit():
            image = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Exception as error:  # a damaged header can raise about anything
        raise ImageError("the file is not an image") from error
    _refuse(image)
    try:
        if draft and image.format in ("JPEG", "MPO"):
            scale = draft / min(image.size)
            image.draft(None, (round(image.width * scale), round(image.height * scale)))
        image.load()
    except Exception as error:  # as above, for the pixels
        reason = "the image is truncated" if "truncated" in str(error) else "the image is damaged"
        raise ImageError(reason) from error
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; a damaged EXIF block is no reason to lose a good photograph."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # its parser raises about anything
        return image


def _refuse(image: Image.Image) -> None:
    """ImageError for what must not even be decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"the image has more than {MAX_PIXELS // 1_000_000} megapixels")
    try:
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # counting frames reads the file to its end
        raise ImageError("the image is damaged") from error
    if num_frames > 1:
        raise ImageError(f"the file holds several frames ({image.format})")


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Pillow's limit (179 megapixels) lifted for opening a header: `_refuse` applies ours."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_8_bit(image: Image.Image) -> Image.Image:
    """`RGB` or `L`; what is transparent becomes black, as the surround of a fundus photograph is."""
    if image.mode in ("RGB", "L"):
        return _plain(image)
    if image.mode.startswith("I"):
        return _deep_to_8_bit(image)
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels")
    if image.mode == "1":
        return _plain(image.convert("L"))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
        return _plain(
            Image.alpha_composite(black, layer).convert("L" if image.mode in ("LA", "La") else "RGB")
        )
    return _plain(image.convert("RGB"))


def _plain(image: Image.Image) -> Image.Image:
    """The same pixels without EXIF, colour profile, comments or palette."""
    image.info = {}
    return image


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; values that all fit into 12 are taken for a 12-bit sensor's."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError("the image has more than 16 bits a channel")
    top = 0xFFF if values.max() <= 0xFFF else 0xFFFF
    return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))


def _shrink(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, aspect kept, antialiased; never enlarged."""
    short = min(image.size)
    if short <= size:
        return image
    width, height = (max(1, round(side * size / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
