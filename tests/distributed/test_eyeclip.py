"""All of EyeCLIP on several real processes, and in micro-batches, gives the gradients of one big batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundusfm.objectives.cached import cached_loss
from fundusfm.objectives.eyeclip import EyeClip
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.view_multi import ExamBatch
from tests.distributed.ranks import run_ranks
from tests.objectives.tiny_eyeclip import random_batch, tiny_eyeclip

NUM_EXAMS = 12
Answer = tuple[Tensor, dict[str, Tensor]]


class Loss(nn.Module):
    """A batch -> its loss and what is to be differentiated: what the trainer wraps for data parallelism."""

    def __init__(self, objective: EyeClip, micro: int | None) -> None:
        super().__init__()
        self.objective, self.micro = objective, micro

    def forward(self, batch: ExamBatch) -> tuple[Tensor, Tensor]:
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


def _module(fidelity: Fidelity = Fidelity.corrected, micro: int | None = None) -> Loss:
    # Unequal, so that no term can stand in for another; normalised targets, since their means are of patches.
    weights = {"reconstruction_weight": 0.5, "image_image_weight": 2.0, "image_text_weight": 1.0}
    return Loss(tiny_eyeclip(fidelity, normalise_target=True, **weights).double().train(), micro)


def _batch() -> ExamBatch:
    batch = random_batch(NUM_EXAMS)
    batch.images = batch.images.double()
    return batch


def _answer(module: nn.Module, batch: ExamBatch) -> Answer:
    loss, remainder = module(batch)
    remainder.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _rank(rank: int, cuts: list[int], fidelity: Fidelity, micro: int | None) -> Answer:
    """The rank's exams lie between two cuts: ranks bring different numbers of exams, images and texts."""
    share = _batch()._exams(cuts[rank], cuts[rank + 1])
    return _answer(DistributedDataParallel(_module(fidelity, micro)), share)


def _assert_equal(found: Answer, wanted: Answer) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(
            found[1][name], grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def wanted() -> Answer:
    module = _module()
    answer = _answer(module, _batch())
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert answer[1].keys() == trained
    dead = [name for name, grad in answer[1].items() if not grad.any()]
    assert not dead, f"a dead test: {dead}"
    return answer


# Two ranks of which one has no pair and no text for itself; four with 1, 4, 2 and 5 exams.
CUTS = {"2": [0, 7, 12], "4": [0, 1, 5, 7, 12], "no pair": [0, 1, 2, 12]}


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_ranks_equal_one_big_batch(cuts: list[int], micro: int | None, wanted: Answer) -> None:
    answers = run_ranks(len(cuts) - 1, _rank, cuts, Fidelity.corrected, micro)
    for answer in answers:
        assert answer[0].equal(answers[0][0]), "the loss differs between ranks"
        _assert_equal(answer, wanted)


@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_equal_the_big_one(micro: int, wanted: Answer) -> None:
    _assert_equal(_answer(_module(micro=micro), _batch()), wanted)


def test_released__each_rank_its_own_exams() -> None:
    answers = run_ranks(2, _rank, [0, 5, 12], Fidelity.released, None)
    halves = [
        _answer(_module(Fidelity.released), _batch()._exams(start, stop)) for start, stop in [(0, 5), (5, 12)]
    ]
    for (loss, grads), (own_loss, _) in zip(answers, halves, strict=True):
        torch.testing.assert_close(loss, own_loss, rtol=1e-10, atol=0)
        for name, grad in grads.items():
            mean = (halves[0][1][name] + halves[1][1][name]) / 2
            torch.testing.assert_close(grad, mean, rtol=1e-9, atol=1e-12, msg=name)
