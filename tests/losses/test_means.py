"""The mean over all ranks: one process's mean, its gradients, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fundusfm.losses import global_mean
from tests.distributed.ranks import run_ranks

NUM_ROWS = 13


def _rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sum_B = torch.randn(NUM_ROWS, generator=generator, dtype=torch.float64)
    count_B = torch.randint(1, 9, (NUM_ROWS,), generator=generator)
    count_B[[2, 7]] = 0
    return sum_B, count_B


def _answer(sum_B: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    sum_B = sum_B.clone().requires_grad_()
    mean = global_mean(sum_B, count_B)
    (3 * mean).backward()
    assert sum_B.grad is not None
    return mean.detach(), sum_B.grad


def _rank(rank: int, bounds: list[int]) -> tuple[Tensor, Tensor]:
    sum_B, count_B = (rows[bounds[rank] : bounds[rank + 1]] for rows in _rows())
    return _answer(sum_B, count_B)


@pytest.mark.parametrize("bounds", [[0, 13], [0, 6, 13], [0, 13, 13], [0, 2, 3, 8, 13]])
def test_ranks__the_mean_of_all_rows(bounds: list[int]) -> None:
    """Uneven ranks, one of them empty, one (row 2 alone) with nothing that counts."""
    num_ranks = len(bounds) - 1
    answers = run_ranks(num_ranks, _rank, bounds)
    sum_B, count_B = _rows()
    counted_B = count_B > 0
    for mean, _ in answers:
        assert mean.equal(answers[0][0])
        torch.testing.assert_close(mean, sum_B[counted_B].sum() / count_B.sum(), rtol=1e-14, atol=0)
    grad_B = torch.cat([grad for _, grad in answers])
    # Multiplied by the number of ranks: data parallelism then takes the mean over them.
    wanted_B = num_ranks * 3 * counted_B.double() / count_B.sum()
    torch.testing.assert_close(grad_B, wanted_B, rtol=1e-14, atol=0)


def test_nothing_counts__zero_with_zero_gradients() -> None:
    mean, grad_B = _answer(torch.tensor([4.0, torch.nan]), torch.tensor([0, 0]))
    assert mean == 0
    assert grad_B.tolist() == [0, 0]


def test_row_that_counts_nothing__may_hold_anything() -> None:
    mean, grad_B = _answer(torch.tensor([4.0, torch.nan, 2.0]), torch.tensor([3, 0, 1]))
    assert mean == 1.5
    assert grad_B.tolist() == [0.75, 0, 0.75]


def test_half_precision__summed_in_single() -> None:
    sum_B = torch.full((4000,), 1.0, dtype=torch.bfloat16)
    assert global_mean(sum_B, torch.ones(4000, dtype=torch.int64)) == 1
