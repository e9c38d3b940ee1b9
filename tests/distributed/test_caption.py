"""The captioner on several real processes, in micro-batches or not, gives the gradients of one big batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundusfm.objectives.cached import cached_loss
from fundusfm.objectives.caption import Caption
from fundusfm.recipe.schema import Fidelity
from fundusfm.stream.view_prompt import PromptBatch
from tests.distributed.ranks import run_ranks
from tests.objectives.tiny_caption import CONVNEXT, VIT, caption_batch, tiny_caption

NUM_EXAMS = 12
TRUNKS = {"vit": VIT, "convnext": CONVNEXT}
Answer = tuple[Tensor, dict[str, Tensor]]


class Loss(nn.Module):
    """A batch -> its loss and what is to be differentiated: what the trainer wraps for data parallelism."""

    def __init__(self, objective: Caption, micro: int | None) -> None:
        super().__init__()
        self.objective, self.micro = objective, micro

    def forward(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
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


def _answer(module: nn.Module, batch: PromptBatch) -> Answer:
    batch.images = batch.images.double()
    loss, remainder = module(batch)
    remainder.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _module(fidelity: Fidelity, trunk: str, micro: int | None = None) -> Loss:
    return Loss(tiny_caption(fidelity, TRUNKS[trunk]).double().train(), micro)


def _rank(rank: int, world_size: int, fidelity: Fidelity, trunk: str, micro: int | None) -> Answer:
    module = DistributedDataParallel(_module(fidelity, trunk, micro))
    return _answer(module, caption_batch(NUM_EXAMS).pieces(NUM_EXAMS // world_size)[rank])


@pytest.mark.parametrize(
    ("world_size", "micro", "fidelity", "trunk"),
    [
        (1, 5, Fidelity.corrected, "vit"),
        (2, None, Fidelity.corrected, "convnext"),
        (2, 2, Fidelity.released, "vit"),
        (4, None, Fidelity.corrected, "vit"),
        (4, 1, Fidelity.corrected, "convnext"),
    ],
)
def test_ranks_and_micro_batches_equal_one_big_batch(
    world_size: int, micro: int | None, fidelity: Fidelity, trunk: str
) -> None:
    """Reports of unequal length, some missing: a mean of the ranks' means would be another number."""
    answers = run_ranks(world_size, _rank, world_size, fidelity, trunk, micro)
    module = _module(fidelity, trunk)
    loss, grads = _answer(module, caption_batch(NUM_EXAMS))
    assert grads.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    # Softmax does not see what all keys share.
    dead = {
        name for name, grad in grads.items() if grad.abs().max() < 1e-12 and not name.endswith("key.bias")
    }
    assert not dead, "a dead test"
    for rank_loss, rank_grads in answers:
        assert rank_loss.equal(answers[0][0]), "the loss differs between ranks"
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
        assert rank_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(rank_grads[name], grad, rtol=1e-9, atol=1e-12, msg=name)
