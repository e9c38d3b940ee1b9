"""Masked objectives on several real processes give the gradients of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fundusfm.objectives import objective_class
from tests.distributed.ranks import run_ranks
from tests.distributed.test_ret_clip import Loss
from tests.objectives.tiny_masked import VOCAB_SIZE, batch_for, masked_recipe

NUM_EXAMS = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "mae": {"mask_ratio_by_modality": {"OCT": 0.5}},
    "urfound": {"mask_ratio_by_modality": {"OCT": 0.5}, "text_weight": 0.5},
}
Answer = tuple[Tensor, dict[str, Tensor]]


def _loss(name: str, micro: int | None = None) -> Loss:
    torch.manual_seed(0)
    recipe = masked_recipe(name, **OPTIONS[name])
    return Loss(objective_class(name)(recipe, VOCAB_SIZE).double().train(), micro)  # type: ignore[arg-type, call-arg]


def _answer(module: nn.Module, batch: Any) -> Answer:
    loss, remainder = module(batch)
    remainder.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def _rank(rank: int, world_size: int, name: str, micro: int | None) -> Answer:
    module = DistributedDataParallel(_loss(name, micro))
    return _answer(module, batch_for(name, NUM_EXAMS).pieces(NUM_EXAMS // world_size)[rank])


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, None), (2, 2), (4, None), (4, 2)])
def test_ranks_equal_one_big_batch(world_size: int, micro: int | None, name: str) -> None:
    """Ranks hide different numbers of patches, since modalities do, and of words: one of them none."""
    answers = run_ranks(world_size, _rank, world_size, name, micro)
    module = _loss(name)
    loss, grads = _answer(module, batch_for(name, NUM_EXAMS))
    assert grads.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for n, grad in grads.items() if "position" not in n), "a dead test"
    for rank_loss, rank_grads in answers:
        assert rank_loss.equal(answers[0][0]), "the loss differs between ranks"
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=1e-12)
        assert rank_grads.keys() == grads.keys()
        for n, grad in grads.items():
            torch.testing.assert_close(
                rank_grads[n], grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}"
            )
