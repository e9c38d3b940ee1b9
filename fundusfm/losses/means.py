"""Means over everything that all ranks hold: of rows, of hidden patches, of hidden words.

Legend: B this rank's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fundusfm.losses.ranks import Group, Ranks, accumulation_dtype, sum_over_ranks


def global_mean(sum_B: Tensor, count_B: Tensor, group: Group = None) -> Tensor:
    """The sum of `sum_B` over the sum of `count_B`, both over the rows of all ranks. Collective.

    `sum_B`: what each row adds up to; `count_B` >= 0: over how many things, so that a mean of rows with
    unequal numbers of patches or words is the mean of these, not of the rows. A row that counts nothing is
    left out whatever its sum is, and the mean of nothing is 0 with zero gradients. Ranks may bring different
    numbers of rows, none included. `group`: None for all ranks, `"rank"` for this rank's rows alone.

    The mean is the same on every rank. Its gradient is multiplied by the number of ranks, so that averaging
    parameter gradients over ranks gives the gradient of the mean.
    """
    assert sum_B.shape == count_B.shape
    dtype = accumulation_dtype(sum_B)
    with torch.autocast(sum_B.device.type, enabled=False):
        counted_B = torch.where(count_B > 0, sum_B.to(dtype), 0)
        ranks = Ranks.of(group)
        total, count = sum_over_ranks(ranks, counted_B.sum(), count_B.detach().sum().to(dtype))
        return total / torch.where(count > 0, count, 1)
