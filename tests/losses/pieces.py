"""Pieces so small that the rows of a test make several of each kind."""

from __future__ import annotations

from fundusfm.losses import columns, pulls, tiles


def make_small() -> None:
    """Several blocks a batch, bands a tile, and parts a block; for a process of its own."""
    columns.BLOCK_COLUMNS = {"cuda": 12, "cpu": 12}
    tiles._BAND = 6
    pulls._PART = {"cuda": 16, "cpu": 16}
    pulls._NARROWEST = 2
