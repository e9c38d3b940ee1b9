"""What the camera adds: framing, light, the haze of the eye's lens before it, colour, blur, noise, JPEG.

Shape letters: H rows, W columns, 3 = red, green, blue in 0..1.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fundusfm.shards.synth.findings import HAZE, EyeTruth
from fundusfm.shards.synth.view import Array, View, fractal_noise, smooth_step, soften, to_bytes

JPEG_QUALITY = 92
_NOISE_SIZE_PX = 224


@dataclass(frozen=True)
class Camera:
    """The style of one camera.

    `fill` is the radius of the field as a share of half the image (above 1 the frame cuts it), `cut`
    the height, same unit, at which it is cut off. `gamma` tints what lies between black and white.
    """

    name: str
    field_radius_mm: float
    fill: float
    cut: float
    gamma: tuple[float, float, float]
    vignette: float
    rim: tuple[float, float, float]
    noise: float
    blur_mm: float
    notch: bool


CAMERAS = (
    Camera("astra-45", 6.3, 0.985, 1.0, (0.95, 1.0, 1.05), 0.34, (0.5, 0.35, 0.2), 0.012, 0.016, True),
    Camera("boreal-45", 6.5, 1.12, 0.98, (0.90, 0.72, 0.58), 0.24, (0.75, 0.9, 1.0), 0.016, 0.022, False),
    Camera("corvid-50", 7.1, 0.95, 0.95, (1.5, 1.02, 1.0), 0.46, (0.35, 0.5, 0.45), 0.015, 0.020, True),
    Camera("dorado-50", 6.9, 0.97, 0.86, (0.62, 1.22, 1.55), 0.40, (0.6, 0.3, 0.1), 0.014, 0.026, False),
)


def choose_view(rng: np.random.Generator, camera: Camera, size: int, mirrored: bool) -> View:
    """Photographs are centred between the fovea and the disc, never twice alike."""
    centre = (rng.normal(1.2, 0.4), rng.normal(-0.2, 0.3))
    radius_px = camera.fill * size / 2 * rng.normal(1, 0.008)
    return View(
        size, (float(centre[0]), float(centre[1])), camera.field_radius_mm, float(radius_px), mirrored
    )


def photograph(
    rng: np.random.Generator,
    haze_rng: np.random.Generator,
    retina_HW3: Array,
    truth: EyeTruth,
    camera: Camera,
    view: View,
) -> bytes:
    """The JPEG of a retina: light in, lens, sensor."""
    tinted = np.clip(retina_HW3, 0, 1) ** np.asarray(camera.gamma, dtype=np.float32)
    image = tinted * _light(rng, camera, view)[..., None]
    haze = truth.find(HAZE)
    defocus_mm = camera.blur_mm + (rng.gamma(2.0, 0.012) if rng.random() < 0.25 else 0.0)
    if haze is not None:
        image, clouding_mm = _cloud(haze_rng, image, haze.severity, view)
        defocus_mm += clouding_mm
    image = _rim_light(rng, image, camera, view)
    image = np.clip(image, 0, 1) ** np.float32(rng.normal(1, 0.04))
    image = _sensor_noise(rng, soften(image, defocus_mm * view.px_per_mm), camera)
    return encode(image * _field(rng, camera, view)[..., None])


def _light(rng: np.random.Generator, camera: Camera, view: View) -> Array:
    """Exposure, fall-off to the edge, and a tilt because no eye sits straight before the lens."""
    x = (np.arange(view.size, dtype=np.float32) + 0.5) / view.size * 2 - 1
    tilt = rng.normal(0, 0.11, 2).astype(np.float32)
    slope = 1 + tilt[0] * x[None, :] + tilt[1] * x[:, None]
    fall = 1 - np.float32(camera.vignette * rng.uniform(0.7, 1.2)) * view.field_distance**2.6
    exposure = np.exp(rng.normal(0, 0.13)) * (rng.uniform(0.5, 0.75) if rng.random() < 0.08 else 1.0)
    return np.asarray((np.float32(exposure) * slope * fall).astype(np.float32), dtype=np.float32)


def _cloud(rng: np.random.Generator, image: Array, severity: int, view: View) -> tuple[Array, float]:
    """A clouded lens scatters light over the picture, swallows blue, and blurs (second result, in mm)."""
    low, high = ((0.16, 0.32), (0.32, 0.52), (0.52, 0.74))[severity]
    density = np.float32(rng.uniform(low, high))
    patches = 1 + np.float32(0.16) * fractal_noise(rng, view.size, 2, 2)
    share = np.clip(density * patches, 0, 0.92)[..., None]
    inside = image[view.field_distance < 0.9].mean(axis=0)
    grey = inside.mean()
    tint = np.asarray(
        [rng.normal(1.05, 0.07), rng.normal(1.0, 0.05), rng.normal(0.85, 0.12)], dtype=np.float32
    )
    veil = (0.5 * inside + 0.5 * grey) * tint * np.float32(rng.normal(1.12, 0.1))
    light = 1 - np.float32(0.12) * view.field_distance[..., None] ** 2
    return image * (1 - share) + veil * light * share, float(density * rng.uniform(0.06, 0.2))


def _rim_light(rng: np.random.Generator, image: Array, camera: Camera, view: View) -> Array:
    """Stray light at the edge of the field, in the camera's own tint."""
    toward = rng.uniform(0, 2 * np.pi)
    x = (np.arange(view.size, dtype=np.float32) + 0.5) / view.size * 2 - 1
    side = 0.5 + 0.5 * (np.float32(np.cos(toward)) * x[None, :] + np.float32(np.sin(toward)) * x[:, None])
    strength = np.float32(0.45 * rng.beta(1.2, 3.5))
    glow = smooth_step(view.field_distance, 0.86, 1.02) * np.clip(side, 0, 1) * strength
    return np.asarray(image + glow[..., None] * np.asarray(camera.rim, dtype=np.float32), dtype=np.float32)


def _sensor_noise(rng: np.random.Generator, image: Array, camera: Camera) -> Array:
    # A smaller picture averages more pixels of the sensor.
    averaged = min(1.0, image.shape[0] / _NOISE_SIZE_PX) ** 0.5
    sigma = np.float32(camera.noise * averaged * rng.uniform(0.6, 1.6))
    grain = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    chroma = rng.standard_normal(image.shape, dtype=np.float32)
    return np.asarray(image + sigma * (0.8 * grain + 0.5 * chroma), dtype=np.float32)


def _field(rng: np.random.Generator, camera: Camera, view: View) -> Array:
    """1 where light reaches the sensor: a disc, cut above and below, for some cameras with a notch."""
    edge = np.float32(1.2 / view.radius_px)
    mask = smooth_step(view.field_distance, 1.0, 1.0 - float(edge) * 2)
    if camera.notch:
        angle = rng.normal(-0.78, 0.06)
        centre = np.array([np.cos(angle), np.sin(angle)]) * view.radius_px * 0.995 + view.size / 2
        pixel = np.arange(view.size, dtype=np.float32) + 0.5
        away = np.hypot(pixel[None, :] - np.float32(centre[0]), pixel[:, None] - np.float32(centre[1]))
        mask = np.maximum(mask, smooth_step(away, 0.035 * view.radius_px, 0.02 * view.radius_px) * 0.6)
    rows = np.abs((np.arange(view.size, dtype=np.float32) + 0.5) / view.size * 2 - 1)
    return mask * (rows < camera.cut)[:, None]


def encode(image: Any) -> bytes:
    """JPEG of 0..1 grey or colour."""
    stream = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()
