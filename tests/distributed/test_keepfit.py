"""KeepFIT on several processes and in micro-batches: gradients and bank of one with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fundusfm.losses.gathered import gather_rows
from fundusfm.models.revision import SoftmaxOver
from fundusfm.objectives.keepfit import KeepFit
from fundusfm.stream.view_category import CategoryBatch
from tests.distributed.ranks import run_ranks
from tests.distributed.test_flair import Answer, Loss, answer_of, assert_alike
from tests.objectives.tiny_flair import category_batch, in_dtype, tiny_keepfit

NUM_EXAMS = 12
EXPERTS = (0, 1, 2, 7)  # of four ranks the first has nothing else, the second and the last have none


def _module(options: dict[str, Any], micro: int | None = None) -> Loss:
    objective = tiny_keepfit(**options).double().train()
    if size := options.get("bank_size"):
        generator = torch.Generator().manual_seed(5)
        rows = torch.nn.functional.normalize(torch.randn(2, size - 3, 16, generator=generator), dim=-1)
        objective.bank.push(*rows)
    return Loss(objective, micro)


def _batch() -> CategoryBatch:
    return in_dtype(category_batch(NUM_EXAMS, experts=EXPERTS), torch.float64)


def _answer(module: Any, objective: KeepFit, batch: CategoryBatch) -> tuple[Answer, Tensor]:
    answer = answer_of(module, batch)
    with torch.no_grad():
        objective.after_step()
    return answer, torch.stack(objective.bank.rows()).clone()


def _rank(rank: int, world_size: int, options: dict[str, Any], micro: int | None) -> tuple[Answer, Tensor]:
    loss = _module(options, micro)
    batch = _batch().pieces(NUM_EXAMS // world_size)[rank]
    return _answer(DistributedDataParallel(loss), loss.objective, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("world_size", "micro", "options"),
    [
        (1, 5, {}),
        (2, None, {"softmax": SoftmaxOver.heads}),
        (2, 4, {"bank_size": 8}),
        (4, None, {"fusion": True}),
        (4, 2, {"bank_size": 3}),
    ],
)
def test_ranks_equal_one_big_batch(world_size: int, micro: int | None, options: dict[str, Any]) -> None:
    answers = run_ranks(world_size, _rank, world_size, options, micro)
    whole = _module(options)
    wanted, bank = _answer(whole, whole.objective, _batch())  # type: ignore[arg-type]
    assert wanted[1].keys() == dict(whole.named_parameters()).keys()
    assert all(g.abs().max() > 0 for n, g in wanted[1].items() if "position" not in n), "a dead test"
    assert_alike([answer for answer, _ in answers], wanted)
    assert len(bank[0]) == options.get("bank_size", 0)
    for _, rank_bank in answers:
        torch.testing.assert_close(rank_bank, bank)


def _gathered(rank: int, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rows = torch.full((counts[rank], 2), float(rank + 1), dtype=torch.float64, requires_grad=True)
    found = gather_rows(rows)
    (found * torch.arange(len(found))[:, None] * (rank + 1)).sum().backward()
    return found.detach(), rows.grad


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)])
def test_gather_rows__every_rank_has_all_and_gets_what_all_make_of_its_own(counts: tuple[int, ...]) -> None:
    answers = run_ranks(3, _gathered, counts)
    wanted = torch.cat([torch.full((n, 2), float(k + 1)) for k, n in enumerate(counts)]).double()
    start = 0
    for count, (found, grad) in zip(counts, answers, strict=True):
        torch.testing.assert_close(found, wanted)
        place = torch.arange(start, start + count, dtype=torch.float64)[:, None]
        torch.testing.assert_close(grad, (6 * place).expand(count, 2))
        start += count
