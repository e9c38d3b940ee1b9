"""Rows of all ranks on each of them, differentiable, for what every row must see: KeepFIT's expert set.

Legend: n this rank's rows, N those of all ranks, K any width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundusfm.losses.columns import Columns
from fundusfm.losses.ranks import Group, Ranks


def gather_rows(rows_nK: Tensor, group: Group = None) -> Tensor:
    """The rows of all ranks (N, K), rank by rank. Collective.

    Ranks may bring different numbers of rows, none included. The gradient of a row is the sum of what all
    ranks make of it, so backward is collective, too. It is for losses whose gradients are multiplied by the
    number of ranks, as `global_mean` gives them.
    `group`: None for all ranks, `"rank"` for this rank's rows alone.
    """
    ranks = Ranks.of(group)
    if ranks.size == 1:
        return rows_nK
    counts: list[int] = ranks.gather(torch.tensor([len(rows_nK)], device=rows_nK.device)).tolist()
    out: Tensor = _GatherRows.apply(rows_nK, Columns(tuple(counts), ranks, rows_nK.device))
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_nK: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return columns.gather(rows_nK).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor, None]:
        columns: Columns = ctx.columns
        return columns.ranks.reduce(grad_NK.clone(), "sum")[columns.own], None
