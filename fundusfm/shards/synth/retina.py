"""The retina as light comes back from it, before any camera: choroid, macula, disc, vessels, lesions.

Shape letters: H rows, W columns, 3 = red, green, blue in 0..1.
"""

from __future__ import annotations

import numpy as np

from fundusfm.shards.synth.anatomy import Anatomy
from fundusfm.shards.synth.findings import DRUSEN, EXUDATES, HAEMORRHAGES, MICROANEURYSMS
from fundusfm.shards.synth.lesions import Lesions
from fundusfm.shards.synth.vessels import Vessels
from fundusfm.shards.synth.view import Array, View, fractal_noise, smooth_noise, smooth_step

_FAIR, _DARK = (0.84, 0.47, 0.27), (0.58, 0.29, 0.15)
_RIM, _RIM_PALE, _CUP = (0.93, 0.55, 0.32), (0.96, 0.64, 0.41), (1.0, 0.90, 0.68)
_ARTERY_ABSORBS, _VEIN_ABSORBS = (0.16, 0.56, 0.50), (0.40, 0.84, 0.66)
_BLOOD_ABSORBS = (0.62, 1.5, 1.2)
_EXUDATE, _DRUSE = (0.99, 0.86, 0.50), (1.0, 0.69, 0.37)


def paint_retina(
    rng: np.random.Generator,
    anatomy: Anatomy,
    vessels: tuple[Vessels, Vessels],
    lesions: dict[str, Lesions],
    view: View,
) -> Array:
    """Colour of every pixel, image_HW3."""
    image = _background(rng, anatomy, view)
    image = _soft_lesions(image, lesions, view)
    disc = _disc_distance(anatomy, view, 1.0)
    image = _paint_disc(image, rng, anatomy, disc, view)
    image = _paint_vessels(image, vessels, disc, view)
    return _hard_lesions(image, lesions, view)


def _colour(rgb: tuple[float, float, float]) -> Array:
    return np.asarray(rgb, dtype=np.float32)


def _blend(image: Array, colour: Array, share_HW: Array) -> Array:
    return image + (colour - image) * share_HW[..., None]


def _background(rng: np.random.Generator, anatomy: Anatomy, view: View) -> Array:
    base = _colour(_FAIR) + (_colour(_DARK) - _colour(_FAIR)) * np.float32(anatomy.pigment)
    clouds = fractal_noise(rng, view.size, 3, 4)
    grain = fractal_noise(rng, view.size, 48, 2)
    shade = 1 + 0.035 * clouds + 0.016 * grain
    image = base * shade[..., None]
    image = image * (1 + _choroid(rng, anatomy, view)[..., None] * _colour((0.30, 0.42, 0.30)))
    x, y = view.grid_mm
    radius2 = x * x + y * y
    wide, core = np.exp(-radius2 / (2 * 1.0**2)), np.exp(-radius2 / (2 * 0.36**2))
    dark = anatomy.macula_depth * (0.42 * wide + 0.50 * core)
    image = image * np.exp(-dark[..., None] * _colour((0.55, 1.0, 1.1)))
    ring = np.exp(-((np.sqrt(radius2) - 1.25) ** 2) / (2 * 0.22**2)) * anatomy.sheen
    return np.asarray(
        image * (1 + 0.05 * ring[..., None]) * _fibre_sheen(rng, anatomy, view)[..., None], dtype=np.float32
    )


def _choroid(rng: np.random.Generator, anatomy: Anatomy, view: View) -> Array:
    """Ribbons of choroidal vessels, running outwards, seen best where the pigment is thin."""
    shape = (view.size, view.size)
    flat, upright = smooth_noise(rng, shape, (44, 13)), smooth_noise(rng, shape, (13, 44))
    x, y = view.grid_mm
    sideways = x * x / (x * x + y * y + np.float32(0.01))
    ribbons = (
        flat * sideways + upright * (1 - sideways) + np.float32(0.4) * fractal_noise(rng, view.size, 24, 1)
    )
    ribbons = np.exp(-((ribbons / np.float32(0.7)) ** 2)) - np.float32(0.5)
    away = smooth_step(np.hypot(x, y), 1.2, 5.0)
    strength = 0.06 + 0.34 * anatomy.tigroid
    return np.asarray(np.float32(strength) * away * ribbons, dtype=np.float32)


def _fibre_sheen(rng: np.random.Generator, anatomy: Anatomy, view: View) -> Array:
    """Nerve fibres of the young: a silvery sheen above and below the disc, striped along the fibres."""
    x, y = view.grid_mm
    dx, dy = x - np.float32(anatomy.disc_x_mm), y - np.float32(anatomy.disc_y_mm)
    angle, distance = np.arctan2(dy, -dx), np.hypot(dx, dy)
    bundles = np.exp(-((np.abs(angle) - 1.15) ** 2) / (2 * 0.35**2)) * np.exp(-distance / 2.6)
    stripes = 1 + 0.25 * np.sin(angle * np.float32(rng.uniform(50, 70)) + np.float32(rng.uniform(0, 6)))
    return np.asarray(1 + np.float32(0.30 * anatomy.sheen) * bundles * stripes, dtype=np.float32)


def _disc_distance(
    anatomy: Anatomy, view: View, share: float, shift_mm: tuple[float, float] = (0, 0)
) -> Array:
    """Signed distance in mm from the edge of the disc, or of an ellipse `share` as large; negative inside."""
    x, y = view.grid_mm
    dx = x - np.float32(anatomy.disc_x_mm + shift_mm[0])
    dy = y - np.float32(anatomy.disc_y_mm + shift_mm[1])
    cos, sin = np.float32(np.cos(anatomy.disc_tilt)), np.float32(np.sin(anatomy.disc_tilt))
    across = (dx * cos + dy * sin) / np.float32(anatomy.disc_width_mm / 2 * share)
    down = (dy * cos - dx * sin) / np.float32(anatomy.disc_height_mm / 2 * share)
    return np.asarray(
        (np.hypot(across, down) - 1) * np.float32(anatomy.disc_height_mm / 2 * share), dtype=np.float32
    )


def _paint_disc(image: Array, rng: np.random.Generator, anatomy: Anatomy, disc: Array, view: View) -> Array:
    x, _ = view.grid_mm
    glow = np.exp(-np.maximum(disc, 0) / np.float32(0.55))
    image = image * (1 + 0.16 * glow[..., None])
    if anatomy.crescent > 0.05:
        edge = np.float32(0.42 * min(anatomy.crescent, 1.0))
        temporal = smooth_step(np.float32(anatomy.disc_x_mm) - x, 0.1, 0.9)
        image = _blend(
            image, _colour((0.93, 0.70, 0.46)), smooth_step(disc, float(edge), 0.0) * temporal * 0.7
        )
    pallor = np.float32(anatomy.disc_pallor)
    rim = _colour(_RIM) + (_colour(_RIM_PALE) - _colour(_RIM)) * pallor
    bright = np.float32(0.92 + 0.08 * rng.random())
    mottle = 1 + 0.03 * fractal_noise(rng, view.size, 24, 2)
    nasal = 1 - 0.10 * smooth_step(x - np.float32(anatomy.disc_x_mm), -0.2, 0.9)
    rim_HW3 = rim * bright * (mottle * nasal)[..., None]
    image = _blend(image, rim_HW3, smooth_step(disc, 0.07, -0.11) * np.float32(0.95))
    ratio = anatomy.cup_ratio
    slack = anatomy.disc_height_mm / 2 * (1 - ratio)
    shift = (-0.3 * slack + slack * rng.normal(0, 0.1), slack * rng.normal(0.0, 0.12))
    cup = _disc_distance(anatomy, view, ratio, shift)
    depth = np.float32(0.6 + 0.4 * rng.random())
    soft = 0.10 + 0.06 * rng.random()
    return _blend(image, _colour(_CUP) * bright, smooth_step(cup, soft, -soft) * depth)


def _paint_vessels(image: Array, vessels: tuple[Vessels, Vessels], disc: Array, view: View) -> Array:
    arteries, veins = vessels
    artery, vein = view.mask(arteries.outlines()), view.mask(veins.outlines())
    reflex = view.mask(arteries.outlines(0.34)) * smooth_step(artery, 0.6, 1.0)
    on_disc = 1 - 0.35 * smooth_step(disc, 0.0, -0.5)
    depth = (
        artery[..., None] * _colour(_ARTERY_ABSORBS) + vein[..., None] * _colour(_VEIN_ABSORBS)
    ) * on_disc[..., None]
    image = image * np.exp(-0.92 * depth)
    return image * (1 + 0.22 * reflex[..., None])


def _soft_lesions(image: Array, lesions: dict[str, Lesions], view: View) -> Array:
    """Drusen lie under the vessels; their edges are washed out."""
    if DRUSEN not in lesions:
        return image
    soft = _softened(view, lesions[DRUSEN], 0.035)
    return _blend(image, _colour(_DRUSE) * image[..., :1] / np.float32(0.76), soft * np.float32(0.66))


def _hard_lesions(image: Array, lesions: dict[str, Lesions], view: View) -> Array:
    if HAEMORRHAGES in lesions:
        blood = _softened(view, lesions[HAEMORRHAGES], 0.02)
        image = image * np.exp(-0.75 * blood[..., None] * _colour(_BLOOD_ABSORBS))
    if MICROANEURYSMS in lesions:
        dots = _softened(view, lesions[MICROANEURYSMS], 0.0)
        image = image * np.exp(-0.8 * dots[..., None] * _colour(_BLOOD_ABSORBS))
    if EXUDATES in lesions:
        waxy = _softened(view, lesions[EXUDATES], 0.0)
        image = _blend(image, _colour(_EXUDATE), waxy * np.float32(0.9))
    return image


def _softened(view: View, lesions: Lesions, edge_mm: float) -> Array:
    mask = view.mask(lesions.outlines, lesions.density_L.tolist())
    return view.blur(mask, edge_mm) if edge_mm else mask
