"""An eye's anatomy in millimetres on the retina.

The whole synthetic eye shares one frame: the fovea at (0, 0), x towards the nose, y downwards. That is how a
right eye looks to the viewer; a left eye is the same frame mirrored by the `View`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fundusfm.shards.synth.findings import LARGE_CUP, EyeTruth
from fundusfm.shards.synth.rng import Stream, generator

_CUPS = ((0.15, 0.5), (0.58, 0.68), (0.68, 0.78), (0.78, 0.9))  # none, mild, moderate, severe
MACULA_RADIUS_MM = 1.9


@dataclass(frozen=True)
class Anatomy:
    """`cup_ratio` is the vertical cup-to-disc ratio, `disc_tilt` an angle in radians.

    `tortuosity` and `calibre` are factors around 1; all other strengths run from 0 to 1.
    """

    disc_x_mm: float
    disc_y_mm: float
    disc_width_mm: float
    disc_height_mm: float
    disc_tilt: float
    disc_pallor: float
    cup_ratio: float
    crescent: float
    pigment: float
    tigroid: float
    macula_depth: float
    sheen: float
    tortuosity: float
    calibre: float
    age: int


def draw_anatomy(seed: int, number: int, age: int, truth: EyeTruth) -> Anatomy:
    """What the patient's eyes share, with small differences between them."""
    shared = generator(seed, number, Stream.ANATOMY)
    own = generator(seed, number, Stream.ANATOMY, truth.eye)
    pigment, tigroid = shared.beta(1.6, 1.6), shared.beta(1.3, 2.2)
    height = shared.normal(1.85, 0.13) + own.normal(0, 0.04)
    width = height * np.clip(shared.normal(0.91, 0.04) + own.normal(0, 0.02), 0.78, 1.0)
    cup = truth.find(LARGE_CUP)
    low, high = _CUPS[0 if cup is None else cup.severity + 1]
    alike, alone = np.clip(shared.random() + own.normal(0, 0.15), 0, 1), own.random()
    cup_place = alike if cup is None else alone
    return Anatomy(
        disc_x_mm=shared.normal(4.5, 0.2) + own.normal(0, 0.08),
        disc_y_mm=-0.45 + shared.normal(0, 0.18) + own.normal(0, 0.12),
        disc_width_mm=float(width),
        disc_height_mm=float(height),
        disc_tilt=shared.normal(0, 0.12) + own.normal(0, 0.08),
        disc_pallor=float(np.clip(shared.normal(0.4, 0.2), 0, 1)),
        cup_ratio=float(low + (high - low) * cup_place),
        crescent=max(0.0, shared.normal(-0.1, 0.4)) + max(0.0, own.normal(0, 0.05)),
        pigment=float(pigment),
        tigroid=float(tigroid),
        macula_depth=float(np.clip(shared.normal(0.7, 0.2) + own.normal(0, 0.05), 0.15, 1.0)),
        sheen=float(np.clip((60 - age) / 50 + shared.normal(0, 0.25), 0, 1)),
        tortuosity=float(shared.gamma(4, 0.25)),
        calibre=float(np.clip(shared.normal(1.0, 0.09), 0.8, 1.25)),
        age=age,
    )
