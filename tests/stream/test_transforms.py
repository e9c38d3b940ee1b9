"""Augmentation: as torchvision for the same parameters; the same draws for the same generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2 import functional as tv

from fundusfm.recipe.schema import AugmentConfig, Mirror
from fundusfm.stream.decode import Box, ImageError, decode_crop
from fundusfm.stream.transforms import (
    DeviceTail,
    augment_on_host,
    color_matrix,
    draw_augment,
    sample_augment,
)
from tests.stream.pictures import encoded, photograph

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LOUD = AugmentConfig(crop_scale=(0.3, 1.0), erase_probability=1.0, mirror=Mirror.per_eye)
PINNED_BOX = Box(80, 23, 415, 307)
PINNED_COLOR = [1.3283921, -0.044244695, -0.10285372]


def batch(num_images: int = 4, size: int = 32, low: int = 0, high: int = 256) -> torch.Tensor:
    """Random bytes (N, C, H, W) in the channels-last layout that the host makes."""
    rng = np.random.default_rng(0)
    image_NHWC = rng.integers(low, high, (num_images, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(image_NHWC).permute(0, 3, 1, 2)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def colors(*factors: tuple[float, float, float]) -> torch.Tensor:
    return torch.from_numpy(np.stack([color_matrix(*f) for f in factors]))


def test_normalise__equals_torchvision_bit_for_bit() -> None:
    image_NCHW = batch()
    scaled_NCHW = torch.stack([to_tensor(image.permute(1, 2, 0).numpy()) for image in image_NCHW])
    expected = tv.normalize(scaled_NCHW, list(MEAN), list(STD))
    found = DeviceTail(MEAN, STD).normalise(image_NCHW)
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_normalise__leaves_its_input_alone() -> None:
    image_NCHW = batch()
    before = image_NCHW.clone()
    DeviceTail(MEAN, STD).normalise(image_NCHW.contiguous(), colors(*[(1.2, 0.8, 1.1)] * 4))
    assert torch.equal(image_NCHW, before)


def test_normalise__dtype_is_a_last_rounding() -> None:
    tail, color_N34 = DeviceTail(MEAN, STD), colors(*[(1.2, 0.8, 1.1)] * 4)
    whole = tail.normalise(batch(), color_N34)
    half = tail.normalise(batch(), color_N34, dtype=torch.bfloat16)
    assert torch.equal(half, whole.to(torch.bfloat16))


def test_normalise__not_rounded_under_autocast() -> None:
    tail, color_N34 = DeviceTail(MEAN, STD), colors(*[(1.2, 0.8, 1.1)] * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tail.normalise(batch(), color_N34)
    assert torch.equal(found, tail.normalise(batch(), color_N34))


def in_order(
    image_NCHW: torch.Tensor, factors: tuple[float, float, float], order: tuple[int, ...]
) -> torch.Tensor:
    """torchvision's three adjustments, one after the other, in 0..1 floats."""
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    image = tv.to_dtype(image_NCHW, torch.float32, scale=True)
    for step in order:
        image = steps[step](image, factors[step])
    return image


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("factors", [(1.2, 0.8, 1.2), (0.8, 1.2, 0.8), (1.1, 1.1, 0.9)])
def test_color__equals_torchvision_in_every_order(
    factors: tuple[float, float, float], order: tuple[int, ...]
) -> None:
    image_NCHW = batch(low=70, high=150)  # nothing is cut off on the way
    expected = tv.normalize(in_order(image_NCHW, factors, order), list(MEAN), list(STD))
    found = DeviceTail(MEAN, STD).normalise(image_NCHW, colors(*[factors] * 4))
    # A thousandth of the range of a byte: torchvision's grey weights sum to 0.9999.
    assert torch.allclose(found, expected, atol=0.001 / min(STD))


def test_color__clipping_differs_from_torchvision_by_little() -> None:
    picture = torch.from_numpy(np.asarray(photograph(256, 256)).copy()).permute(2, 0, 1)[None]
    for factors in ((1.2, 1.2, 1.2), (0.8, 0.8, 0.8), (1.2, 0.8, 1.2)):
        expected = in_order(picture, factors, (0, 1, 2))
        found = DeviceTail((0.0,) * 3, (1.0,) * 3).normalise(picture, colors(factors))
        assert (found - expected).abs().mean() < 0.002
        assert found.min() >= 0.0
        assert found.max() <= 1.0


def test_color__each_image_has_its_own() -> None:
    image_NCHW, factors = batch(2), ((1.2, 0.8, 1.2), (0.8, 1.1, 1.0))
    tail = DeviceTail(MEAN, STD)
    together = tail.normalise(image_NCHW, colors(*factors))
    for n in range(2):
        assert torch.equal(together[n], tail.normalise(image_NCHW[n : n + 1], colors(factors[n]))[0])


def test_color__neutral_factors_change_nothing() -> None:
    tail = DeviceTail(MEAN, STD)
    found = tail.normalise(batch(), colors(*[(1.0, 1.0, 1.0)] * 4))
    assert torch.allclose(found, tail.normalise(batch()), atol=1e-6)


def test_erase__only_the_box_becomes_the_mean_colour() -> None:
    image_NCHW = batch(2, size=40)
    tail = DeviceTail(MEAN, STD)
    erase_N4 = torch.tensor([[0.25, 0.5, 0.75, 0.6], [0.0, 0.0, 0.0, 0.0]])
    expected = tail.normalise(image_NCHW)
    expected[0] = tv.erase(expected[0], i=20, j=10, h=4, w=20, v=torch.zeros(3, 1, 1))
    assert torch.equal(tail.normalise(image_NCHW, None, erase_N4), expected)


def test_augment_on_host__crop_then_mirror() -> None:
    raw = encoded(photograph(300, 260))
    augment = draw_augment(generator(3), 300, 260, LOUD)
    plain = decode_crop(raw, augment.box, 64)
    slab = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    assert np.array_equal(augment_on_host(raw, replace(augment, mirror=False), 64), plain)
    augment_on_host(raw, replace(augment, mirror=True), 64, out_HWC=slab[1])
    assert np.array_equal(slab[1], plain[:, ::-1])
    assert not slab[0].any()


def test_augment_on_host__none_is_the_whole_image() -> None:
    raw = encoded(photograph(300, 260))
    assert np.array_equal(augment_on_host(raw, None, 64), decode_crop(raw, None, 64))


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    seed=st.integers(0, 2**32),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 1), st.floats(1, 5)),
)
def test_draw_augment__boxes_are_inside(
    width: int, height: int, seed: int, scale: list[float], ratio: tuple[float, float]
) -> None:
    config = replace(LOUD, crop_scale=(scale[0], scale[1]), crop_ratio=ratio)
    augment = draw_augment(generator(seed), width, height, config)
    assert 0 <= augment.box.left < augment.box.right <= width
    assert 0 <= augment.box.top < augment.box.bottom <= height
    left, top, right, bottom = augment.erase_4
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    assert 0.02 - 1e-6 <= (right - left) * (bottom - top) <= 1 / 3 + 1e-6


def test_draw_augment__same_generator_same_draws() -> None:
    one, other = (draw_augment(generator(7), 500, 400, LOUD) for _ in range(2))
    assert (one.box, one.mirror) == (other.box, other.mirror)
    assert np.array_equal(one.color_34, other.color_34)
    assert np.array_equal(one.erase_4, other.erase_4)
    assert one.box != draw_augment(generator(8), 500, 400, LOUD).box


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (1.0, 1.0)},
        {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
        {"erase_probability": 0.0},
        {"mirror": Mirror.never},
    ],
)
def test_draw_augment__one_option_leaves_the_other_draws_alone(change: dict[str, object]) -> None:
    rngs = generator(7), generator(7)
    one, other = (
        draw_augment(r, 500, 400, c) for r, c in zip(rngs, (LOUD, replace(LOUD, **change)), strict=True)
    )
    assert rngs[0].random() == rngs[1].random()
    same = {
        "crop_scale": one.box == other.box,
        "brightness": np.array_equal(one.color_34, other.color_34),
        "erase_probability": np.array_equal(one.erase_4, other.erase_4),
    }
    for name, is_same in same.items():
        assert is_same == (name not in change)


def test_draw_augment__stream_is_pinned() -> None:
    """A change here changes every run that resumes: it must be meant, and stand in the changelog."""
    augment = draw_augment(generator(0), 640, 480, LOUD)
    assert augment.box == PINNED_BOX
    assert augment.color_34.ravel()[[0, 1, 3]].tolist() == pytest.approx(PINNED_COLOR, rel=1e-6)


def test_draw_augment__frequencies() -> None:
    config = replace(LOUD, erase_probability=0.1)
    drawn = [draw_augment(generator(seed), 640, 480, config) for seed in range(2000)]
    assert np.mean([a.mirror for a in drawn]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([a.erase_4.any() for a in drawn]) == pytest.approx(0.1, abs=0.03)
    assert not any(
        draw_augment(generator(s), 9, 9, replace(config, mirror=Mirror.never)).mirror for s in range(50)
    )


def test_draw_augment__crops_are_spread_as_torchvisions() -> None:
    config = replace(LOUD, crop_scale=(0.4, 0.9))
    ours = [draw_augment(generator(seed), 640, 480, config).box for seed in range(3000)]
    torch.manual_seed(0)
    picture = torch.zeros(1, 480, 640)
    drawer = v2.RandomResizedCrop(8, scale=config.crop_scale, ratio=config.crop_ratio)
    theirs = [drawer.make_params([picture]) for _ in range(3000)]
    other = [Box(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in theirs]
    for box_of in (np.mean, np.std):
        assert np.allclose(box_of(np.array(ours), axis=0), box_of(np.array(other), axis=0), atol=8)


@pytest.mark.parametrize(("width", "height"), [(4000, 100), (100, 4000)])
def test_draw_augment__no_crop_fits(width: int, height: int) -> None:
    box = draw_augment(generator(0), width, height, AugmentConfig()).box
    shape = (box.right - box.left, box.bottom - box.top)
    assert shape == ((133, 100) if width > height else (100, 133))
    assert abs((box.left + box.right) - width) <= 1 and abs((box.top + box.bottom) - height) <= 1


def test_sample_augment__takes_the_size_from_the_header() -> None:
    raw = encoded(photograph(300, 260))
    assert sample_augment(generator(1), raw, LOUD).box == draw_augment(generator(1), 300, 260, LOUD).box
    with pytest.raises(ImageError):
        sample_augment(generator(1), b"no image", LOUD)
