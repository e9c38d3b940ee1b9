"""The sigmoid loss against its dense formula, on one rank and several."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import LabelOverlap, sigmoid_loss
from tests.distributed.ranks import run_ranks
from tests.losses import dense
from tests.losses.pieces import make_small
from tests.losses.test_matrix import BOUND, Towers, arguments_of, make_batch, shares

OPTIONS = ("plain", "validity", "masks", "uneven")
TARGETS = ("diagonal", "group", "soft")


def wanted(target: str, options: str) -> dict[str, Tensor]:
    batch, towers = make_batch(options), Towers(torch.float64)
    rows = towers.encode((batch.image_NK, batch.text_NK))
    loss = dense.sigmoid(
        rows["a"], rows["b"], towers.log_scale.exp(), towers.bias, target, batch, masked=options == "masks"
    )
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in towers.named_parameters()}}


def found_of_rank(rank: int, world_size: int, backend: str) -> dict[str, dict[str, Tensor]]:
    make_small()
    answers = {}
    for target, options, dtype in itertools.product(TARGETS, OPTIONS, BOUND):
        batch, towers = make_batch(options).rows(shares(options, world_size)[rank]), Towers(dtype)
        rows = towers.encode((batch.image_NK.to(dtype), batch.text_NK.to(dtype)))
        given = arguments_of(options, batch, target)
        scale = towers.log_scale.exp()
        loss = sigmoid_loss(rows["a"], rows["b"], scale, towers.bias, backend=backend, tile=4, **given)
        loss.backward()
        for parameter in towers.parameters():
            dist.all_reduce(parameter.grad)
        answers[f"{target} {options} {dtype}"] = {
            "loss": loss.detach(),
            **{n: p.grad / world_size for n, p in towers.named_parameters()},
        }
    return answers


@pytest.mark.parametrize(("world_size", "backend"), [(1, "tiled"), (2, "tiled"), (3, "ring"), (3, "tiled")])
def test_equals_dense_formula(world_size: int, backend: str) -> None:
    answers = run_ranks(world_size, found_of_rank, world_size, backend)
    for case in answers[0]:
        target, options, dtype = case.split()
        bound = BOUND[getattr(torch, dtype.removeprefix("torch."))]
        truth = wanted(target, options)
        for rank, answer in enumerate(answers):
            for name, value in truth.items():
                error = float((answer[case][name].double() - value).norm())
                assert error <= bound * max(1.0, float(value.norm())), (case, rank, name, error)


def test_what_it_cannot_do__refused() -> None:
    a, b, one = torch.eye(3), torch.eye(3), torch.ones(1)
    with pytest.raises(ValueError, match="'dense'"):
        sigmoid_loss(a, b, one, one, backend="dense")
    with pytest.raises(TypeError, match="no probabilities"):
        sigmoid_loss(a, b, one, one, target=LabelOverlap(torch.ones(3, 2)))


def test_small_loss__is_what_is_left_of_large_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(4096, 128, generator=generator, dtype=torch.float64), dim=-1)
    b = F.normalize(a + 0.06 * torch.randn(4096, 128, generator=generator, dtype=torch.float64), dim=-1)
    logits = 80.0 * a @ b.T - 40.0
    truth = float((F.softplus(logits).sum() - logits.trace()) / len(a))
    assert truth < 1e-4
    loss = sigmoid_loss(a.float(), b.float(), torch.tensor(80.0), torch.tensor(-40.0), tile=1024)
    # What rounding of the single logits leaves; their sums in float32 would be off by 6e-6.
    assert abs(float(loss) - truth) <= 1.5e-6, (float(loss), truth)
