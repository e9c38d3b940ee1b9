"""Decoding: as good as a full decode by PIL, the same geometry, and no damaged file passes."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fundusfm.stream.decode import MARGIN, Box, ImageError, decode_crop, image_size, scaled_crop
from fundusfm.stream.transforms import DeviceTail
from tests.stream.pictures import encoded, photograph

GOLDEN = Path(__file__).parents[1] / "goldens" / "ret_clip" / "preprocess.npz"
PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "eye4" / "images"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def reference(raw: bytes, box: Box | None, size: int) -> np.ndarray:
    """Full decode, crop and antialiased bicubic resize by PIL; `box` is in whole pixels."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    left, top, right, bottom = box or (0, 0, *image.size)
    crop = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def full_box(raw: bytes, box: Box | None, size: int) -> Box:
    """The box after rounding, in pixels of the full image."""
    crop = scaled_crop(box, *image_size(raw), size)
    return Box(*(float(edge * crop.denominator) for edge in crop[1:]))


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("width", "height", "denominator"), [(2048, 1536, 4), (3600, 3000, 8), (800, 720, 2)]
)
def test_decode_crop__as_good_as_a_full_decode(
    width: int, height: int, denominator: int, subsampling: int
) -> None:
    raw = encoded(photograph(width, height), quality=90, subsampling=subsampling)
    found = []
    for share in (0.0, 0.011, 0.023):
        box = Box(width * share, height * share / 2, width * (0.97 + share), height * (0.955 + share))
        assert scaled_crop(box, width, height, 224).denominator == denominator
        found.append(psnr(decode_crop(raw, box, 224), reference(raw, full_box(raw, box, 224), 224)))
    assert np.mean(found) >= 47


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of ../shared/data/eye4 are not here")
def test_decode_crop__real_photographs() -> None:
    names = sorted(PHOTOGRAPHS.rglob("*.*"))[::40]
    found = []
    for name in names:
        raw = name.read_bytes()
        found.append(psnr(decode_crop(raw, None, 64), reference(raw, full_box(raw, None, 64), 64)))
    assert len(found) > 50
    assert np.mean(found) >= 47


def test_decode_crop__full_scale_equals_pil() -> None:
    raw = encoded(photograph(300, 280), "PNG")
    box = Box(20, 10, 290, 271)
    difference = decode_crop(raw, box, 224).astype(int) - reference(raw, box, 224)
    assert np.abs(difference).max() <= 1


def test_decode_crop__same_size_changes_nothing() -> None:
    picture = photograph(100, 100)
    assert np.array_equal(decode_crop(encoded(picture, "PNG"), None, 100), np.asarray(picture))
    assert np.array_equal(
        decode_crop(encoded(picture, "PNG"), Box(10, 20, 60, 70), 50), np.asarray(picture)[20:70, 10:60]
    )


def test_decode_crop__writes_into_a_slab() -> None:
    raw = encoded(photograph(300, 200))
    slab = np.zeros((3, 64, 64, 3), dtype=np.uint8)
    returned = decode_crop(raw, None, 64, out_HWC=slab[1])
    assert np.shares_memory(returned, slab)
    assert np.array_equal(slab[1], decode_crop(raw, None, 64))
    assert not slab[0].any() and not slab[2].any()


@pytest.mark.parametrize("size", [32, 96])
def test_decode_crop__golden_of_ret_clip(size: int) -> None:
    golden = np.load(GOLDEN)
    raw = encoded(Image.fromarray(golden["in_image_uint8"]), "PNG")
    image_NCHW = torch.from_numpy(decode_crop(raw, None, size))[None].permute(0, 3, 1, 2)
    normalised = DeviceTail(CLIP_MEAN, CLIP_STD).normalise(image_NCHW)[0]
    assert np.allclose(normalised.numpy(), golden[f"pretrain_val_{size}"], atol=0.02)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    edges=st.tuples(*[st.floats(0, 1)] * 4),
    size=st.sampled_from([32, 224, 512]),
)
def test_scaled_crop__near_the_box_and_inside(
    width: int, height: int, edges: tuple[float, float, float, float], size: int
) -> None:
    left, right = sorted((edges[0] * width, edges[1] * width))
    top, bottom = sorted((edges[2] * height, edges[3] * height))
    crop = scaled_crop(Box(left, top, right, bottom), width, height, size)
    unit = crop.denominator
    assert 0 <= crop.left < crop.right <= -(-width // unit)
    assert 0 <= crop.top < crop.bottom <= -(-height // unit)
    if unit > 1:
        assert min(right - left, bottom - top) >= unit * MARGIN * size
    if right - left >= 1 and bottom - top >= 1:
        moved = np.abs(np.array(crop[1:]) * unit - np.array([left, top, right, bottom]))
        assert moved.max() <= max(unit / 2, 1)


@pytest.mark.parametrize("cut", [0.0, 0.001, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_decode_crop__truncated(kind: str, cut: float) -> None:
    raw = encoded(photograph(200, 160), kind)
    with pytest.raises(ImageError):
        decode_crop(raw[: int(len(raw) * cut)], None, 64)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [16, 64, 224])
def test_decode_crop__truncated_jpeg_at_any_scale(size: int, progressive: bool) -> None:
    raw = encoded(photograph(800, 700), progressive=progressive)
    for lost in (2, 100, len(raw) // 2):
        with pytest.raises(ImageError):
            decode_crop(raw[:-lost], None, size)


def test_decode_crop__hole_in_the_middle() -> None:
    raw = encoded(photograph(400, 300))
    with pytest.raises(ImageError, match="damaged JPEG"):
        decode_crop(raw[: len(raw) // 2] + raw[len(raw) * 2 // 3 :], None, 64)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_decode_crop__random_damage_is_an_image_error_or_pixels(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))
    raw = bytearray(encoded(photograph(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_crop(bytes(raw), None, 16)
    except ImageError:
        return
    assert pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8", b"no image at all" * 50])
def test_image_size__not_an_image(raw: bytes) -> None:
    with pytest.raises(ImageError):
        image_size(raw)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_decode_crop__modes_of_png(mode: str) -> None:
    raw = encoded(photograph(120, 90).convert(mode), "PNG")
    assert image_size(raw) == (120, 90)
    expected = Image.open(io.BytesIO(raw)).convert("RGB").crop((10, 20, 80, 90))
    assert np.array_equal(decode_crop(raw, Box(10, 20, 80, 90), 70), np.asarray(expected))


def test_decode_crop__sixteen_bit_png() -> None:
    grey = np.asarray(photograph(64, 64).convert("L")).astype(np.uint16) * 257
    raw = encoded(Image.fromarray(grey), "PNG")
    assert np.array_equal(decode_crop(raw, None, 64), np.repeat((grey >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_decode_crop__modes_of_jpeg(mode: str) -> None:
    raw = encoded(photograph(640, 480).convert(mode), quality=95)
    assert image_size(raw) == (640, 480)
    assert np.abs(decode_crop(raw, None, 400).astype(int) - reference(raw, None, 400)).max() <= 2


def test_decode_crop__animation_gives_its_first_frame() -> None:
    frames = [photograph(80, 60, seed).quantize(64) for seed in range(3)]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(decode_crop(raw, None, 32).astype(int) - reference(raw, None, 32)).max() <= 1


def test_decode_crop__refuses_gigapixels() -> None:
    raw = bytearray(encoded(photograph(64, 64), "PNG"))
    raw[16:24] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(ImageError):
        decode_crop(bytes(raw), None, 64)
    raw = bytearray(encoded(photograph(64, 64)))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="60000 x 60000"):
        decode_crop(bytes(raw), None, 64)


def test_golden__eyeclip_preprocessing() -> None:
    """Bicubic to the shorter side, then the centre, there; the box of that centre cut first, here.

    Inside the two are one; at cut edges a filter there looks at pixels that are cut away here.
    """
    with np.load(GOLDEN.parents[1] / "eyeclip" / "preprocess.npz") as golden:
        # Levels are rounded once here, twice there; the second image would be cut at half a pixel.
        for number, most in enumerate((2, 24, 2)):
            image_HWC, wanted_CHW = golden[f"img{number}_u8"], golden[f"out{number}"]
            height, width = image_HWC.shape[:2]
            side = min(height, width)
            left, top = (width - side) / 2, (height - side) / 2
            box = Box(left, top, left + side, top + side)
            raw = encoded(Image.fromarray(image_HWC), "PNG")
            pixels_1CHW = torch.from_numpy(decode_crop(raw, box, 32)).permute(2, 0, 1)[None]
            found_CHW = DeviceTail(CLIP_MEAN, CLIP_STD).normalise(pixels_1CHW)[0].numpy()
            error_CHW = (
                np.abs(found_CHW - wanted_CHW)[:, 3:-3, 3:-3] if height != width else found_CHW - wanted_CHW
            )
            assert np.abs(error_CHW).max() * 255 * min(CLIP_STD) < most
