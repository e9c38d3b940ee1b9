"""The symmetric contrastive loss over a global batch, exact on any number of ranks, linear in memory.

Legend: B this rank's rows as given, m and n its valid rows of a and b, N all valid rows of b ("columns"), c
those of one block, D feature width. The derivation stands in `losses/README.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundusfm.losses import tiles
from fundusfm.losses.columns import Block, Gather
from fundusfm.losses.prepare import Backend, Given, Mask, Prepared, prepare
from fundusfm.losses.pulls import Pulls, scaled
from fundusfm.losses.ranks import Group, accumulation_dtype
from fundusfm.losses.ring import Ring
from fundusfm.losses.softmax import Shifted, Softmax, Stable, Whole
from fundusfm.losses.targets import Diagonal, Target
from fundusfm.losses.tiles import Logits

EDGE = 1024  # of a tile: large enough for full speed of the product
_SMALL = 2**20  # so many logits of a rank are kept rather than computed twice


def contrastive_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    scale: Tensor,
    *,
    target: Target = Diagonal(),  # noqa: B008  (immutable)
    valid_a_B: Tensor | None = None,
    valid_b_B: Tensor | None = None,
    weight_a_B: Tensor | None = None,
    weight_b_B: Tensor | None = None,
    mask: Mask = None,
    group: Group = None,
    tile: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Half the mean cross-entropy of the rows of `scale * a b^T` plus half that of its columns. Collective.

    `a_BD`, `b_BD`: this rank's unit rows (or zero rows); ranks may bring different numbers, none included.
    `scale`: one element. An invalid row is neither query nor candidate; a valid row without a valid positive
    stays a candidate for the others but has no term of its own. Without any term the loss is 0 with zero
    gradients. `weight_*_B` >= 0 weigh the terms of rows in their means; like targets they get no gradient.
    `mask`: see `SameId`. `group`: None
    for all ranks, `"rank"` for this rank's rows alone.

    `tile`: edge of a tile. `backend`: `tiled` needs memory for one tile; `ring` holds one remote block more
    instead of all of b; `dense` keeps every logit; `triton` is one fused kernel; `auto` chooses by size.

    Returns the loss over all ranks, the same on each. Its gradient is multiplied by the number of ranks, so
    that averaging parameter gradients over ranks gives the gradient of the loss.
    Raises `UserError` on all ranks if any brings rows, widths or ids that cannot be used.
    """
    weights = (weight_a_B, weight_b_B)
    given = Given(a_BD, b_BD, scale, target, (valid_a_B, valid_b_B), weights, mask, backend, tile)
    with torch.autocast(a_BD.device.type, enabled=False):
        ready = prepare(given, group)
        plan = _plan(ready, weights, backend, tile)
        loss: Tensor = _StripLoss.apply(ready.a_mD, ready.b_nD, scale, plan)
    return loss


@dataclass
class _Plan:
    """All that is known before features travel.

    `weight_m`, `weight_N`: of the log-sum-exp of rows and columns in the loss; `pulls`: these divided by the
    mass of the row or column.
    """

    exchange: Gather | Ring
    softmax: Softmax
    fallback: Softmax
    pulls: Pulls
    weight_m: Tensor
    weight_N: Tensor
    scale: float


def _plan(
    ready: Prepared, weights: tuple[Tensor | None, Tensor | None], backend: Backend, tile: int | None
) -> _Plan:
    dtype = accumulation_dtype(ready.a_mD)
    sides, columns = ready.sides, ready.sides.columns
    masses = ready.positives.row_mass(dtype), ready.positives.column_mass(dtype)
    # A row without positives has no term; whatever weight it was given does not count in the mean.
    weight_m, weight_n = (
        (mass > 0).to(dtype) * (1.0 if weight_B is None else choose(weight_B).to(dtype))
        for mass, weight_B, choose in zip(masses, weights, (sides.of_a, sides.of_b), strict=True)
    )
    totals = ready.ranks.reduce(torch.stack([weight_m.sum(), weight_n.sum()]), "sum")
    weight_m, weight_n = (
        torch.where(w > 0, w / (2 * t), 0) for w, t in zip((weight_m, weight_n), totals, strict=True)
    )
    pull_m, pull_n = (torch.where(w > 0, w / m, 0) for w, m in zip((weight_m, weight_n), masses, strict=True))
    of_columns_N2 = columns.gather(torch.stack([weight_n, pull_n], 1))
    logits = Logits(ready.scale, tile or EDGE)
    shift = tiles.shift_of(ready.largest_logit, dtype)
    return _Plan(
        exchange=ready.exchange(backend),
        softmax=_softmax(backend, logits, shift, ready),
        fallback=Stable(logits, ready.exclusions),
        pulls=Pulls(ready.positives, pull_m, of_columns_N2[:, 1]),
        weight_m=weight_m,
        weight_N=of_columns_N2[:, 0],
        scale=ready.scale,
    )


def _softmax(backend: Backend, logits: Logits, shift: float, ready: Prepared) -> Softmax:
    if backend == "auto":  # ranks need not choose alike: what travels is the same
        backend = "dense" if len(ready.a_mD) * ready.sides.columns.total <= _SMALL else "tiled"
    if backend == "triton":
        # Imported when asked for: it needs a package that only comes with PyTorch for GPUs.
        from fundusfm.losses.triton_contrastive import Fused

        paired = ready.positives if ready.positives.is_paired else None
        return Fused(logits, shift, ready.exclusions, paired)
    if backend == "dense":
        return Whole(logits, shift, ready.exclusions)
    return Shifted(logits, shift, ready.exclusions)


class _StripLoss(torch.autograd.Function):
    """One strip of logits a rank; recomputed in backward, so nothing of size m x N is kept."""

    @staticmethod
    def forward(ctx: Any, a_mD: Tensor, b_nD: Tensor, scale: Tensor, plan: _Plan) -> Tensor:
        blocks, kept_cD = arriving(plan.exchange, b_nD)
        row_m, column_N, pulled = _sums(plan, a_mD, blocks)
        if _has_vanished(plan, row_m, column_N):
            plan.softmax = plan.fallback
            row_m, column_N, pulled = _sums(plan, a_mD, plan.exchange.kept(kept_cD))
        columns, softmax = plan.exchange.columns, plan.softmax
        # The columns' terms are known to every rank; each adds its own ones.
        weight_n, column_n = plan.weight_N[columns.own], column_N[columns.own]
        loss = (
            _weighted(plan.weight_m, softmax.log(row_m)) + _weighted(weight_n, softmax.log(column_n)) - pulled
        )
        row_m, column_N = softmax.weights(row_m, plan.weight_m), softmax.weights(column_N, plan.weight_N)
        ctx.save_for_backward(a_mD, row_m, column_N, *kept_cD)
        ctx.plan, ctx.num_b = plan, len(b_nD)
        ctx.scale_shape, ctx.scale_dtype = scale.shape, scale.dtype
        return columns.ranks.reduce(loss, "sum").to(row_m.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # which may be on where gradients are asked for
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    plan: _Plan = ctx.plan
    a_mD, row_m, column_N, *kept_cD = ctx.saved_tensors
    exchange, dtype = plan.exchange, row_m.dtype
    d_a_mD = torch.zeros_like(a_mD, dtype=dtype)
    for block, b_cD in exchange.kept(kept_cD):
        d_b_cD = exchange.gradient(b_cD, dtype)
        plan.softmax.push(a_mD, b_cD, block, (row_m, column_N[block.index]), (d_a_mD, d_b_cD))
        plan.pulls.subtract(a_mD, b_cD, block, (d_a_mD, d_b_cD))
        exchange.give_back(d_b_cD, block)
    d_b_nD = exchange.received()
    if d_b_nD is None:
        d_b_nD = d_a_mD.new_zeros(ctx.num_b, a_mD.shape[1])
    # <dL/dS, cosines>, and the products above lack the scale so far.
    factor = grad * exchange.columns.ranks.size
    d_scale = scaled(a_mD, d_a_mD, factor * plan.scale) * factor
    d_b_nD.mul_(factor * plan.scale)
    d_scale = d_scale.to(ctx.scale_dtype).reshape(ctx.scale_shape)
    return d_a_mD.to(a_mD.dtype), d_b_nD.to(a_mD.dtype), d_scale, None


def _sums(plan: _Plan, a_mD: Tensor, blocks: Iterable[tuple[Block, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of this rank's rows (m,), of all columns over ranks (N,), and its positives' pull."""
    row_m, column_N = None, torch.zeros_like(plan.weight_N)
    pulled = plan.weight_N.new_zeros((), dtype=torch.float64)
    for block, b_cD in blocks:
        more_m, column_N[block.index] = plan.softmax.block_sums(a_mD, b_cD, block)
        row_m = more_m if row_m is None else plan.softmax.add(row_m, more_m)
        pulled += plan.scale * plan.pulls.cosines(a_mD, b_cD, block)
    row_m = plan.weight_m if row_m is None else row_m  # no columns anywhere: all weights are zero
    return row_m, plan.softmax.over_ranks(column_N, plan.exchange.columns.ranks), pulled


def _has_vanished(plan: _Plan, row_m: Tensor, column_N: Tensor) -> bool:
    """Whether a sum that counts, on any rank, is too small to be trusted. Collective."""
    if plan.softmax is plan.fallback:
        return False
    pairs = ((plan.weight_m, row_m), (plan.weight_N, column_N))
    flags = [tiles.has_vanished(torch.where(weight > 0, sums, 1)) for weight, sums in pairs]
    return bool(plan.exchange.columns.ranks.reduce(torch.stack(flags).max(), "max"))


def arriving(exchange: Gather | Ring, b_nD: Tensor) -> tuple[Iterator[tuple[Block, Tensor]], list[Tensor]]:
    """The blocks as they come, and what backward wants of them: a list that may fill meanwhile."""
    if not exchange.keeps_blocks:
        return exchange.blocks(b_nD), [b_nD]
    kept_cD: list[Tensor] = []
    return _keeping(exchange.blocks(b_nD), kept_cD), kept_cD


def _keeping(blocks: Iterable[tuple[Block, Tensor]], kept_cD: list[Tensor]) -> Iterator[tuple[Block, Tensor]]:
    for block, b_cD in blocks:
        kept_cD.append(b_cD)
        yield block, b_cD


def _weighted(weight_x: Tensor, log_x: Tensor) -> Tensor:
    """In float64, as `Pulls.cosines`: what is left of them may be far smaller than they are."""
    return torch.where(weight_x > 0, weight_x.double() * log_x.double(), 0).sum()
