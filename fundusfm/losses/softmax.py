"""Four ways to the same sums: tiles with one shift, tiles with running maxima, whole blocks, a fused kernel.

Legend: m rows of this rank, c columns of a block, N all columns, D feature width.

Each is asked once a block in forward for the sums of rows and columns, and once a block in backward to push
the gradient through the logits. What its sums mean (plain, shifted, logarithms) is its own matter:
`weights` turns them into what its backward wants, `log` into log-sum-exp.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fundusfm.losses import tiles
from fundusfm.losses.columns import Block
from fundusfm.losses.ranks import Ranks, accumulation_dtype
from fundusfm.losses.targets import Exclusions
from fundusfm.losses.tiles import Excluded, Logits

Pair = tuple[Tensor, Tensor]


class Softmax(Protocol):
    """Sums of e^S over rows and columns, and the gradient through S."""

    def block_sums(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Pair: ...

    def add(self, total: Tensor, more: Tensor) -> Tensor:
        """Two sums over disjoint sets, joined."""

    def over_ranks(self, sums_N: Tensor, ranks: Ranks) -> Tensor:
        """The sums of columns over the rows of all ranks. Collective."""

    def log(self, sums: Tensor) -> Tensor:
        """Log-sum-exp."""

    def weights(self, sums: Tensor, weight: Tensor) -> Tensor:
        """What `push` wants of a sum whose log-sum-exp weighs `weight` in the loss."""

    def push(self, a_mD: Tensor, b_cD: Tensor, block: Block, weights: Pair, into: Pair) -> None:
        """Add G b and G^T a, G the derivative of the weighted log-sum-exps with respect to S."""


class Shifted:
    """One constant shift, one exponential for both directions."""

    def __init__(self, logits: Logits, shift: float, exclusions: Exclusions | None) -> None:
        self._logits, self._shift, self._exclusions = logits, shift, exclusions

    def block_sums(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Pair:
        return tiles.exp_sums(a_mD, b_cD, self._logits, self._shift, left_out(self._exclusions, block))

    def add(self, total: Tensor, more: Tensor) -> Tensor:
        return total + more

    def over_ranks(self, sums_N: Tensor, ranks: Ranks) -> Tensor:
        return ranks.reduce(sums_N, "sum")

    def log(self, sums: Tensor) -> Tensor:
        return sums.log() + self._shift

    def weights(self, sums: Tensor, weight: Tensor) -> Tensor:
        return torch.where(weight > 0, weight / sums, 0)

    def push(self, a_mD: Tensor, b_cD: Tensor, block: Block, weights: Pair, into: Pair) -> None:
        excluded = left_out(self._exclusions, block)
        tiles.exp_gradients(a_mD, b_cD, self._logits, self._shift, weights, excluded, into)


class Whole(Shifted):
    """Exponentials of whole blocks, kept for backward: the least arithmetic, memory rows x columns."""

    def __init__(self, logits: Logits, shift: float, exclusions: Exclusions | None) -> None:
        super().__init__(logits, shift, exclusions)
        self._kept: dict[int, Tensor] = {}

    def block_sums(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Pair:
        dtype = accumulation_dtype(a_mD)
        cosine_mc = a_mD.to(dtype) @ b_cD.to(dtype).T
        exp_mc = cosine_mc.mul_(self._logits.scale).sub_(self._shift).exp_()
        excluded = left_out(self._exclusions, block)
        if excluded is not None:
            exp_mc.masked_fill_(excluded(slice(None), slice(None)), 0)
        self._kept[id(block)] = exp_mc
        return exp_mc.sum(1), exp_mc.sum(0)

    def push(self, a_mD: Tensor, b_cD: Tensor, block: Block, weights: Pair, into: Pair) -> None:
        grad_mc = self._kept[id(block)] * (weights[0][:, None] + weights[1])
        into[0].addmm_(grad_mc, b_cD.to(grad_mc.dtype))
        into[1].addmm_(grad_mc.T, a_mD.to(grad_mc.dtype))


class Stable:
    """A running maximum a row and a column: for rows whose every logit lies far below the scale."""

    def __init__(self, logits: Logits, exclusions: Exclusions | None) -> None:
        self._logits, self._exclusions = logits, exclusions

    def block_sums(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Pair:
        return tiles.log_sums(a_mD, b_cD, self._logits, left_out(self._exclusions, block))

    def add(self, total: Tensor, more: Tensor) -> Tensor:
        return torch.logaddexp(total, more)

    def over_ranks(self, sums_N: Tensor, ranks: Ranks) -> Tensor:
        highest_N = ranks.reduce(sums_N.clone(), "max").clamp(min=torch.finfo(sums_N.dtype).min)
        return ranks.reduce((sums_N - highest_N).exp(), "sum").log() + highest_N

    def log(self, sums: Tensor) -> Tensor:
        return sums

    def weights(self, sums: Tensor, weight: Tensor) -> Tensor:
        return torch.where(weight > 0, sums - weight.log(), torch.inf)

    def push(self, a_mD: Tensor, b_cD: Tensor, block: Block, weights: Pair, into: Pair) -> None:
        tiles.log_gradients(a_mD, b_cD, self._logits, weights, left_out(self._exclusions, block), into)


def left_out(exclusions: Exclusions | None, block: Block) -> Excluded:
    """The pairs of a block's tile that are no candidates, as a function of rows and columns."""
    if exclusions is None:
        return None
    return lambda row, column: exclusions.tile(row, column, block)
