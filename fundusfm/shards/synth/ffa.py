"""Fluorescein angiograms: bright vessels on grey, blood that blocks, dots that shine, leaks that blur.

Shape letters: H rows, W columns.
"""

from __future__ import annotations

import numpy as np

from fundusfm.shards.synth.anatomy import Anatomy
from fundusfm.shards.synth.camera import encode
from fundusfm.shards.synth.findings import DRUSEN, FLUID, HAEMORRHAGES, HAZE, MICROANEURYSMS, EyeTruth
from fundusfm.shards.synth.lesions import Lesions
from fundusfm.shards.synth.vessels import Vessels
from fundusfm.shards.synth.view import Array, View, fractal_noise, smooth_step, soften

_LEAK_EVERY = 3  # one microaneurysm or haemorrhage in so many leaks
_HAZE_SHARE = (0.2, 0.38, 0.55)


def paint_angiogram(
    rng: np.random.Generator,
    truth: EyeTruth,
    anatomy: Anatomy,
    vessels: tuple[Vessels, Vessels],
    lesions: dict[str, Lesions],
    view: View,
) -> bytes:
    """The JPEG of a late arteriovenous phase of the eye in the photograph."""
    image = _background(rng, anatomy, view)
    artery, vein = (view.mask(v.outlines()) for v in vessels)
    filled = np.maximum(artery * np.float32(0.9), vein)
    image = image + filled * (np.float32(rng.uniform(0.8, 0.98)) - image) * np.float32(0.9)
    image = _leaks(rng, image, truth, lesions, view)
    image = _dots_and_shadows(image, lesions, view)
    fall = 1 - np.float32(rng.uniform(0.25, 0.45)) * view.field_distance**2.5
    image = image * fall
    haze = truth.find(HAZE)
    blur_mm = 0.015
    if haze is not None:
        share = np.float32(_HAZE_SHARE[haze.severity])
        image, blur_mm = image * (1 - share) + np.float32(0.3) * share, 0.02 + 0.06 * float(share)
    grain = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.015, 0.035))
    noisy = soften(image, blur_mm * view.px_per_mm) + grain
    return encode(noisy * smooth_step(view.field_distance, 1.0, 1 - 2.4 / view.radius_px))


def _background(rng: np.random.Generator, anatomy: Anatomy, view: View) -> Array:
    """Choroidal flush, dark at the macula where pigment and empty retina block it, bright on the disc."""
    x, y = view.grid_mm
    flush = 0.25 * (1 + 0.08 * fractal_noise(rng, view.size, 5, 4))
    radius2 = x * x + y * y
    flush = flush * (1 - 0.5 * np.exp(-radius2 / (2 * 1.1**2)) - 0.25 * np.exp(-radius2 / (2 * 0.3**2)))
    across = (x - np.float32(anatomy.disc_x_mm)) / np.float32(anatomy.disc_width_mm / 2)
    down = (y - np.float32(anatomy.disc_y_mm)) / np.float32(anatomy.disc_height_mm / 2)
    disc = np.hypot(across, down)
    rim = smooth_step(disc, 1.1, 0.9) * (
        1 - 0.6 * smooth_step(disc, anatomy.cup_ratio + 0.1, anatomy.cup_ratio - 0.1)
    )
    return (flush + 0.22 * rim).astype(np.float32)


def _leaks(
    rng: np.random.Generator, image: Array, truth: EyeTruth, lesions: dict[str, Lesions], view: View
) -> Array:
    """Fuzzy bright clouds around some vascular lesions, and petals around the fovea where there is fluid."""
    x, y = view.grid_mm
    glow = np.zeros_like(image)
    for name in (MICROANEURYSMS, HAEMORRHAGES):
        centres = lesions[name].centre_L2[::_LEAK_EVERY] if name in lesions else []
        for centre in centres:
            spread = np.float32(rng.uniform(0.12, 0.4))
            near = (x - np.float32(centre[0])) ** 2 + (y - np.float32(centre[1])) ** 2
            glow += np.exp(-near / (2 * spread**2)) * np.float32(rng.uniform(0.1, 0.4))
    fluid = truth.find(FLUID)
    if fluid is not None:
        radius, angle = np.hypot(x, y), np.arctan2(y, x)
        petals = 0.6 + 0.4 * np.cos(angle * 7)
        glow += (
            np.exp(-((radius - 0.6) ** 2) / (2 * 0.3**2)) * petals * np.float32(0.2 + 0.1 * fluid.severity)
        )
    return np.asarray(image + np.minimum(glow, 0.8) * (0.95 - image), dtype=np.float32)


def _dots_and_shadows(image: Array, lesions: dict[str, Lesions], view: View) -> Array:
    if DRUSEN in lesions:
        image = image + 0.14 * view.blur(_mask(view, lesions[DRUSEN]), 0.04)
    if HAEMORRHAGES in lesions:
        image = image * (1 - 0.8 * _mask(view, lesions[HAEMORRHAGES]))
    if MICROANEURYSMS in lesions:
        image = image + (0.95 - image) * _mask(view, lesions[MICROANEURYSMS])
    return image


def _mask(view: View, lesions: Lesions) -> Array:
    return view.mask(lesions.outlines, lesions.density_L.tolist())
