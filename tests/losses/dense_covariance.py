"""The covariance losses as dense formulas of one batch, and each beside the project's own: `CASES[name]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import barlow_twins_loss, eckart_young_loss, vicreg_loss

Views = list[Tensor]


def dense_eckart_young(views: Views, others: Views | None = None, form: str = "paper") -> Tensor:
    """From the covariance matrix of all views side by side, block by block."""
    num_views, width = len(views), views[0].shape[1]

    def blocks(batch: Views) -> Tensor:
        square = torch.cov(torch.cat(batch, 1).T)
        return square.reshape(num_views, width, num_views, width).permute(0, 2, 1, 3)

    own = range(num_views)
    c, c_other = blocks(views), blocks(views if others is None else others)
    penalty = torch.trace(sum(c[i, i] for i in own) @ sum(c_other[i, i] for i in own))
    if form == "mean":
        return -2 * sum(c[i, j].trace() for i in own for j in own) / num_views + penalty / num_views**2
    return -2 * sum(c[i, j].trace() for i in own for j in own if i != j) + penalty


def dense_barlow_twins(views: Views) -> Tensor:
    a, b = (F.batch_norm(view, None, None, training=True, eps=1e-5) for view in views)
    correlation = torch.einsum("nk,nl->kl", a, b) / len(a)
    weight = torch.full_like(correlation, 0.005).fill_diagonal_(1)
    return (weight * (correlation - torch.eye(len(correlation), dtype=a.dtype)) ** 2).sum()


def dense_vicreg(views: Views) -> Tensor:
    loss = 25 * F.mse_loss(*views)
    for view in views:
        width = view.shape[1]
        loss = loss + 25 * F.relu(1 - torch.sqrt(view.var(0) + 1e-4)).mean()
        matrix = torch.cov(view.T).reshape(width, width)
        loss = loss + sum(matrix[k, m] ** 2 for k in range(width) for m in range(width) if k != m) / width
    return loss


def with_grads(loss_of: Callable[[Views], Tensor], views: Views) -> tuple[Tensor, Views]:
    leaves = [view.clone().requires_grad_() for view in views]
    loss = loss_of(leaves)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@dataclass(frozen=True)
class Case:
    """`ours(views, valid, valid of the second batch, group)` and the dense formula of the rows that count."""

    num_views: int
    ours: Callable[[Views, Tensor, Tensor, Any], Tensor]
    dense: Callable[[Views], Tensor]
    second_batch: bool = False

    def answer(self, views: Views, valid: Tensor, valid_second: Tensor) -> tuple[Tensor, Views]:
        return with_grads(lambda v: self.ours(v, valid, valid_second, None), views)

    def dense_answer(self, views: Views, valid: Tensor, valid_second: Tensor) -> tuple[Tensor, Views]:
        return with_grads(lambda v: self._dense_of(v, valid, valid_second), views)

    def _dense_of(self, views: Views, valid: Tensor, valid_second: Tensor) -> Tensor:
        first = len(views) // 2 if self.second_batch else len(views)
        kept = [view[valid] for view in views[:first]] + [view[valid_second] for view in views[first:]]
        if min(len(view) for view in kept) < 2:
            return sum(0 * view.sum() for view in kept)
        return self.dense(kept)


CASES = {
    "eckart_young": Case(
        2, lambda v, ok, _, group: eckart_young_loss(v, valid_B=ok, group=group), dense_eckart_young
    ),
    "eckart_young_mean_3_views": Case(
        3,
        lambda v, ok, _, group: eckart_young_loss(v, valid_B=ok, form="mean", group=group),
        lambda v: dense_eckart_young(v, form="mean"),
    ),
    "eckart_young_second_batch": Case(
        4,
        lambda v, ok, ok_second, group: eckart_young_loss(
            v[:2], independent_BD=v[2:], valid_B=ok, valid_independent_B=ok_second, group=group
        ),
        lambda v: dense_eckart_young(v[:2], v[2:]),
        second_batch=True,
    ),
    "barlow_twins": Case(
        2, lambda v, ok, _, group: barlow_twins_loss(*v, valid_B=ok, group=group), dense_barlow_twins
    ),
    "vicreg": Case(2, lambda v, ok, _, group: vicreg_loss(*v, valid_B=ok, group=group), dense_vicreg),
}
