"""FLAIR on several processes and in micro-batches gives the gradients of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundusfm.objectives.base import Objective
from fundusfm.objectives.cached import cached_loss
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.view_category import CategoryBatch
from tests.distributed.ranks import run_ranks
from tests.objectives.tiny_flair import category_batch, in_dtype, tiny_flair

NUM_EXAMS = 12
Answer = tuple[Tensor, dict[str, Tensor]]


class Loss(nn.Module):
    """A batch -> its loss and what is to be differentiated: what the trainer wraps for data parallelism."""

    def __init__(self, objective: Objective, micro: int | None) -> None:
        super().__init__()
        self.objective, self.micro = objective, micro

    def forward(self, batch: CategoryBatch) -> tuple[Tensor, Tensor]:
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


def answer_of(module: nn.Module, batch: CategoryBatch) -> Answer:
    loss, remainder = module(batch)
    remainder.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_alike(answers: list[Answer], wanted: Answer, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Every rank has the same loss and every gradient of one process with the whole batch."""
    loss, grads = wanted
    for rank_loss, rank_grads in answers:
        assert rank_loss.equal(answers[0][0]), "the loss differs between ranks"
        torch.testing.assert_close(rank_loss, loss, rtol=rtol, atol=atol)
        assert rank_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                rank_grads[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def _module(fidelity: Fidelity, micro: int | None = None) -> Loss:
    return Loss(tiny_flair(fidelity).double().train(), micro)


def _batch() -> CategoryBatch:
    return in_dtype(category_batch(NUM_EXAMS), torch.float64)


def _rank(rank: int, world_size: int, fidelity: Fidelity, micro: int | None) -> Answer:
    module = DistributedDataParallel(_module(fidelity, micro))
    return answer_of(module, _batch().pieces(NUM_EXAMS // world_size)[rank])


@pytest.mark.parametrize(("world_size", "micro"), [(1, 5), (2, None), (2, 4), (4, None), (4, 1)])
def test_ranks_equal_one_big_batch(world_size: int, micro: int | None) -> None:
    answers = run_ranks(world_size, _rank, world_size, Fidelity.corrected, micro)
    wanted = answer_of(_module(Fidelity.corrected), _batch())
    assert wanted[1].keys() == dict(_module(Fidelity.corrected).named_parameters()).keys()
    assert all(g.abs().max() > 0 for n, g in wanted[1].items() if "position" not in n), "a dead test"
    assert_alike(answers, wanted)


def test_released__each_rank_contrasts_its_own_images() -> None:
    answers = run_ranks(2, _rank, 2, Fidelity.released, None)
    halves = [answer_of(_module(Fidelity.released), half) for half in _batch().pieces(NUM_EXAMS // 2)]
    for (rank_loss, rank_grads), (loss, _) in zip(answers, halves, strict=True):
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=0)
        for name, grad in rank_grads.items():
            mean = (halves[0][1][name] + halves[1][1][name]) / 2
            torch.testing.assert_close(grad, mean, rtol=1e-10, atol=1e-12, msg=name)
