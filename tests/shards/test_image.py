from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fundusfm.shards.image import MAX_PIXELS, ImageError, decode_image, encode_jpeg
from tests.shards.conftest import draw_fundus


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def bare_png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 8) + b"IDAT" + bytes(12)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"patient,eye\n1,left\n" * 50, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (encoded(draw_fundus(0), "JPEG")[:900], "truncated"),
        (encoded(draw_fundus(0), "PNG")[:900], "truncated"),
        (bare_png_header(40_000, 20_000), f"more than {MAX_PIXELS // 10**6} megapixels"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "postscript", "torn JPEG", "torn PNG", "too many pixels", "float"],
)
def test_unusable_bytes_are_refused_with_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(raw)


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused(fmt: str) -> None:
    frames = [draw_fundus(seed) for seed in range(3)]
    raw = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="several frames"):
        decode_image(raw)


def test_one_frame_gif_is_an_image() -> None:
    assert decode_image(encoded(draw_fundus(0), "GIF")).size == (72, 64)


def test_16_bit_grey_is_scaled_to_8_bits() -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode_image(encoded(Image.fromarray(values), "PNG"))
    assert image.mode == "L"
    np.testing.assert_allclose(np.asarray(image), values / 257, atol=0.51)


def test_12_bit_grey_in_a_16_bit_file_is_not_black() -> None:
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG")))
    np.testing.assert_allclose(pixels, values / 4095 * 255, atol=0.51)


def test_cmyk_jpeg_becomes_rgb() -> None:
    original = draw_fundus(0)
    image = decode_image(encoded(original.convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(original)).mean() < 12


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "L", "YCbCr"])
def test_other_modes_become_rgb_or_grey(mode: str) -> None:
    fmt = "TIFF" if mode == "YCbCr" else "PNG"
    image = decode_image(encoded(draw_fundus(0).convert(mode), fmt))
    assert image.mode in ("RGB", "L")
    assert image.getbbox() is not None


def test_transparent_parts_become_black() -> None:
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.putpixel((3, 3), (10, 200, 30, 255))
    pixels = np.asarray(decode_image(encoded(layer, "PNG")))
    assert pixels.sum() == 240
    assert tuple(pixels[3, 3]) == (10, 200, 30)


def test_exif_orientation_is_applied_and_metadata_dropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    exif[0x010E] = "name of the patient"
    raw = encoded(draw_fundus(0, (90, 60)), "JPEG", exif=exif, comment=b"name of the patient")
    written = encode_jpeg(decode_image(raw, size=32))
    assert b"patient" in raw
    assert b"patient" not in written
    assert Image.open(io.BytesIO(written)).size == (32, 48)
    assert not Image.open(io.BytesIO(written)).getexif()


def test_colour_profile_and_text_of_a_png_are_dropped() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Description", "name of the patient")
    raw = encoded(draw_fundus(0), "PNG", pnginfo=info, icc_profile=b"name of the patient")
    assert b"patient" not in encode_jpeg(decode_image(raw))


def test_100_megapixel_jpeg_is_read() -> None:
    raw = encoded(Image.new("RGB", (12_000, 8_400), (200, 90, 40)), "JPEG")
    image = decode_image(raw, size=256)
    assert image.size == (366, 256)
    assert np.abs(np.asarray(image, dtype=int).mean((0, 1)) - (200, 90, 40)).max() < 3


def test_small_image_is_not_enlarged() -> None:
    assert decode_image(encoded(draw_fundus(0), "PNG"), size=512).size == (72, 64)


def test_resize_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    pixels = np.asarray(decode_image(encoded(Image.fromarray(stripes), "PNG"), size=32))
    assert np.abs(pixels.astype(int) - 127).max() <= 6


def test_jpeg_keeps_full_colour_resolution() -> None:
    written = encode_jpeg(draw_fundus(0))
    assert {sampling[1:3] for sampling in Image.open(io.BytesIO(written)).layer} == {(1, 1)}


def test_damaged_exif_does_not_cost_the_photograph() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(draw_fundus(0, (90, 60)), "JPEG", exif=exif)
    broken = raw.replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0*"[:-4] + b"\xff\xff\xff\xff")
    assert broken != raw
    assert decode_image(broken).size == (90, 60)
