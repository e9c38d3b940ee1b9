"""What positive pairs add to a loss and its gradient, without a matrix of pairs.

Legend: m this rank's rows, c columns of a block, N all columns, s and t the rows and columns of a block
between which positives lie, D feature width, K a few of its features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fundusfm.losses.columns import Block
from fundusfm.losses.targets import Positives

# So many numbers at a time: on a CPU they stay in its cache, on a GPU a copy of them is small.
_PART = {"cpu": 2**17, "cuda": 2**22}
_NARROWEST = 64  # features at a time: less would leave most of what memory brings unused


@dataclass(frozen=True)
class Pulls:
    """Pair (i, j) pulls with w_ij (row_i + column_j), in the accumulation dtype; None: no column pulls."""

    positives: Positives
    row_m: Tensor
    column_N: Tensor | None

    def cosines(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Tensor:
        """sum_ij w_ij (row_i + column_j) <a_i, b_j> over the block, added up in float64."""
        rows, columns = self.positives.reach(block)
        a_sD, b_tD, pulls = a_mD[rows], b_cD[columns], self._within_reach(block)
        if self.positives.are_neighbours:
            few_s = [torch.linalg.vecdot(self._wide(a_sD[x]), self._wide(b_tD[x])) for x in _rows(a_sD)]
            pull_s = _both(*pulls)
            return torch.cat([pull_s[:0], *few_s]).double() @ pull_s.double()
        total = self.row_m.new_zeros((), dtype=torch.float64)
        for few in _features(a_sD, b_tD):
            of_rows_sK = self._of_rows(self._wide(b_tD[:, few]), pulls, block)
            total += (a_sD[:, few] * of_rows_sK).sum()
        return total

    def subtract(self, a_mD: Tensor, b_cD: Tensor, block: Block, into: tuple[Tensor, Tensor]) -> None:
        """Take the gradient of `cosines` from `into[0]` (m, D) and `into[1]` (c, D)."""
        rows, columns = self.positives.reach(block)
        a_sD, b_tD, into_sD, into_tD = a_mD[rows], b_cD[columns], into[0][rows], into[1][columns]
        pulls = self._within_reach(block)
        if self.positives.are_neighbours:
            pull_s1 = _both(*pulls)[:, None]
            for few in _rows(a_sD):
                into_sD[few].addcmul_(self._wide(b_tD[few]), pull_s1[few], value=-1)
                into_tD[few].addcmul_(self._wide(a_sD[few]), pull_s1[few], value=-1)
            return
        for few in _features(a_sD, b_tD):
            into_sD[:, few] -= self._of_rows(self._wide(b_tD[:, few]), pulls, block)
            into_tD[:, few] -= self._of_columns(self._wide(a_sD[:, few]), pulls, block)

    def _within_reach(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The pulls of rows and columns within reach, (s,) and (t,)."""
        rows, columns = self.positives.reach(block)
        return self.row_m[rows], None if self.column_N is None else self.column_N[block.index][columns]

    def _of_rows(self, b_tK: Tensor, pulls: tuple[Tensor, Tensor | None], block: Block) -> Tensor:
        """sum_j w_ij (row_i + column_j) b_j, (s, K)."""
        rows, (pull_s, pull_t) = self.positives.rows, pulls
        by_row_sK = pull_s[:, None] * rows(b_tK, block)
        return by_row_sK if pull_t is None else by_row_sK.add_(rows(pull_t[:, None] * b_tK, block))

    def _of_columns(self, a_sK: Tensor, pulls: tuple[Tensor, Tensor | None], block: Block) -> Tensor:
        """sum_i w_ij (row_i + column_j) a_i, (t, K)."""
        columns, (pull_s, pull_t) = self.positives.columns, pulls
        by_row_tK = columns(pull_s[:, None] * a_sK, block)
        return by_row_tK if pull_t is None else by_row_tK.add_(pull_t[:, None] * columns(a_sK, block))

    def _wide(self, features: Tensor) -> Tensor:
        return features.to(self.row_m.dtype)


def scaled(a_mD: Tensor, d_a_mD: Tensor, factor: Tensor) -> Tensor:
    """<a, d_a>, the derivative by the scale; `d_a_mD` is multiplied by `factor` meanwhile."""
    sums = [d_a_mD.new_zeros(())]
    for few in _rows(d_a_mD):
        sums.append((a_mD[few].to(d_a_mD.dtype) * d_a_mD[few]).sum())
        d_a_mD[few].mul_(factor)
    return torch.stack(sums).sum()


def _both(pull_s: Tensor, pull_t: Tensor | None) -> Tensor:
    """Of neighbours: row i and column i of those within reach."""
    return pull_s if pull_t is None else pull_s + pull_t


def _rows(rows_xD: Tensor) -> Iterator[slice]:
    """A few rows at a time."""
    height = max(1, _part(rows_xD) // max(1, rows_xD.shape[1]))
    return (slice(start, start + height) for start in range(0, len(rows_xD), height))


def _features(*rows_xD: Tensor) -> Iterator[slice]:
    """A few features at a time, of all rows: sums over groups of rows need all of them."""
    width = max(_NARROWEST, _part(rows_xD[0]) // max(1, *map(len, rows_xD)))
    return (slice(start, start + width) for start in range(0, rows_xD[0].shape[1], width))


def _part(features: Tensor) -> int:
    return _PART["cpu" if features.device.type == "cpu" else "cuda"]
