"""Position tables: fixed ones of sines and cosines, learned ones moved to another grid.

Legend: P positions of a table, the class row first; D its width.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor


def resize_positions(table_PD: Tensor, num_patches: int, *, aligned: bool = True) -> Tensor:
    """A table of one class row and a square grid resized to `num_patches` + 1 rows; the class row is kept.

    Bicubic without anti-aliasing; with `aligned` corners as RET-CLIP and Chinese-CLIP do on loading, without
    as masked autoencoders (RETFound, UrFound) do.
    """
    old, new = math.isqrt(len(table_PD) - 1), math.isqrt(num_patches)
    if old * old != len(table_PD) - 1 or new * new != num_patches:
        raise ValueError(f"{len(table_PD) - 1} and {num_patches} patches must both be square grids")
    if old == new:
        return table_PD
    grid = rearrange(table_PD[1:], "(h w) d -> 1 d h w", h=old)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=aligned)
    return torch.cat([table_PD[:1], rearrange(grid, "1 d h w -> (h w) d")])


def sincos_table(width: int, side: int, *, compressed: bool = False) -> Tensor:
    """The fixed table (1 + side * side, width) of masked autoencoders: a zero row for the class token first.

    Half of the columns tell a patch's column, half its row, each by sines and then cosines of frequencies
    from 1 down to about 1/10000. `compressed`: UrFound's own, whose lowest frequency is about 1/10.
    """
    if width % 4:
        raise ValueError(f"a table of sines needs a width divisible by 4, not {width}")
    count = width // 4
    share = torch.arange(count, dtype=torch.float64) / (4 * count if compressed else count)
    place = torch.arange(side, dtype=torch.float64)
    angle = place[:, None] * 10000.0**-share
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = code[None].expand(side, -1, -1), code[:, None].expand(-1, side, -1)
    table_PD = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([table_PD.new_zeros(1, width), table_PD])
