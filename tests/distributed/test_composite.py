"""A composite on several real processes and in micro-batches gives the gradients of one big batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fundusfm.stream.view_composite import CompositeBatch
from tests.distributed.ranks import run_ranks
from tests.distributed.test_ret_clip import Answer, Loss, _answer
from tests.objectives.test_composite import composite_batch, tiny_composite

NUM_PATIENTS = 8


def _loss(micro: int | None) -> Loss:
    return Loss(tiny_composite().double().train(), micro)  # type: ignore[arg-type]


def _batch() -> CompositeBatch:
    batch = composite_batch(NUM_PATIENTS)
    for part in batch.parts.values():
        part.images = part.images.double()
    return batch


def _rank(rank: int, world_size: int, micro: int | None) -> Answer:
    module = DistributedDataParallel(_loss(micro))
    share = _batch().pieces(NUM_PATIENTS // world_size)[rank]
    _answer(module, share)
    module.zero_grad()
    return _answer(module, share)  # fails if a gradient of the first pass never came


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (2, None), (2, 2), (4, None)])
def test_ranks_equal_one_big_batch(world_size: int, micro: int | None) -> None:
    answers = run_ranks(world_size, _rank, world_size, micro)
    loss, grads = _answer(module := _loss(None), _batch())
    assert grads.keys() == dict(module.named_parameters()).keys()
    for rank_loss, rank_grads in answers:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank_grads, grads, rtol=1e-10, atol=1e-12)
