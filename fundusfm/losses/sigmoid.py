"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343) over a global batch: exact, linear in memory.

Legend: B this rank's rows as given, m and n its valid rows of a and b, D feature width.

With x_ij = scale * a_i b_j + bias and targets w_ij in [0, 1], the loss is

    sum over pairs of [log(1 + e^x_ij) - w_ij x_ij] / number of valid rows of a on all ranks

which for w in {0, 1} is SigLIP's sum of -log sigmoid(+-x). As in the contrastive loss b travels once, tiles
are recomputed in backward, and positives never enter a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundusfm.losses import tiles
from fundusfm.losses.columns import Block, Gather
from fundusfm.losses.contrastive import EDGE, arriving
from fundusfm.losses.prepare import Backend, Given, Mask, Prepared, prepare
from fundusfm.losses.pulls import Pulls, scaled
from fundusfm.losses.ranks import Group, accumulation_dtype
from fundusfm.losses.ring import Ring
from fundusfm.losses.softmax import left_out
from fundusfm.losses.targets import Diagonal, LabelOverlap, Target
from fundusfm.losses.tiles import Logits


def sigmoid_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    target: Target = Diagonal(),  # noqa: B008  (immutable)
    valid_a_B: Tensor | None = None,
    valid_b_B: Tensor | None = None,
    mask: Mask = None,
    group: Group = None,
    tile: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Every pair of the global batch as a yes-or-no question of its own. Collective.

    Arguments, errors and the convention of gradients as in `contrastive_loss`; `bias`: one element. `target`
    must weigh pairs between 0 and 1, which `LabelOverlap` does not. `backend`: `tiled` (also by `auto`) or
    `ring`. Without any valid row the loss is 0 with zero gradients.
    """
    if backend not in ("auto", "tiled", "ring"):
        raise ValueError(f"the sigmoid loss has the backends auto, tiled and ring, not {backend!r}")
    if isinstance(target, LabelOverlap):
        raise TypeError("numbers of shared labels are no probabilities; use SameGroup or Soft")
    given = Given(a_BD, b_BD, scale, target, (valid_a_B, valid_b_B), (None, None), mask, backend, tile, bias)
    with torch.autocast(a_BD.device.type, enabled=False):
        ready = prepare(given, group)
        logits = Logits(ready.scale, tile or EDGE, float(bias.detach()))
        plan = _Plan(ready, ready.exchange(backend), logits, _pulls(ready))
        loss: Tensor = _SigmoidLoss.apply(ready.a_mD, ready.b_nD, scale, bias, plan)
    return loss


@dataclass
class _Plan:
    ready: Prepared
    exchange: Gather | Ring
    logits: Logits
    pulls: Pulls


def _pulls(ready: Prepared) -> Pulls:
    """Every pair pulls with w_ij."""
    one_m = ready.a_mD.new_ones(len(ready.a_mD), dtype=accumulation_dtype(ready.a_mD))
    return Pulls(ready.positives, one_m, None)


class _SigmoidLoss(torch.autograd.Function):
    """One strip of logits a rank; recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, a_mD: Tensor, b_nD: Tensor, scale: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
        blocks, kept_cD = arriving(plan.exchange, b_nD)
        total = _total(plan, a_mD, blocks)
        ctx.save_for_backward(a_mD, *kept_cD)
        ctx.plan, ctx.num_b, ctx.like = plan, len(b_nD), (scale, bias)
        total = plan.exchange.columns.ranks.reduce(total, "sum")
        return (total / max(1, plan.ready.num_rows)).to(accumulation_dtype(a_mD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # which may be on where gradients are asked for
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    plan: _Plan = ctx.plan
    a_mD, *kept_cD = ctx.saved_tensors
    dtype, positives = accumulation_dtype(a_mD), plan.ready.positives
    d_a_mD, d_bias = torch.zeros_like(a_mD, dtype=dtype), a_mD.new_zeros((), dtype=torch.float64)
    for block, b_cD in plan.exchange.kept(kept_cD):
        d_b_cD = plan.exchange.gradient(b_cD, dtype)
        excluded = left_out(plan.ready.exclusions, block)
        d_bias += tiles.sigmoid_gradients(a_mD, b_cD, plan.logits, excluded, (d_a_mD, d_b_cD))
        _, columns = positives.reach(block)
        d_bias -= positives.rows(torch.ones_like(b_cD[columns, :1], dtype=dtype), block).sum()
        plan.pulls.subtract(a_mD, b_cD, block, (d_a_mD, d_b_cD))
        plan.exchange.give_back(d_b_cD, block)
    d_b_nD = plan.exchange.received()
    if d_b_nD is None:
        d_b_nD = d_a_mD.new_zeros(ctx.num_b, a_mD.shape[1])
    factor = grad * plan.exchange.columns.ranks.size / max(1, plan.ready.num_rows)
    d_scale = scaled(a_mD, d_a_mD, factor * plan.logits.scale)
    d_b_nD.mul_(factor * plan.logits.scale)
    d_scale, d_bias = (
        (d * factor).to(x.dtype).reshape(x.shape) for d, x in zip((d_scale, d_bias), ctx.like, strict=True)
    )
    return d_a_mD.to(a_mD.dtype), d_b_nD.to(a_mD.dtype), d_scale, d_bias, None


def _total(plan: _Plan, a_mD: Tensor, blocks: Iterable[tuple[Block, Tensor]]) -> Tensor:
    """This rank's share of the sum over pairs, in float64: its parts may be far larger than what is left."""
    dtype, positives = accumulation_dtype(a_mD), plan.ready.positives
    total = a_mD.new_zeros((), dtype=torch.float64)
    for block, b_cD in blocks:
        total += tiles.softplus_sum(a_mD, b_cD, plan.logits, left_out(plan.ready.exclusions, block))
        _, columns = positives.reach(block)
        ones_t1 = torch.ones_like(b_cD[columns, :1], dtype=dtype)
        total -= plan.logits.bias * positives.rows(ones_t1, block).sum()
        total -= plan.logits.scale * plan.pulls.cosines(a_mD, b_cD, block)
    return total
