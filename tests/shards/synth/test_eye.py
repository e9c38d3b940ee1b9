"""Truth against pixels: what the labels say is what the picture shows, at the place the labels say.

Legend: H rows, W columns, 3 colour channels. A right eye has its nose on the viewer's right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fundusfm.shards.synth.anatomy import draw_anatomy
from fundusfm.shards.synth.camera import CAMERAS, choose_view
from fundusfm.shards.synth.findings import (
    DRUSEN,
    EXUDATES,
    FLUID,
    HAEMORRHAGES,
    HAZE,
    LARGE_CUP,
    MACULA,
    MICROANEURYSMS,
    QUADRANTS,
    EyeTruth,
    Finding,
)
from fundusfm.shards.synth.lesions import draw_lesions
from fundusfm.shards.synth.rng import Stream, generator
from fundusfm.shards.synth.vessels import grow_vessels
from tests.shards.synth.conftest import SEED

SIDES = ("right", "left")


def one(name: str, severity: int, place: str, count: int) -> Finding:
    return Finding(name, severity, ((place, count),))


def quadrant(change_HW: Any, eye: str) -> str:
    """The quadrant about the fovea that holds most of a change in a picture by the first camera."""
    view = choose_view(generator(SEED, 0, Stream.CAMERA, eye), CAMERAS[0], len(change_HW), eye == "left")
    column, row = np.rint(view.to_px((0.0, 0.0))).astype(int)
    upper = change_HW[:row].sum() > change_HW[row:].sum()
    right = change_HW[:, column:].sum() > change_HW[:, :column].sum()
    return ("supero" if upper else "infero") + ("nasal" if right == (eye == "right") else "temporal")


@pytest.mark.parametrize("camera", range(len(CAMERAS)))
@pytest.mark.parametrize("eye", SIDES)
def test_photograph__disc_is_the_brightest_and_nasal(draw: Any, eye: str, camera: int) -> None:
    for number in range(3):
        green_HW = draw(eye, number=number, camera=camera, size=96)[..., 1]
        inner_HW = green_HW[12:84, 6:90]
        column = (
            6 + np.argmax(np.lib.stride_tricks.sliding_window_view(inner_HW, (7, 7)).mean((2, 3)).max(0)) + 3
        )
        assert (column > 48) == (eye == "right")


def test_photograph__black_outside_the_field(draw: Any) -> None:
    for camera in (0, 2, 3):
        image_HW3 = draw("right", camera=camera)
        assert image_HW3[:5, :5].max() < 12
        assert image_HW3[64, 40:80].mean() > 40


@pytest.mark.parametrize("eye", SIDES)
@pytest.mark.parametrize("place", QUADRANTS)
def test_photograph__exudates_are_bright_yellow_where_stated(draw: Any, eye: str, place: str) -> None:
    bare, ill = draw(eye), draw(eye, one(EXUDATES, 2, place, 40))
    assert quadrant(np.abs(ill - bare).sum(2) > 60, eye) == place
    changed_HW = np.abs(ill - bare).sum(2) > 60
    red, green, blue = ill[changed_HW].mean(0)
    assert green > bare[changed_HW][:, 1].mean() + 25
    assert red > green > blue


@pytest.mark.parametrize("eye", SIDES)
@pytest.mark.parametrize("place", QUADRANTS)
def test_photograph__haemorrhages_are_dark_where_stated(draw: Any, eye: str, place: str) -> None:
    bare, ill = draw(eye), draw(eye, one(HAEMORRHAGES, 1, place, 10))
    darker_HW = bare[..., 1] - ill[..., 1]
    assert quadrant(darker_HW > 20, eye) == place
    assert darker_HW.min() > -25


def test_photograph__drusen_are_pale_spots_at_the_macula(draw: Any) -> None:
    paler_HW = (draw("right", one(DRUSEN, 2, MACULA, 50)) - draw("right"))[..., 1] > 12
    rows, columns = np.nonzero(paler_HW)
    assert len(rows) > 20
    assert np.hypot(rows - 64, columns - 52).mean() < 30


def test_photograph__microaneurysms_vanish_in_small_pictures(draw: Any) -> None:
    dots = one(MICROANEURYSMS, 1, "inferotemporal", 12)
    contrast = {}
    for size in (96, 320):
        bare, ill = draw("right", size=size), draw("right", dots, size=size)
        contrast[size] = np.sort((bare - ill)[..., 1].ravel())[-12:].mean()
    assert contrast[96] < 0.55 * contrast[320]


def test_photograph__haze_takes_contrast_by_degree(draw: Any) -> None:
    for camera in range(len(CAMERAS)):
        views = [draw("left", camera=camera)]
        views += [draw("left", one(HAZE, severity, "lens", 1), camera=camera) for severity in range(3)]
        spread = [np.abs(np.diff(v[20:108, 20:108, 1], axis=1)).mean() for v in views]
        assert spread[0] > spread[1] > spread[3]


def test_photograph__haze_has_no_colour_of_its_own(draw: Any) -> None:
    hazes = [
        draw("left", one(HAZE, 2, "lens", 1), number=n, camera=n % 4)[40:88, 40:88].mean((0, 1))
        for n in range(12)
    ]
    ratio = [red / blue for red, _, blue in hazes]
    assert max(ratio) > 1.6 * min(ratio)


def test_photograph__large_cup_brightens_the_disc_alone(draw: Any) -> None:
    gain_HW = (draw("right", one(LARGE_CUP, 2, "disc", 1), number=3) - draw("right", number=3)).sum(2)
    rows, columns = np.nonzero(gain_HW > 30)
    assert len(rows) > 15
    assert np.ptp(rows) < 30
    assert np.ptp(columns) < 30


@pytest.mark.parametrize("eye", SIDES)
def test_b_scan__fluid_is_dark_inside_the_retina(draw: Any, eye: str) -> None:
    bare, ill = (draw(eye, *f, modality="OCT") for f in ((), (one(FLUID, 2, MACULA, 9),)))
    middle = slice(40, 88)
    top, bottom = np.argmax(ill[:, middle].mean(1) > 40), np.argmax(ill[:, middle].mean(1))
    dark = [np.mean(scan[top + 5 : bottom - 5, middle] < 25) for scan in (bare, ill)]
    retina_px = [np.argmax(s[:, 64] > 60) for s in (bare, ill)]
    assert dark[1] > 0.05
    assert retina_px[1] < retina_px[0], "fluid swells the retina"


def test_b_scan__has_a_pit_at_the_fovea(draw: Any) -> None:
    scan_HW = draw("right", modality="OCT")
    surface_W = np.argmax(np.lib.stride_tricks.sliding_window_view(scan_HW, 3, 0).mean(-1) > 60, axis=0)
    assert surface_W[60:68].mean() > surface_W[25:40].mean() + 6
    assert surface_W[60:68].mean() > surface_W[88:103].mean() + 6


def test_angiogram__is_grey_and_shows_bright_dots_and_dark_blood(draw: Any) -> None:
    bare = draw("right", modality="FFA", size=224)
    assert bare.ndim == 2
    dots = draw("right", one(MICROANEURYSMS, 2, "superotemporal", 30), modality="FFA", size=224)
    blood = draw("right", one(HAEMORRHAGES, 1, "superotemporal", 10), modality="FFA", size=224)
    assert quadrant(dots - bare > 60, "right") == "superotemporal"
    assert (bare - blood > 25).sum() > 30


@pytest.mark.parametrize("eye", SIDES)
def test_lesions__lie_in_their_place_and_in_the_field(eye: str) -> None:
    signs = {
        "superotemporal": (-1, -1),
        "inferotemporal": (-1, 1),
        "superonasal": (1, -1),
        "inferonasal": (1, 1),
    }
    for number in range(20):
        place = QUADRANTS[number % 4]
        truth = EyeTruth(eye, (one(HAEMORRHAGES, 1, place, 8),), 2)
        anatomy = draw_anatomy(1, number, 60, truth)
        view = choose_view(generator(1, number, Stream.CAMERA, eye), CAMERAS[number % 4], 128, eye == "left")
        centre_L2 = draw_lesions(1, number, truth, anatomy, view)[HAEMORRHAGES].centre_L2
        assert (np.sign(centre_L2) == signs[place]).all()
        assert np.mean([view.holds(*c) for c in centre_L2]) > 0.9


def test_vessels__leave_the_fovea_free_and_start_on_the_disc() -> None:
    for number in range(5):
        truth = EyeTruth("right", (), 0)
        anatomy = draw_anatomy(1, number, 60, truth)
        for vessels in grow_vessels(1, number, "right", anatomy):
            distance_NK = np.hypot(vessels.points_NK2[..., 0], vessels.points_NK2[..., 1])
            assert distance_NK.min() > 0.3
            trunk = vessels.points_NK2[vessels.width_NK[:, 0].argmax(), 0]
            assert np.hypot(trunk[0] - anatomy.disc_x_mm, trunk[1] - anatomy.disc_y_mm) < 0.6
            assert (np.diff(vessels.width_NK, axis=1) <= 1e-9).all()
