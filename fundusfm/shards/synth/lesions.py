"""Where the lesions of an eye lie and what shape they have, in millimetres.

Shape letters: L lesions, K points of an outline, 2 = x and y in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fundusfm.shards.synth.anatomy import Anatomy
from fundusfm.shards.synth.findings import (
    DRUSEN,
    EXUDATES,
    FINDINGS,
    HAEMORRHAGES,
    MACULA,
    MICROANEURYSMS,
    EyeTruth,
    Finding,
)
from fundusfm.shards.synth.rng import Stream, generator
from fundusfm.shards.synth.view import View

_SIGNS = {
    "superotemporal": (-1, -1),
    "inferotemporal": (-1, 1),
    "superonasal": (1, -1),
    "inferonasal": (1, 1),
}
_ANGLES = np.linspace(0, 2 * np.pi, 18, endpoint=False)


@dataclass(frozen=True)
class Lesions:
    """Lesions of one kind: their centres, their outlines in mm, and how dense each is (0 to 1)."""

    centre_L2: Any
    outlines: list[Any]
    density_L: Any


def draw_lesions(seed: int, number: int, truth: EyeTruth, anatomy: Anatomy, view: View) -> dict[str, Lesions]:
    """Lesions by finding, inside the field of view. Each finding has its own random numbers."""
    makers = {
        MICROANEURYSMS: _microaneurysms,
        HAEMORRHAGES: _haemorrhages,
        EXUDATES: _exudates,
        DRUSEN: _drusen,
    }
    drawn = {}
    for finding in truth.findings:
        if finding.name in makers:
            rng = generator(seed, number, Stream.LESIONS, truth.eye, FINDINGS.index(finding.name))
            drawn[finding.name] = makers[finding.name](rng, finding, anatomy, view)
    return drawn


def _place(rng: np.random.Generator, place: str, anatomy: Anatomy, view: View) -> Any:
    """A point of the place, off the disc and inside the field; the last of 40 tries is taken as it is."""
    point = np.zeros(2)
    for _ in range(40):
        angle = rng.uniform(0, np.pi / 2)
        if place == MACULA:
            point = rng.uniform(0.3, 1.7) * _direction(rng.uniform(0, 2 * np.pi))
        else:
            angle = rng.uniform(0.14, np.pi / 2 - 0.14)
            point = rng.uniform(2.1, 6.2) * _direction(angle) * np.array(_SIGNS[place])
        off_disc = np.hypot(point[0] - anatomy.disc_x_mm, point[1] - anatomy.disc_y_mm) > 1.3
        if off_disc and view.holds(point[0], point[1]):
            break
    return point


def _direction(angle: float) -> Any:
    return np.array([np.cos(angle), np.sin(angle)])


def _blob(rng: np.random.Generator, centre: Any, radius_mm: float, ragged: float, axis: Any = (1.0, 0.0),
          stretch: float = 1.0) -> Any:  # fmt: skip
    """A closed outline whose radius wavers by `ragged`, stretched along `axis`."""
    waves = np.arange(2, 6)
    phase, size = rng.uniform(0, 2 * np.pi, 4), rng.normal(0, ragged, 4) / waves**0.5
    radius = radius_mm * np.maximum(0.3, 1 + (size * np.cos(np.outer(_ANGLES, waves) + phase)).sum(1))
    along, across = radius * np.cos(_ANGLES) * stretch, radius * np.sin(_ANGLES) / np.sqrt(stretch)
    axis = np.asarray(axis)
    return centre + along[:, None] * axis + across[:, None] * np.array([-axis[1], axis[0]])


def _microaneurysms(rng: np.random.Generator, finding: Finding, anatomy: Anatomy, view: View) -> Lesions:
    """Dots of 50 to 105 micrometres: one or two pixels at 224, next to lost at 96."""
    centres = [_place(rng, place, anatomy, view) for place, count in finding.places for _ in range(count)]
    outlines = [_blob(rng, c, rng.uniform(0.026, 0.052), 0.05) for c in centres]
    return Lesions(np.array(centres), outlines, rng.uniform(0.7, 1.0, len(centres)))


def _haemorrhages(rng: np.random.Generator, finding: Finding, anatomy: Anatomy, view: View) -> Lesions:
    """Blots deep in the retina and flames along the nerve fibres, which run from the disc."""
    disc = np.array([anatomy.disc_x_mm, anatomy.disc_y_mm])
    centres = [_place(rng, place, anatomy, view) for place, count in finding.places for _ in range(count)]
    outlines = []
    for centre in centres:
        fibre = (centre - disc) / np.linalg.norm(centre - disc)
        radius = float(np.clip(rng.lognormal(np.log(0.17), 0.42), 0.08, 0.42))
        is_flame = rng.random() < 0.3
        stretch = rng.uniform(1.6, 2.6) if is_flame else rng.uniform(1.0, 1.3)
        outlines.append(_blob(rng, centre, radius, 0.3 if is_flame else 0.16, fibre, stretch))
    return Lesions(np.array(centres), outlines, rng.uniform(0.65, 1.0, len(centres)))


def _exudates(rng: np.random.Generator, finding: Finding, anatomy: Anatomy, view: View) -> Lesions:
    """Clusters of waxy spots with sharp edges, at times in an arc around a leaking point."""
    centres, outlines = [], []
    for place, count in finding.places:
        middle = _place(rng, place, anatomy, view)
        spread = rng.uniform(0.25, 0.45) * (1 + 0.35 * finding.severity)
        bow = rng.uniform(0, 2 * np.pi)
        is_arc = rng.random() < 0.4
        for _ in range(count):
            if is_arc:
                angle = bow + rng.normal(0, 0.8)
                spot = middle + spread * 1.3 * (_direction(angle) - 0.5 * _direction(bow)) * rng.normal(
                    1, 0.12
                )
            else:
                spot = middle + rng.normal(0, spread, 2)
            radius = rng.uniform(0.06, 0.12) * (1 + rng.random() ** 3 * (0.6 + 0.5 * finding.severity))
            centres.append(spot)
            outlines.append(_blob(rng, spot, radius, 0.22))
    return Lesions(np.array(centres), outlines, rng.uniform(0.6, 1.0, len(centres)))


def _drusen(rng: np.random.Generator, finding: Finding, anatomy: Anatomy, view: View) -> Lesions:
    """Round pale deposits with soft edges, crowded around the fovea."""
    count = finding.places[0][1]
    angle = rng.uniform(0, 2 * np.pi, count)
    distance = np.abs(rng.normal(0, 1.0, count)) + 0.12
    centres = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.minimum(distance, 2.4)[:, None]
    largest = (0.13, 0.17, 0.22)[finding.severity]
    outlines = [_blob(rng, c, rng.uniform(0.065, largest), 0.1) for c in centres]
    return Lesions(centres, outlines, rng.uniform(0.55, 1.0, count))
