"""Sums over a block of logits and gradients through it, tile by tile: nothing of size rows x columns lives.

Legend: m rows of this rank, c columns of a block, D feature width, E edge of a tile.

A product wants large tiles, what is done to each of its numbers wants to stay in a core's cache: so a tile is
multiplied as a whole and gone through in bands of a few rows.

With S = scale * a b^T, the softmax loss needs sum_j e^S_ij of every row and sum_i e^S_ij of every column; the
gradient with respect to S is e^S_ij (row_weight_i + column_weight_j), less the target. All rows are of unit
length or shorter, so S <= scale: one constant shift keeps every exponential finite, and one exponential
serves both directions. Where the largest logit of a row lies so far below `scale` that its sum vanishes,
`Stable` takes over, with one running maximum a row and a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses.ranks import accumulation_dtype

Excluded = Callable[[slice, slice], Tensor] | None

# Per dtype: the largest exponent that leaves room for a sum over four million terms and for one over that
# sum, times a weight; and the smallest sum in which terms lost to underflow do not count.
_LARGEST_EXPONENT = {torch.float32: 60.0, torch.float64: 600.0}
_SMALLEST_SUM = {torch.float32: 1e-25, torch.float64: 1e-250}
_BAND = 2**17  # so many numbers a core's cache holds, with as many again besides


@dataclass
class Logits:
    """How logits come from features: `scale` and the edge of a tile (None: one tile for all)."""

    scale: float
    edge: int | None
    bias: float = 0.0
    _buffer: Tensor | None = field(default=None, init=False, repr=False)

    def tiles(
        self, a_mD: Tensor, b_cD: Tensor, shift: float = 0.0
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """(rows, columns, a, b, scale * a b^T + bias - shift) of each tile, in the accumulation dtype.

        The logits lie in a buffer that the next tile overwrites; the caller may change them in place.
        """
        dtype = accumulation_dtype(a_mD)
        edge_m = min(self.edge or len(a_mD), len(a_mD)) or 1
        edge_c = min(self.edge or len(b_cD), len(b_cD)) or 1
        buffer = self._of_size(edge_m * edge_c, a_mD, dtype)
        for row in _slices(len(a_mD), edge_m):
            a_ED = a_mD[row].to(dtype)
            for column in _slices(len(b_cD), edge_c):
                b_ED = b_cD[column].to(dtype)
                tile = buffer[: len(a_ED) * len(b_ED)].view(len(a_ED), len(b_ED))
                torch.addmm(tile, a_ED, b_ED.T, beta=0, alpha=self.scale, out=tile)
                if self.bias != shift:
                    tile += self.bias - shift
                yield row, column, a_ED, b_ED, tile

    def _of_size(self, num_logits: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The one buffer of all blocks: made anew for each, it would leave holes in memory."""
        if self._buffer is None or len(self._buffer) < num_logits:
            self._buffer = like.new_empty(num_logits, dtype=dtype)
        return self._buffer


def shift_of(largest_logit: float, dtype: torch.dtype) -> float:
    """What to subtract from logits so that no sum of exponentials overflows."""
    return max(0.0, largest_logit - _LARGEST_EXPONENT[dtype])


def has_vanished(sums: Tensor) -> Tensor:
    """Whether a sum of exponentials is too small to be trusted, as a scalar of the same dtype."""
    return (sums < _SMALLEST_SUM[sums.dtype]).any().to(sums.dtype)


def exp_sums(
    a_mD: Tensor, b_cD: Tensor, logits: Logits, shift: float, excluded: Excluded
) -> tuple[Tensor, Tensor]:
    """Sums of e^(S - shift) over the block: of rows (m,) and of columns (c,)."""
    dtype = accumulation_dtype(a_mD)
    row_m, column_c = a_mD.new_zeros(len(a_mD), dtype=dtype), a_mD.new_zeros(len(b_cD), dtype=dtype)
    for row, column, _, _, tile in logits.tiles(a_mD, b_cD, shift):
        for rows, band in _bands(row, tile):
            band.exp_()
            if excluded is not None:
                band.masked_fill_(excluded(rows, column), 0)
            row_m[rows] += band.sum(1)
            column_c[column] += band.sum(0)
    return row_m, column_c


def exp_gradients(
    a_mD: Tensor,
    b_cD: Tensor,
    logits: Logits,
    shift: float,
    weights: tuple[Tensor, Tensor],
    excluded: Excluded,
    into: tuple[Tensor, Tensor],
) -> None:
    """Add G b to `into[0]` (m, D) and G^T a to `into[1]` (c, D), G = e^(S - shift) (weight_i + weight_j)."""
    row_m, column_c = weights
    room = row_m.new_empty(0)  # one for all bands: made anew for each, it would cost more than what it is for
    for row, column, a_ED, b_ED, tile in logits.tiles(a_mD, b_cD, shift):
        for rows, band in _bands(row, tile):
            band.exp_()
            if excluded is not None:
                band.masked_fill_(excluded(rows, column), 0)
            room = room if len(room) >= band.numel() else row_m.new_empty(band.numel())
            weight = room[: band.numel()].view_as(band)
            band.mul_(torch.add(row_m[rows, None], column_c[column], out=weight))
        _push(tile, a_ED, b_ED, into[0][row], into[1][column])


def log_sums(a_mD: Tensor, b_cD: Tensor, logits: Logits, excluded: Excluded) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of S over the block: of rows (m,) and of columns (c,); -infinity where nobody is left."""
    dtype = accumulation_dtype(a_mD)
    row_m = a_mD.new_full((len(a_mD),), -torch.inf, dtype=dtype)
    column_c = a_mD.new_full((len(b_cD),), -torch.inf, dtype=dtype)
    for row, column, _, _, tile in logits.tiles(a_mD, b_cD):
        for rows, band in _bands(row, tile):
            if excluded is not None:
                band.masked_fill_(excluded(rows, column), -torch.inf)
            row_m[rows] = torch.logaddexp(row_m[rows], band.logsumexp(1))
            column_c[column] = torch.logaddexp(column_c[column], band.logsumexp(0))
    return row_m, column_c


def log_gradients(
    a_mD: Tensor,
    b_cD: Tensor,
    logits: Logits,
    offsets: tuple[Tensor, Tensor],
    excluded: Excluded,
    into: tuple[Tensor, Tensor],
) -> None:
    """As `exp_gradients` with G = e^(S - offset_i) + e^(S - offset_j); an infinite offset takes no part."""
    row_m, column_c = offsets
    for row, column, a_ED, b_ED, tile in logits.tiles(a_mD, b_cD):
        for rows, band in _bands(row, tile):
            of_columns = (band - column_c[column]).exp_()
            band.sub_(row_m[rows, None]).exp_().add_(of_columns)
            if excluded is not None:
                band.masked_fill_(excluded(rows, column), 0)
        _push(tile, a_ED, b_ED, into[0][row], into[1][column])


def softplus_sum(a_mD: Tensor, b_cD: Tensor, logits: Logits, excluded: Excluded) -> Tensor:
    """Sum of log(1 + e^S) over the block, added up in float64."""
    total = a_mD.new_zeros((), dtype=torch.float64)
    for row, column, _, _, tile in logits.tiles(a_mD, b_cD):
        for rows, band in _bands(row, tile):
            value = F.softplus(band)
            if excluded is not None:
                value.masked_fill_(excluded(rows, column), 0)
            total += value.sum()
    return total


def sigmoid_gradients(
    a_mD: Tensor, b_cD: Tensor, logits: Logits, excluded: Excluded, into: tuple[Tensor, Tensor]
) -> Tensor:
    """As `exp_gradients` with G = sigmoid(S); returns the sum of G, the gradient of the bias, in float64."""
    total = a_mD.new_zeros((), dtype=torch.float64)
    for row, column, a_ED, b_ED, tile in logits.tiles(a_mD, b_cD):
        for rows, band in _bands(row, tile):
            band.sigmoid_()
            if excluded is not None:
                band.masked_fill_(excluded(rows, column), 0)
            total += band.sum()
        _push(tile, a_ED, b_ED, into[0][row], into[1][column])
    return total


def _push(weight: Tensor, a_ED: Tensor, b_ED: Tensor, into_a: Tensor, into_b: Tensor) -> None:
    into_a.addmm_(weight, b_ED)
    into_b.addmm_(weight.T, a_ED)


def _slices(length: int, edge: int) -> Iterator[slice]:
    return (slice(start, min(start + edge, length)) for start in range(0, length, edge))


def _bands(row: slice, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few rows of a tile at a time, with their numbers in the block; on a GPU all at once."""
    height = len(tile) if tile.device.type != "cpu" else max(1, _BAND // tile.shape[1])
    for band in _slices(len(tile), height):
        yield slice(row.start + band.start, row.start + band.stop), tile[band]
