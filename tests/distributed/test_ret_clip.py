"""The whole objective on several real processes gives the gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundusfm.objectives.cached import cached_loss
from fundusfm.objectives.ret_clip import RetClip
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.views import PatientPairBatch
from tests.distributed.ranks import run_ranks
from tests.objectives.tiny import random_batch, tiny_ret_clip

NUM_PATIENTS = 12
Answer = tuple[Tensor, dict[str, Tensor]]


class Loss(nn.Module):
    """A batch -> its loss and what is to be differentiated: what the trainer wraps for data parallelism."""

    def __init__(self, objective: RetClip, micro: int | None) -> None:
        super().__init__()
        self.objective, self.micro = objective, micro

    def forward(self, batch: PatientPairBatch) -> tuple[Tensor, Tensor]:
        objective = self.objective
        if self.micro is None:
            loss = objective.total_loss(objective.loss_terms(batch))
            return loss, loss
        return cached_loss(
            batch.pieces(self.micro),
            objective.encode,
            lambda features: objective.total_loss(objective.terms_of(features)),
            lambda piece: None,
            objective.parameters(),
        )


def _objective(dtype: torch.dtype, fidelity: Fidelity, micro: int | None = None) -> Loss:
    weights = {"left_weight": 0.5, "right_weight": 2.0}  # unequal, so that no term can stand in for another
    return Loss(tiny_ret_clip(fidelity, temperature_init=14.3, **weights).to(dtype).train(), micro)


def _batch(dtype: torch.dtype, *, lacking: bool) -> PatientPairBatch:
    batch = random_batch(NUM_PATIENTS, lacking=lacking)
    batch.images = batch.images.to(dtype)
    return batch


def _answer(module: nn.Module, batch: PatientPairBatch) -> Answer:
    loss, remainder = module(batch)
    remainder.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _rank(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    fidelity: Fidelity,
    lacking: bool,
    micro: int | None = None,
) -> Answer:
    module = DistributedDataParallel(_objective(dtype, fidelity, micro))
    return _answer(module, _batch(dtype, lacking=lacking).pieces(NUM_PATIENTS // world_size)[rank])


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-12), (torch.float32, 2e-3, 2e-5)]
)
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_equal_one_big_batch(
    world_size: int, micro: int | None, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    """With missing eyes and reports; with 4 ranks some have no left, no right or no unknown eye."""
    answers = run_ranks(world_size, _rank, world_size, dtype, Fidelity.corrected, True, micro)
    module = _objective(dtype, Fidelity.corrected)
    loss, grads = _answer(module, _batch(dtype, lacking=True))
    assert grads.keys() == dict(module.named_parameters()).keys()
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "position" not in name), "a dead test"
    for rank_loss, rank_grads in answers:
        assert rank_loss.equal(answers[0][0]), "the loss differs between ranks"
        torch.testing.assert_close(rank_loss, loss, rtol=rtol, atol=atol)
        assert rank_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                rank_grads[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def _two_steps(module: nn.Module, batch: PatientPairBatch) -> Answer:
    """The second forward pass of data parallelism fails if a gradient of the first one never came."""
    _answer(module, batch)
    module.zero_grad()
    return _answer(module, batch)


def _ablated(weights: dict[str, float]) -> Loss:
    return Loss(tiny_ret_clip(temperature_init=14.3, **weights).double().train(), None)


def _ablated_rank(rank: int, weights: dict[str, float]) -> Answer:
    half = _batch(torch.float64, lacking=True).pieces(NUM_PATIENTS // 2)[rank]
    return _two_steps(DistributedDataParallel(_ablated(weights)), half)


@pytest.mark.parametrize("dropped", [("patient",), ("left", "right")])
def test_weight_0__ranks_wait_for_no_gradient_of_a_dropped_term(dropped: tuple[str, ...]) -> None:
    weights = {f"{term}_weight": 0.0 for term in dropped}
    answers = run_ranks(2, _ablated_rank, weights)
    loss, grads = _answer(_ablated(weights), _batch(torch.float64, lacking=True))
    assert not any(name.split(".")[2] in dropped for name in grads)
    for rank_loss, rank_grads in answers:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank_grads, grads, rtol=1e-10, atol=1e-12)


def test_released__each_rank_contrasts_its_own_patients() -> None:
    answers = run_ranks(2, _rank, 2, torch.float64, Fidelity.released, False)
    batch = _batch(torch.float64, lacking=False)
    halves = [_answer(_objective(torch.float64, Fidelity.released), half) for half in batch.pieces(6)]
    for (rank_loss, rank_grads), (loss, _) in zip(answers, halves, strict=True):
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=0)
        for name, grad in rank_grads.items():
            mean = (halves[0][1][name] + halves[1][1][name]) / 2
            torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12, msg=name)
