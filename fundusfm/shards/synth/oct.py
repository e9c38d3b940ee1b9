"""OCT B-scans through the fovea: layers, foveal pit, choroid, vessel shadows, drusen, fluid and speckle.

Shape letters: H rows (depth), W columns. Depth runs downwards in micrometres, x in mm from fovea to nose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fundusfm.shards.synth.anatomy import Anatomy
from fundusfm.shards.synth.camera import encode
from fundusfm.shards.synth.findings import DRUSEN, FLUID, HAZE, EyeTruth
from fundusfm.shards.synth.view import Array, fractal_noise, smooth_noise, smooth_step, soften

_WIDTH_MM, _DEPTH_UM = 6.0, 1000.0
# Brightness against the fraction of the way through the inner retina (surface to outer plexiform layer) ...
_INNER_DEPTH = (0.0, 0.04, 0.17, 0.24, 0.40, 0.47, 0.64, 0.71, 0.84, 0.90, 1.0)
_INNER_LIGHT = (0.70, 0.74, 0.66, 0.46, 0.42, 0.56, 0.52, 0.33, 0.32, 0.52, 0.48)
# ... and through the outer retina (outer nuclear layer to the pigment epithelium).
_OUTER_DEPTH = (0.0, 0.05, 0.52, 0.55, 0.58, 0.62, 0.68, 0.73, 0.78, 0.86, 0.90, 0.97, 1.0)
_OUTER_LIGHT = (0.44, 0.22, 0.21, 0.40, 0.24, 0.26, 0.75, 0.78, 0.42, 0.50, 0.92, 0.95, 0.80)
_HAZE_LOSS = (0.85, 0.7, 0.5)


@dataclass(frozen=True)
class _Layers:
    """Depth in micrometres of the surface, the outer plexiform layer and the pigment epithelium."""

    surface_W: Array
    middle_W: Array
    epithelium_W: Array


def paint_b_scan(rng: np.random.Generator, truth: EyeTruth, anatomy: Anatomy, size: int) -> bytes:
    """The JPEG of a horizontal scan, `size` pixels square, 6 mm wide and 1 mm deep."""
    x = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * np.float32(_WIDTH_MM)
    x = -x if truth.eye == "left" else x
    depth = ((np.arange(size, dtype=np.float32) + 0.5) / size * np.float32(_DEPTH_UM))[:, None]
    layers = _layers(rng, truth, x)
    image = _tissue(rng, layers, depth, size)
    fluid = truth.find(FLUID)
    if fluid is not None:
        image = _cysts(rng, image, layers, x, depth, fluid.places[0][1], fluid.severity)
    image = image * _shadows(rng, x)
    haze = truth.find(HAZE)
    if haze is not None:
        image = image * np.float32(_HAZE_LOSS[haze.severity])
    return encode(_speckle(rng, image))


def _layers(rng: np.random.Generator, truth: EyeTruth, x: Array) -> _Layers:
    swell = np.zeros_like(x)
    fluid = truth.find(FLUID)
    if fluid is not None:
        swell = (60 + 70 * fluid.severity) * np.exp(-(x**2) / (2 * 0.9**2))
    pit = np.exp(-(x**2) / (2 * np.float32(rng.uniform(0.3, 0.42)) ** 2))
    nasal = 1 + 0.10 * x / 3
    inner = np.float32(rng.normal(185, 10)) * nasal * (1 - 0.93 * pit) * (1 - 0.03 * x**2) + 0.35 * swell
    outer = np.float32(rng.normal(125, 6)) * (1 + 0.35 * pit) + 0.65 * swell
    bend = np.float32(rng.normal(6, 5)) * x**2 + np.float32(rng.normal(0, 14)) * x
    epithelium = np.float32(rng.uniform(560, 660)) - bend
    lift = _bumps(rng, truth, x)  # the layers above give way, so the surface rises least
    middle = epithelium - outer
    return _Layers(middle - inner - 0.2 * lift, middle - 0.55 * lift, epithelium - lift)


def _bumps(rng: np.random.Generator, truth: EyeTruth, x: Array) -> Array:
    """Drusen lift the pigment epithelium."""
    lift = np.zeros_like(x)
    drusen = truth.find(DRUSEN)
    if drusen is None:
        return lift
    num = 3 + 2 * drusen.severity + int(rng.integers(0, 3))
    for centre in np.clip(rng.normal(0, 1.0, num), -2.7, 2.7):
        height, width = (
            rng.uniform(25, 45 + 25 * drusen.severity),
            rng.uniform(0.07, 0.15 + 0.05 * drusen.severity),
        )
        lift = np.maximum(lift, height * np.exp(-((x - centre) ** 2) / (2 * width**2)))
    return lift.astype(np.float32)


def _tissue(rng: np.random.Generator, layers: _Layers, depth: Array, size: int) -> Array:
    surface, middle, epithelium = layers.surface_W, layers.middle_W, layers.epithelium_W
    inner = np.interp((depth - surface) / np.maximum(middle - surface, 4), _INNER_DEPTH, _INNER_LIGHT)
    outer = np.interp((depth - middle) / np.maximum(epithelium - middle, 4), _OUTER_DEPTH, _OUTER_LIGHT)
    below = depth - epithelium
    vessels = fractal_noise(rng, size, 12, 3)
    choroid = (0.50 + 0.13 * vessels) * np.exp(-np.maximum(below, 0) / 150) + 0.06
    vitreous = 0.05 + 0.015 * fractal_noise(rng, size, 3, 2)
    image = np.where(depth < surface, vitreous, np.where(depth < middle, inner, outer))
    image = np.where(below > 0, choroid, image)
    return np.asarray(
        (image * (1 + 0.05 * fractal_noise(rng, size, 20, 2))).astype(np.float32), dtype=np.float32
    )


def _cysts(rng: np.random.Generator, image: Array, layers: _Layers, x: Array, depth: Array, num: int,
           severity: int) -> Array:  # fmt: skip
    """Dark spaces inside the swollen retina; the worst cases also lift it off the epithelium."""
    dark = np.zeros_like(image)
    for _ in range(num):
        centre = float(rng.normal(0, 0.45 + 0.15 * severity))
        column = int(np.argmin(np.abs(x - centre)))
        top, bottom = layers.surface_W[column] + 35, layers.epithelium_W[column] - 55
        middle = rng.uniform(0.25, 0.85) * (bottom - top) + top
        width, height = rng.uniform(0.08, 0.16 + 0.07 * severity), rng.uniform(0.14, 0.32) * (bottom - top)
        shape = np.hypot((x - centre) / width, (depth - middle) / height)
        dark = np.maximum(dark, smooth_step(shape, 1.08, 0.85))
    if severity > 0 and rng.random() < 0.5:
        dome = rng.uniform(35, 55 + 30 * severity) * np.exp(-(x**2) / (2 * rng.uniform(0.5, 0.9) ** 2)) - 8
        floor = layers.epithelium_W - 22
        between = smooth_step(depth, 0, 1) * (depth < floor) * smooth_step(floor - dome - depth, 6.0, -6.0)
        dark = np.maximum(dark, between)
    return image * (1 - 0.88 * dark)


def _shadows(rng: np.random.Generator, x: Array) -> Array:
    """Larger vessels of the inner retina darken the columns under them."""
    light = np.ones_like(x)
    for centre in rng.uniform(1.0, 3.0, 7) * rng.choice([-1, 1], 7):
        light = light * (
            1 - np.float32(rng.uniform(0.08, 0.35)) * np.exp(-((x - centre) ** 2) / (2 * 0.035**2))
        )
    return np.asarray(
        (light * (1 + 0.06 * smooth_noise(rng, (1, len(x)), (1, 6))[0])).astype(np.float32), dtype=np.float32
    )


def _speckle(rng: np.random.Generator, image: Array) -> Array:
    """Multiplicative speckle a little wider than high, and the detector's floor."""
    looks = np.float32(rng.uniform(3.0, 7.0))
    grain = rng.standard_gamma(looks, image.shape, dtype=np.float32) / looks
    noisy = image * grain + np.abs(rng.standard_normal(image.shape, dtype=np.float32)) * np.float32(0.03)
    return soften(noisy, 0.0022 * image.shape[1])
