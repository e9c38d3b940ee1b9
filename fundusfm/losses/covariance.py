"""Covariance losses (Eckart-Young, Barlow Twins, VICReg) of the joint batch, exact on any number of ranks.

Legend: M views, B this rank's rows, D feature width, n the valid rows of all ranks.

Each loss is a function of a few sums over the joint batch, f(T) with T = T_1 + ... + T_W: the sums of the
features, D x D products of centred features, some scalars. Only these travel, never a row:

    forward     M x D sums and the count n, hence the joint mean m; then the products of z - m
    backward    nothing: T is the same on every rank, so each has df/dT and continues to its own rows alone

The mean needs no gradient of its own. A product S = sum (x - m)(y - m)^T changes with m by
-sum (x - m) dm^T - dm sum (y - m)^T, and the rows x - m sum to zero; the derivative taken with m held fixed
is the whole derivative. Centring before the products, instead of subtracting n m m^T from raw ones, costs
those few numbers more on the wire and keeps the digits that a large mean would take from a 32-bit sum.

Every rank returns the same loss, and what leaves backward is multiplied by the number of ranks W, so that
the average over ranks that data-parallel training takes is the gradient of that loss. Ranks may bring
different numbers of rows, or none. With fewer than two valid rows in the joint batch there is no covariance:
the loss is 0 with zero gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundusfm.errors import UserError
from fundusfm.losses.ranks import Group, Ranks, accumulation_dtype, sum_over_ranks


def eckart_young_loss(
    views_BD: Sequence[Tensor],
    *,
    independent_BD: Sequence[Tensor] | None = None,
    valid_B: Tensor | None = None,
    valid_independent_B: Tensor | None = None,
    form: Literal["paper", "mean"] = "paper",
    group: Group = None,
) -> Tensor:
    """SSL-EY, -2 tr A + tr(B B'), equal on all ranks. Collective over `group`.

    `views_BD`: two or more views of this rank's rows, (B, D) each. With C_ij the covariance (divisor n - 1)
    of views i and j, `form="paper"` has A = sum of C_ij over i != j and B = sum of C_ii; `form="mean"`, the
    one of cca_zoo, has A = 1/M times the sum over all i and j, own pairs included, and B = 1/M times the sum
    of C_ii. B' is B unless `independent_BD`, the same number of views of other rows, is given: then it is B
    of that batch, which makes the penalty unbiased, and it has a gradient as well (detach it to have none).
    `valid_B`: true where all views of a row are present; other rows are ignored, whatever they hold.
    The loss has no weight to tune. It is 0 for constant features and, in the paper's form with B' = B, never
    less than -(M - 1)^2 D.

    Chapman, Wells and Aguila, "Unconstrained stochastic CCA", 2024 (arXiv 2310.01012), section on SSL.
    """
    if form not in ("paper", "mean"):
        raise ValueError(f"form is 'paper' or 'mean', not {form!r}")
    if independent_BD is None and valid_independent_B is not None:
        raise ValueError("valid_independent_B is given without independent_BD")
    local = [_Local(tuple(views_BD), valid_B)]
    if independent_BD is not None:
        local.append(_Local(tuple(independent_BD), valid_independent_B))
    ranks = Ranks.of(group)
    dtype = _agree(local, ranks)
    with torch.autocast(local[0].views_BD[0].device.type, enabled=False):
        sums = [_eckart_young_sums(batch, dtype, ranks, form) for batch in local]
        first, other = sums[0], sums[-1]
        loss = (first.within_DD * other.within_DD).sum() - 2 * first.between
        return _if_enough_rows(torch.minimum(first.num_rows, other.num_rows), loss)


def barlow_twins_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    *,
    off_diagonal: float = 0.005,
    eps: float = 1e-5,
    valid_B: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Sum of (1 - R_kk)^2 plus `off_diagonal` times that of R_kl^2, the same on all. Collective over `group`.

    R is the cross-correlation (D, D) of the two views after batch normalisation without affine, by mean and
    variance (divisor n) of the joint batch: centred columns are divided by sqrt(var + `eps`).
    `a_BD`, `b_BD`: this rank's rows of the two views. `valid_B`: true where both views of a row are present.

    Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins", ICML 2021 (arXiv 2103.03230).
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, not {eps}: a constant feature would have no gradient")
    local, ranks = _Local((a_BD, b_BD), valid_B), Ranks.of(group)
    dtype = _agree([local], ranks)
    with torch.autocast(a_BD.device.type, enabled=False):
        joint = _Joint.of(local, dtype, ranks)
        a, b = joint.centred_MBD
        cross_DD, squares_MD = sum_over_ranks(ranks, _product(a, b), joint.centred_MBD.square().sum(1))
        n = joint.num_rows.clamp(min=1)
        std_MD = (squares_MD / n + eps).sqrt()
        correlation_DD = cross_DD / n / std_MD[0, :, None] / std_MD[1]
        loss = (1 - correlation_DD.diagonal()).square().sum()
        loss = loss + off_diagonal * _without_diagonal(correlation_DD).square().sum()
        return _if_enough_rows(joint.num_rows, loss)


def vicreg_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    *,
    similarity: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
    valid_B: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """`similarity` s + `variance` v + `covariance` c, equal on all ranks. Collective over `group`.

    s is the mean of (a - b)^2 over n x D elements; v the sum over both views of the mean over D of
    relu(1 - sqrt(var + `eps`)); c the sum over both views of the squared covariances off the diagonal,
    divided by D. Variance and covariance are those of the joint batch, divisor n - 1. This is the paper's
    algorithm; its released code halves v, which is `variance=12.5` here.
    `a_BD`, `b_BD`: this rank's rows of the two views. `valid_B`: true where both views of a row are present.

    Bardes, Ponce and LeCun, "VICReg", ICLR 2022 (arXiv 2105.04906), algorithm 1.
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, not {eps}: a constant feature would have no finite gradient")
    local, ranks = _Local((a_BD, b_BD), valid_B), Ranks.of(group)
    dtype = _agree([local], ranks)
    with torch.autocast(a_BD.device.type, enabled=False):
        joint = _Joint.of(local, dtype, ranks)
        distance = (joint.rows_MBD[0] - joint.rows_MBD[1]).square().sum()
        products_MDD = _product(joint.centred_MBD, joint.centred_MBD)
        distance, products_MDD = sum_over_ranks(ranks, distance, products_MDD)
        width = products_MDD.shape[-1]
        covariance_MDD = products_MDD / (joint.num_rows - 1).clamp(min=1)
        std_MD = (covariance_MDD.diagonal(dim1=1, dim2=2) + eps).sqrt()
        loss = (
            similarity * distance / (width * joint.num_rows.clamp(min=1))
            + variance * (1 - std_MD).relu().mean(1).sum()
            + covariance * _without_diagonal(covariance_MDD).square().sum() / width
        )
        return _if_enough_rows(joint.num_rows, loss)


@dataclass(frozen=True)
class _Local:
    """What this rank's caller gave: the views and which rows count."""

    views_BD: tuple[Tensor, ...]
    valid_B: Tensor | None

    def fault(self) -> str:
        """What is wrong with these tensors; empty if nothing is."""
        shapes = [tuple(view.shape) for view in self.views_BD]
        if len(shapes) < 2:
            return "there is only one view"
        if any(len(shape) != 2 for shape in shapes) or len(set(shapes)) > 1:
            return f"the views are not all rows x width of one shape: {', '.join(map(str, shapes))}"
        if self.valid_B is not None and (
            self.valid_B.dtype != torch.bool or self.valid_B.shape != shapes[0][:1]
        ):
            found = f"{self.valid_B.dtype}, shape {tuple(self.valid_B.shape)}"
            return f"validity must be one boolean a row, for {shapes[0][0]} rows; it is {found}"
        return ""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the sums."""
        return reduce(torch.promote_types, map(accumulation_dtype, self.views_BD))

    def facts(self) -> list[int]:
        """What must be the same on all ranks, or their sums do not fit: views, width, precision."""
        width = self.views_BD[0].shape[-1] if self.views_BD[0].ndim else 0
        return [len(self.views_BD), width, torch.finfo(self.dtype).bits]


@dataclass(frozen=True)
class _Joint:
    """This rank's rows, invalid ones zero, and the same rows around the mean of the joint batch."""

    rows_MBD: Tensor
    centred_MBD: Tensor
    num_rows: Tensor

    @classmethod
    def of(cls, local: _Local, dtype: torch.dtype, ranks: Ranks) -> _Joint:
        rows_MBD = torch.stack([view.to(dtype) for view in local.views_BD])
        valid_B = local.valid_B
        if valid_B is None:
            valid_B = rows_MBD.new_ones(rows_MBD.shape[1], dtype=torch.bool)
        # Filled, not multiplied by zero: an invalid row may hold anything, NaN too.
        rows_MBD = rows_MBD.masked_fill(~valid_B[:, None], 0)
        with torch.no_grad():
            sums = torch.cat([rows_MBD.sum(1).flatten(), valid_B.sum().to(dtype)[None]])
            sums = ranks.reduce(sums, "sum")
            num_rows = sums[-1]
            mean_M1D = sums[:-1].view(len(rows_MBD), 1, -1) / num_rows.clamp(min=1)
        return cls(rows_MBD, (rows_MBD - mean_M1D).masked_fill(~valid_B[:, None], 0), num_rows)


@dataclass(frozen=True)
class _EckartYoungSums:
    between: Tensor
    within_DD: Tensor
    num_rows: Tensor


def _eckart_young_sums(local: _Local, dtype: torch.dtype, ranks: Ranks, form: str) -> _EckartYoungSums:
    """The trace of A and the matrix B of one batch: the sum over all i and j of C_ij has the trace of the
    covariance of the summed views, so no product of two different views is needed.
    """
    joint = _Joint.of(local, dtype, ranks)
    every_row = joint.centred_MBD.flatten(0, 1)
    within_DD, all_pairs = sum_over_ranks(
        ranks, _product(every_row, every_row), joint.centred_MBD.sum(0).square().sum()
    )
    divisor = (joint.num_rows - 1).clamp(min=1)
    if form == "mean":
        divisor = divisor * len(local.views_BD)
        return _EckartYoungSums(all_pairs / divisor, within_DD / divisor, joint.num_rows)
    return _EckartYoungSums((all_pairs - within_DD.trace()) / divisor, within_DD / divisor, joint.num_rows)


class _Product(torch.autograd.Function):
    """`a^T b` over rows, without autocast in backward too: a backward called under it would round to bf16."""

    @staticmethod
    def forward(ctx: Any, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        ctx.save_for_backward(a_BD, b_BD)
        return a_BD.mT @ b_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DD: Tensor) -> tuple[Tensor, Tensor]:
        a_BD, b_BD = ctx.saved_tensors
        with torch.autocast(grad_DD.device.type, enabled=False):
            return b_BD @ grad_DD.mT, a_BD @ grad_DD


def _product(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    product_DD: Tensor = _Product.apply(a_BD, b_BD)
    return product_DD


def _without_diagonal(matrix_DD: Tensor) -> Tensor:
    """A square matrix, or several, with zeros on the diagonal."""
    return matrix_DD - matrix_DD.diagonal(dim1=-2, dim2=-1).diag_embed()


def _if_enough_rows(num_rows: Tensor, loss: Tensor) -> Tensor:
    return torch.where(num_rows >= 2, loss, 0)


def _agree(batches: Sequence[_Local], ranks: Ranks) -> torch.dtype:
    """The precision of the sums; or, if any rank has bad input, the same UserError on all of them.

    Checked before the first sum, because a rank that raised alone would leave the others waiting for it.
    """
    if not all(batch.views_BD for batch in batches):
        raise ValueError("a covariance loss needs at least two views, there is none")
    facts = batches[0].facts()
    fault = next(filter(None, (batch.fault() for batch in batches)), "")
    if not fault and batches[-1].facts() != facts:
        fault = f"the first batch has {_words(facts)}, the independent one {_words(batches[-1].facts())}"
    if ranks.size > 1:
        fault = _faults_of_all(fault, [*facts, len(batches)], batches[0].views_BD[0].device, ranks)
    if fault:
        raise UserError(
            "the views given to a covariance loss do not fit together",
            where=fault,
            fix="give two views or more of one shape (rows, width), one boolean a row if any is invalid; "
            "number of views, width and precision are the same on all ranks, the number of rows need not be",
        )
    return batches[0].dtype


def _faults_of_all(fault: str, facts: list[int], device: torch.device, ranks: Ranks) -> str:
    """Empty if no rank has a fault and all have the same facts; else what each rank has, in rank order."""
    both_signs = [int(bool(fault)), *facts, *(-fact for fact in facts)]
    found, *highest = ranks.reduce(torch.tensor(both_signs, device=device), "max").tolist()
    lowest = [-negative for negative in highest[len(facts) :]]
    if not found and highest[: len(facts)] == lowest:
        return ""
    told: list[str] = [""] * ranks.size
    mine = fault or f"{_words(facts[:3])}, {'an' if facts[3] == 2 else 'no'} independent batch"
    dist.all_gather_object(told, mine, group=ranks.group)
    return " | ".join(f"rank {rank}: {text}" for rank, text in enumerate(told))


def _words(facts: list[int]) -> str:
    num_views, width, num_bits = facts
    return f"{num_views} views of width {width} summed in float{num_bits}"
