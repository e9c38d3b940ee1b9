from __future__ import annotations

import numpy as np
import pytest
import torch

from fundusfm.models.positions import resize_positions, sincos_table
from tests.goldens import load


@pytest.mark.parametrize("side", [7, 16, 24])
def test_golden(side: int) -> None:
    arrays, _ = load("ret_clip/pos_embed_resize_f32")
    table_PD = torch.from_numpy(arrays["in_pos_embed"])
    found = resize_positions(table_PD, side * side)
    np.testing.assert_allclose(found, arrays[f"out_grid{side}"], rtol=1e-5, atol=1e-6)
    assert found[0].equal(table_PD[0])


def test_same_grid__untouched() -> None:
    table_PD = torch.randn(17, 3)
    assert resize_positions(table_PD, 16) is table_PD


@pytest.mark.parametrize(("rows", "num_patches"), [(16, 16), (17, 15)])
def test_not_square__refused(rows: int, num_patches: int) -> None:
    with pytest.raises(ValueError, match="square"):
        resize_positions(torch.zeros(rows, 2), num_patches)


def test_golden__sines_of_mae() -> None:
    arrays, _ = load("mae/sincos_pos_embed")
    for name, table in arrays.items():
        width, side = (int(part[1:]) for part in name.removesuffix("_cls").split("_")[1:])
        found = sincos_table(width, side).numpy()
        np.testing.assert_allclose(found if name.endswith("_cls") else found[1:], table, rtol=0, atol=1e-12)


def test_golden__sines_of_urfound() -> None:
    arrays, told = load("urfound/pos_embed")
    width, side = told["scalars"]["dim"], told["scalars"]["grid"]
    np.testing.assert_allclose(sincos_table(width, side), arrays["standard_mae"], rtol=0, atol=1e-12)
    found = sincos_table(width, side, compressed=True)
    np.testing.assert_allclose(found, arrays["urfound"], rtol=0, atol=1e-12)


def test_sines__width_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_table(30, 2)
