"""The vessel tree: four arcades of an artery and a vein each, branching towards and away from the macula.

Shape letters: N vessels, K points along each, 2 = x and y in mm.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fundusfm.shards.synth.anatomy import Anatomy
from fundusfm.shards.synth.rng import Stream, generator

_AVASCULAR_MM = 0.55  # radius around the fovea that no vessel enters
_NUM_POINTS = 26
_ARTERY_MM, _VEIN_MM = 0.125, 0.175
# Control points of an upper trunk, three from the disc and the last from the fovea; lower ones mirror y.
_TRUNKS = {
    "temporal": (((0.0, 0.0), (0.2, -2.4), (-2.2, -5.2)), (-6.4, -1.5)),
    "nasal": (((0.0, 0.0), (0.3, -1.3), (1.6, -2.9)), (9.2, -5.6)),
}


@dataclass(frozen=True)
class Vessels:
    """Vessels of one kind: `points_NK2` in mm from root to tip, and their `width_NK` in mm."""

    points_NK2: Any
    width_NK: Any

    def outlines(self, thinner: float = 1.0) -> list[Any]:
        """Closed outlines of all vessels, the widest last; `thinner` scales the width (the light reflex)."""
        tangent = np.gradient(self.points_NK2, axis=1)
        normal = np.stack([-tangent[..., 1], tangent[..., 0]], axis=-1)
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
        half = 0.5 * thinner * self.width_NK[..., None] * normal
        loops = np.concatenate([self.points_NK2 + half, (self.points_NK2 - half)[:, ::-1]], axis=1)
        return list(loops[np.argsort(self.width_NK[:, 0], kind="stable")])


@dataclass(frozen=True)
class _Roots:
    """Starts of branches: place, heading in radians, width, and a turn to the macula (1) or away (-1)."""

    point_N2: Any
    heading_N: Any
    width_N: Any
    inward_N: Any


def grow_vessels(seed: int, number: int, eye: str, anatomy: Anatomy) -> tuple[Vessels, Vessels]:
    """Arteries and veins of one eye."""
    rng = generator(seed, number, Stream.VESSELS, eye)
    shift = rng.normal(0, 0.3, size=(4, 4, 2))  # the vein of an arcade runs beside its artery
    arteries = _tree(rng, anatomy, _ARTERY_MM * anatomy.calibre, shift, 0.0)
    veins = _tree(rng, anatomy, _VEIN_MM * anatomy.calibre, shift, 1.0)
    return arteries, veins


def _tree(rng: np.random.Generator, anatomy: Anatomy, width_mm: float, shift: Any, is_vein: float) -> Vessels:
    trunks = _trunks(rng, anatomy, width_mm, shift, is_vein)
    first = _grow(rng, _join_roots(_branch(rng, trunks, 8), _disc_twigs(rng, anatomy, width_mm)), anatomy)
    second = _grow(rng, _branch(rng, first, 3), anatomy)
    third = _grow(rng, _branch(rng, second, 2), anatomy)
    return _join(third, second, first, trunks)


def _join(*parts: Vessels) -> Vessels:
    points = np.concatenate([p.points_NK2 for p in parts])
    return Vessels(points, np.concatenate([p.width_NK for p in parts]))


def _join_roots(a: _Roots, b: _Roots) -> _Roots:
    return _Roots(*(np.concatenate([getattr(a, f.name), getattr(b, f.name)]) for f in fields(_Roots)))


def _trunks(
    rng: np.random.Generator, anatomy: Anatomy, width_mm: float, shift: Any, is_vein: float
) -> Vessels:
    disc = np.array([anatomy.disc_x_mm, anatomy.disc_y_mm])
    t = np.linspace(0, 1, _NUM_POINTS)[:, None]
    points, widths = [], []
    for number, (arc, side) in enumerate((a, s) for a in _TRUNKS for s in (1, -1)):
        start, end = _TRUNKS[arc]
        flip = np.array([1.0, side])
        control = [disc + np.array(p) * flip for p in start] + [np.array(end) * flip]
        apart = 0.3 * is_vein * np.array([[0.2, 0], [0.6, 0.1], [0.5, -1], [0, -1.6]]) * flip
        control = np.array(control) + shift[number] * np.array([[0], [0.6], [1], [2]]) + apart
        control[0] = disc + np.array([0.28, 0.12 * side]) + rng.normal(0, 0.05, 2)
        control[1:] += rng.normal(0, [[0.2], [0.35], [0.7]], (3, 2))
        curve = (1 - t) ** 3 * control[0] + 3 * t * (1 - t) ** 2 * control[1]
        curve = curve + 3 * t**2 * (1 - t) * control[2] + t**3 * control[3]
        points.append(_evenly(curve + _meander(rng, t, anatomy.tortuosity)))
        share = (1.0 if arc == "temporal" else 0.78) * rng.normal(1, 0.06)
        widths.append(width_mm * share * (1 - 0.6 * t[:, 0] ** 0.9))
    return Vessels(np.array(points), np.array(widths))


def _evenly(curve_K2: Any) -> Any:
    """The same curve with its points at equal distances, so that branches spread over its whole length."""
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve_K2, axis=0), axis=1))])
    even = np.linspace(0, travelled[-1], len(curve_K2))
    return np.stack([np.interp(even, travelled, curve_K2[:, axis]) for axis in (0, 1)], axis=1)


def _meander(rng: np.random.Generator, t: Any, tortuosity: float) -> Any:
    """Sideways waves that start at nothing on the disc."""
    waves = np.array([1.6, 2.9, 4.7])
    phase = rng.uniform(0, 2 * np.pi, (2, 3))
    size = rng.normal(0, 1, (2, 3)) * np.array([0.13, 0.08, 0.045]) * tortuosity
    moved = (size * (np.sin(2 * np.pi * waves * t[:, :, None] + phase))).sum(-1)
    return moved * np.minimum(1, 4 * t)


def _disc_twigs(rng: np.random.Generator, anatomy: Anatomy, width_mm: float) -> _Roots:
    """Small vessels straight off the disc, to the macula and to the nose."""
    num = int(rng.integers(3, 5))
    to_macula = np.arange(num) % 2 == 0
    spread = rng.uniform(0.25, 0.8, num) * rng.choice([-1, 1], num)
    heading = np.where(to_macula, np.pi, 0.0) + spread
    edge = 0.25 * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    centre = np.array([anatomy.disc_x_mm + 0.15, anatomy.disc_y_mm])
    width = width_mm * rng.uniform(0.2, 0.34, num)
    return _Roots(centre + edge, heading, width, np.where(to_macula, 0.6, -1.0))


def _branch(rng: np.random.Generator, parents: Vessels, num: int) -> _Roots:
    """About `num` branches off each parent, on alternating sides, thinner than the parent is there."""
    num_parents = len(parents.points_NK2)
    along = (np.arange(num) + rng.uniform(0.15, 0.85, (num_parents, num))) / num * 0.86 + 0.1
    index = np.minimum((along * (_NUM_POINTS - 1)).astype(int), _NUM_POINTS - 2)
    row = np.arange(num_parents)[:, None]
    step = parents.points_NK2[row, index + 1] - parents.points_NK2[row, index]
    sides = np.where((np.arange(num) + rng.integers(0, 2, (num_parents, 1))) % 2 == 0, 1.0, -1.0)
    heading = np.arctan2(step[..., 1], step[..., 0]) + sides * rng.uniform(0.4, 1.0, sides.shape)
    point = parents.points_NK2[row, index]
    toward = -(np.cos(heading) * point[..., 0] + np.sin(heading) * point[..., 1])
    inward = np.where((toward > 0) & (point[..., 0] < 5.0), 1.0, -1.0)
    width = parents.width_NK[row, index] * (0.38 + 0.5 * rng.beta(1.3, 2.0, sides.shape))
    keep = (rng.random(sides.shape) < 0.8) & (width > 0.011) & (np.linalg.norm(step, axis=-1) > 1e-6)
    return _Roots(point[keep], heading[keep], width[keep], inward[keep])


def _grow(rng: np.random.Generator, roots: _Roots, anatomy: Anatomy) -> Vessels:
    """Let all branches creep forward together, turning to or from the fovea: the wider, the longer."""
    num = len(roots.width_N)
    x, y = roots.point_N2.T
    heading = roots.heading_N
    length_mm = (0.6 + 40 * roots.width_N) * rng.uniform(0.6, 1.25, num)
    step = length_mm / (_NUM_POINTS - 1)
    drift = rng.normal(0, 0.03, num)
    wobble = rng.normal(0, 0.06 * (0.5 + anatomy.tortuosity), (_NUM_POINTS, num))
    alive = np.ones(num)
    xs, ys = [x], [y]
    for turn in wobble[1:]:
        aim = np.arctan2(-y * roots.inward_N, -x * roots.inward_N)
        heading = heading + 0.07 * np.sin(aim - heading) + drift + turn
        alive = alive * (np.hypot(x, y) > _AVASCULAR_MM)
        reach = step * alive
        x, y = x + reach * np.cos(heading), y + reach * np.sin(heading)
        xs.append(x)
        ys.append(y)
    taper = 1 - 0.75 * np.linspace(0, 1, _NUM_POINTS)
    points_NK2 = np.stack([np.stack(xs, axis=1), np.stack(ys, axis=1)], axis=-1)
    return Vessels(points_NK2, roots.width_N[:, None] * taper)
