"""The losses as trainers use them: under autocast, at the start of training, in groups of ranks, twice."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import LabelOverlap, Soft, contrastive_loss, sigmoid_loss
from tests.distributed.ranks import run_ranks
from tests.losses.test_contrastive import dense_loss


@pytest.mark.parametrize("kind", ["labels", "soft", "sigmoid"])
def test_gradients_asked_for_under_autocast__keep_their_precision(kind: str) -> None:
    """As micro-batches do: what they ask of the features, they ask within a training step."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(9, 8, generator=generator), dim=-1) for _ in range(2)]
    numbers = torch.rand(9, 9, generator=generator)
    scale = torch.tensor(14.3)
    gradients = []
    for enabled in (False, True):
        a, b = (row.clone().requires_grad_() for row in rows)
        if kind == "sigmoid":
            loss = sigmoid_loss(a, b, scale, -scale, target=Soft(numbers))
        else:
            target = LabelOverlap(numbers) if kind == "labels" else Soft(numbers)
            loss = contrastive_loss(a, b, scale, target=target)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.cat(torch.autograd.grad(loss, (a, b))))
    assert gradients[0].equal(gradients[1])


def test_features_almost_alike__light_rows_keep_their_gradients() -> None:
    """As at the start of training: sums are at their largest, and one over them must not be lost."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(1 + 0.05 * torch.randn(2, 256, 16, generator=generator), dim=-1)
    weight = torch.full((256,), 1e-9)
    weight[0] = 1
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (side.to(dtype).requires_grad_() for side in rows)
        scale = torch.tensor(100.0, dtype=dtype)
        loss = contrastive_loss(a, b, scale, weight_a_B=weight, weight_b_B=weight, backend="tiled")
        gradients.append(torch.autograd.grad(loss, a)[0][1:].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def _members_of_rank(rank: int, backend: str) -> tuple[Tensor, Tensor] | None:
    members = [1, 3]
    group = dist.new_group(members)
    if rank not in members:
        return None
    a, b = _rows_of_rank(rank)
    loss = contrastive_loss(a, b, torch.tensor(14.3, dtype=a.dtype), group=group, backend=backend, tile=2)
    loss.backward(retain_graph=True)
    first = a.grad.clone()
    loss.backward()
    assert a.grad.equal(2 * first), "the second time is not as the first"
    return loss.detach(), torch.cat([first, b.grad / 2]) / len(members)


def _rows_of_rank(rank: int) -> list[Tensor]:
    """Rows that do not lie one after the other in memory."""
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(2, 4, 3 + rank, generator=generator, dtype=torch.float64)
    return [F.normalize(side.T, dim=-1).requires_grad_() for side in rows]


@pytest.mark.parametrize("backend", ["tiled", "dense", "ring"])
def test_group_of_some_ranks__twice_the_same_gradients(backend: str) -> None:
    answers = run_ranks(4, _members_of_rank, backend)
    assert answers[0] is answers[2] is None
    members = [_rows_of_rank(rank) for rank in (1, 3)]
    a, b = (torch.cat(side).detach().requires_grad_() for side in zip(*members, strict=True))
    every = torch.ones(len(a), dtype=torch.bool)
    wanted = dense_loss(a, b, torch.tensor(14.3, dtype=a.dtype), every, every)
    wanted.backward()
    for answer, share in zip((answers[1], answers[3]), (slice(0, 4), slice(4, None)), strict=True):
        torch.testing.assert_close(answer[0], wanted.detach(), rtol=1e-12, atol=0)
        of_rank = torch.cat([a.grad[share], b.grad[share]])
        torch.testing.assert_close(answer[1], of_rank, rtol=1e-10, atol=1e-13)
