"""Every way to compute the loss against the dense formula: value and the gradient of every parameter.

{1, 2, 3, 4 ranks} x {dense, tiled, ring} x {plain, micro-batched} x {each target} x {validity, masks, uneven
rows, weights}, in fp64 to 1e-10 and in fp32 to 2e-5.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.losses import Diagonal, LabelOverlap, SameGroup, SameId, Soft, contrastive_loss
from fundusfm.losses.targets import Target
from fundusfm.objectives.cached import Features, cached_loss
from tests.distributed.ranks import run_ranks
from tests.losses import dense
from tests.losses.dense import Batch
from tests.losses.pieces import make_small

NUM_ROWS, WIDTH = 22, 5
TARGETS = ("diagonal", "group", "labels", "soft")
OPTIONS = ("plain", "validity", "masks", "uneven", "weights", "all")
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}


class Towers(nn.Module):
    """Two towers with dropout, a head each and a temperature: what an objective is made of."""

    def __init__(self, dtype: torch.dtype, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, WIDTH))
        self.text = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, WIDTH, bias=False))
        self.log_scale = nn.Parameter(torch.full((1,), 2.5))
        self.bias = nn.Parameter(torch.full((1,), -1.5))
        self.to(dtype)

    def encode(self, piece: tuple[Tensor, Tensor]) -> Features:
        image, text = piece
        return {"a": F.normalize(self.image(image), dim=-1), "b": F.normalize(self.text(text), dim=-1)}


def make_batch(options: str) -> Batch:
    generator = torch.Generator().manual_seed(11)

    def integers(high: int) -> Tensor:
        return torch.randint(-1, high, (NUM_ROWS,), generator=generator)

    every = torch.ones(NUM_ROWS, dtype=torch.bool)
    has_holes, has_weights = (options in (kind, "all") for kind in ("validity", "weights"))
    holes = [torch.rand(NUM_ROWS, generator=generator) > 0.3 for _ in range(2)]
    if options == "all":
        for hole in holes:
            hole[:3] = False  # the rows of the first rank
    weights = [torch.rand(NUM_ROWS, generator=generator).mul(3).round() for _ in range(2)]
    soft = torch.rand(NUM_ROWS, NUM_ROWS, generator=generator)
    return Batch(
        image_NK=torch.randn(NUM_ROWS, 7, generator=generator, dtype=torch.float64),
        text_NK=torch.randn(NUM_ROWS, 4, generator=generator, dtype=torch.float64),
        group_N=integers(6),
        label_NC=torch.randint(0, 2, (NUM_ROWS, 3), generator=generator),
        soft_NN=soft * (soft > 0.6),
        patient_N=integers(9),
        report_N=integers(12),
        valid_a_N=holes[0] if has_holes else every,
        valid_b_N=holes[1] if has_holes else every,
        weight_a_N=weights[0] if has_weights else torch.ones(NUM_ROWS),
        weight_b_N=weights[1] if has_weights else torch.ones(NUM_ROWS),
    )


def shares(options: str, world_size: int) -> list[slice]:
    """The rows of each rank; when uneven, one has none, and with "all" the first none that is valid."""
    if options == "uneven":
        bounds = {1: [22], 2: [0, 22], 3: [9, 9, 22], 4: [1, 14, 14, 22]}[world_size]
    elif options == "all":
        bounds = {1: [22], 2: [3, 22], 3: [3, 3, 22], 4: [3, 12, 12, 22]}[world_size]
    else:
        bounds = [NUM_ROWS * (rank + 1) // world_size for rank in range(world_size)]
    return [slice(*bound) for bound in itertools.pairwise([0, *bounds])]


def target_of(kind: str, batch: Batch) -> Target:
    if kind == "diagonal":
        return Diagonal()
    if kind == "group":
        return SameGroup(batch.group_N)
    return LabelOverlap(batch.label_NC) if kind == "labels" else Soft(batch.soft_NN)


def arguments_of(options: str, batch: Batch, target: str) -> dict[str, Any]:
    """What the loss is given for one rank; an option that is not asked for is not given at all."""
    given: dict[str, Any] = {"target": target_of(target, batch)}
    if options in ("validity", "all"):
        given |= {"valid_a_B": batch.valid_a_N, "valid_b_B": batch.valid_b_N}
    if options in ("masks", "all"):
        given["mask"] = (SameId(batch.patient_N), SameId(batch.report_N))
    if options in ("weights", "all"):
        given |= {"weight_a_B": batch.weight_a_N, "weight_b_B": batch.weight_b_N}
    return given


def gradients(towers: Towers) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}


def wanted(target: str, options: str) -> dict[str, Tensor]:
    batch, towers = make_batch(options), Towers(torch.float64)
    rows = towers.encode((batch.image_NK, batch.text_NK))
    masked = options in ("masks", "all")
    loss = dense.contrastive(rows["a"], rows["b"], towers.log_scale.exp(), target, batch, masked=masked)
    loss.backward()
    return {"loss": loss.detach(), **gradients(towers)}


def found_of_rank(rank: int, world_size: int, target: str, backend: str) -> dict[str, dict[str, Tensor]]:
    """Loss and averaged gradients of this rank for every option, dtype and way of batching."""
    make_small()
    answers = {}
    for options, dtype, is_cached in itertools.product(OPTIONS, BOUND, (False, True)):
        batch = make_batch(options).rows(shares(options, world_size)[rank])
        towers = Towers(dtype)
        inputs = (batch.image_NK.to(dtype), batch.text_NK.to(dtype))
        given = arguments_of(options, batch, target)

        def loss_of(rows: Features, towers: Towers = towers, given: dict[str, Any] = given) -> Tensor:
            scale = towers.log_scale.exp()
            return contrastive_loss(rows["a"], rows["b"], scale, backend=backend, tile=3, **given)

        if is_cached:
            pieces = list(zip(*(torch.tensor_split(x, [2, 2, 5]) for x in inputs), strict=True))
            loss, last = cached_loss(pieces, towers.encode, loss_of, lambda k: None, towers.parameters())
        else:
            loss = last = loss_of(towers.encode(inputs))
        last.backward()
        averaged = {
            n: _mean_over_ranks(p.grad, world_size)
            for n, p in towers.named_parameters()
            if p.grad is not None
        }
        answers[f"{options} {dtype} {'cached' if is_cached else 'plain'}"] = {
            "loss": loss.detach(),
            **averaged,
        }
    return answers


def _mean_over_ranks(gradient: Tensor, world_size: int) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total / world_size


@pytest.mark.parametrize("backend", ["dense", "tiled", "ring"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_dense_formula(world_size: int, target: str, backend: str) -> None:
    answers = run_ranks(world_size, found_of_rank, world_size, target, backend)
    for case in answers[0]:
        options, dtype, _ = case.split()
        bound = BOUND[getattr(torch, dtype.removeprefix("torch."))]
        truth = wanted(target, options)
        for rank, answer in enumerate(answers):
            assert answer[case].keys() == truth.keys(), case
            for name, value in truth.items():
                error = float((answer[case][name].double() - value).norm())
                assert error <= bound * max(1.0, float(value.norm())), (case, rank, name, error)
