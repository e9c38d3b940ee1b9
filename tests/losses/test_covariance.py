"""The covariance losses against published numbers, dense formulas of the joint batch and real processes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fundusfm.errors import UserError
from fundusfm.losses import barlow_twins_loss, eckart_young_loss, vicreg_loss
from tests.distributed.ranks import run_ranks
from tests.goldens import load
from tests.losses.dense_covariance import CASES, Views, dense_vicreg, with_grads

WIDTH = 5
ROWS_OF_RANKS = {1: (11,), 2: (8, 3), 3: (6, 0, 5), 4: (1, 5, 0, 6)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest number wanted."""
    scale = wanted.abs().amax().clamp(min=1e-300)
    return ((found.double() - wanted).abs().amax() / scale).item() if wanted.numel() else 0.0


@pytest.mark.parametrize(
    ("form", "second_batch", "objective", "grad"),
    [
        ("mean", False, "objective", "grad_z{}"),
        ("mean", True, "objective_independent", "grad_z{}_independent"),
        ("paper", False, "objective_paper", "grad_z{}_paper"),
    ],
)
def test_goldens__loss_and_gradients(form: Any, second_batch: bool, objective: str, grad: str) -> None:
    arrays, _ = load("scca/ey_2_views")
    views = [torch.from_numpy(arrays[name]) for name in ("z1", "z2")]
    others = [torch.from_numpy(arrays[name]) for name in ("z1_independent", "z2_independent")]
    independent = others if second_batch else None
    loss, grads = with_grads(lambda v: eckart_young_loss(v, independent_BD=independent, form=form), views)
    np.testing.assert_allclose(loss, arrays[objective], rtol=1e-13)
    for i, found in enumerate(grads, 1):
        np.testing.assert_allclose(found, arrays[grad.format(i)], rtol=1e-12, atol=1e-14)


@settings(max_examples=120, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    valid=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=9),
    width=st.integers(1, 5),
    mean=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_formula__any_validity(
    case: str, valid: list[tuple[bool, bool]], width: int, mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    checked = CASES[case]
    masks = torch.tensor(valid, dtype=torch.bool).reshape(-1, 2).unbind(1)
    views = [
        mean + torch.randn(len(valid), width, generator=generator, dtype=torch.float64)
        for _ in range(checked.num_views)
    ]
    for i, view in enumerate(views):
        view[~masks[int(checked.second_batch and i >= 2)]] = torch.nan
    loss, grads = checked.answer(views, *masks)
    wanted, wanted_grads = checked.dense_answer(views, *masks)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-10)
    for found, dense in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-10)


def _rows(world_size: int) -> tuple[Views, Tensor, Tensor]:
    """Joint rows of up to four views that share a signal; about a quarter of the rows is invalid, and NaN.

    Half the usual size, so that no Eckart-Young loss is a small difference of large terms.
    """
    generator = torch.Generator().manual_seed(world_size)
    num_rows = sum(ROWS_OF_RANKS[world_size])
    signal = torch.randn(num_rows, WIDTH, generator=generator)
    views = [1 + signal / 2 + torch.randn(num_rows, WIDTH, generator=generator) / 6 for _ in range(4)]
    masks = [torch.rand(num_rows, generator=generator) > 0.25 for _ in range(2)]
    masks[0][0] = False
    for view in views:
        view[~masks[0] & ~masks[1]] = torch.nan
    return views, masks[0], masks[1]


def _losses_of_rank(rank: int, world_size: int) -> dict[tuple[str, torch.dtype], tuple[Tensor, Views]]:
    views, *masks = _rows(world_size)
    rows_of_ranks = ROWS_OF_RANKS[world_size]
    share = slice(sum(rows_of_ranks[:rank]), sum(rows_of_ranks[: rank + 1]))
    answers = {}
    for name, case in CASES.items():
        for dtype in TOLERANCE:
            mine = [view[share].to(dtype) for view in views[: case.num_views]]
            loss, grads = case.answer(mine, *(mask[share] for mask in masks))
            # What data-parallel training does to parameter gradients: the mean over ranks.
            answers[name, dtype] = loss, [grad / world_size for grad in grads]
    return answers


@pytest.mark.parametrize("world_size", sorted(ROWS_OF_RANKS))
def test_ranks_equal_one_big_batch(world_size: int) -> None:
    answers = run_ranks(world_size, _losses_of_rank, world_size)
    views, *masks = _rows(world_size)
    for (name, dtype), (loss, _) in answers[0].items():
        case = CASES[name]
        joint = [view.double() for view in views[: case.num_views]]
        wanted, wanted_grads = case.dense_answer(joint, *masks)
        assert loss.dtype == dtype
        assert all(torch.equal(answer[name, dtype][0], loss) for answer in answers)
        assert _relative_error(loss, wanted) <= TOLERANCE[dtype], (name, dtype)
        for i, wanted_grad in enumerate(wanted_grads):
            found = torch.cat([answer[name, dtype][1][i] for answer in answers])
            assert _relative_error(found, wanted_grad) <= TOLERANCE[dtype], (name, dtype, i)


def _groups_of_rank(rank: int) -> tuple[Tensor, Tensor | None]:
    views, *_ = _rows(3)
    share = [view.nan_to_num().double()[4 * rank : 4 * rank + 4 - rank] for view in views[:2]]
    pair = dist.new_group([0, 2])
    return vicreg_loss(*share, group="rank"), vicreg_loss(*share, group=pair) if rank != 1 else None


def test_groups__own_rows_or_those_of_the_members() -> None:
    answers = run_ranks(3, _groups_of_rank)
    rows = [[v.nan_to_num().double()[4 * r : 4 * r + 4 - r] for v in _rows(3)[0][:2]] for r in range(3)]
    for (alone, _), views in zip(answers, rows, strict=True):
        torch.testing.assert_close(alone, dense_vicreg(views), rtol=1e-12, atol=0)
    members = dense_vicreg([torch.cat(views) for views in zip(rows[0], rows[2], strict=True)])
    for rank in (0, 2):
        torch.testing.assert_close(answers[rank][1], members, rtol=1e-12, atol=0)


def _few_rows_of_rank(rank: int, num_valid: int) -> list[tuple[Tensor, Views]]:
    views = [torch.randn(3, 4) for _ in range(4)]
    valid = torch.arange(3) < (num_valid if rank == 0 else 0)
    return [case.answer(views[: case.num_views], valid, valid) for case in CASES.values()]


@pytest.mark.parametrize("num_valid", [0, 1])
def test_fewer_than_two_valid_rows__zero_with_zero_gradients(num_valid: int) -> None:
    for answer in run_ranks(2, _few_rows_of_rank, num_valid):
        for loss, grads in answer:
            assert loss == 0
            assert all(torch.equal(grad, torch.zeros(3, 4)) for grad in grads)


class _Collectives(TorchDispatchMode):
    """Names and sizes of the collectives called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            self.calls.append((name.split(".")[1], sum(tensor.numel() for tensor in args[0])))
        return function(*args, **(kwargs or {}))


def _collectives_of_rank(rank: int, num_rows: int) -> list[tuple[list[tuple[str, int]], int]]:
    answers = []
    for case in CASES.values():
        views = [torch.randn(num_rows, WIDTH, requires_grad=True) for _ in range(case.num_views)]
        valid = torch.ones(num_rows, dtype=torch.bool)
        with _Collectives() as forward:
            loss = case.ours(views, valid, valid, None)
        with _Collectives() as backward:
            loss.backward()
        answers.append((forward.calls, len(backward.calls)))
    return answers


def test_only_statistics_travel() -> None:
    few, many = (run_ranks(2, _collectives_of_rank, num_rows)[0] for num_rows in (3, 300))
    assert few == many
    for (forward, num_backward), case in zip(few, CASES.values(), strict=True):
        assert num_backward == 0
        assert {name for name, _ in forward} == {"allreduce_"}
        sums, products = case.num_views * (WIDTH + 1), 2 * (WIDTH**2 + WIDTH)
        assert sum(numel for _, numel in forward) <= 9 + sums + products


BAD_INPUT: dict[str, tuple[Callable[[int], Any], str]] = {
    "views_differ": (
        lambda rank: eckart_young_loss([torch.ones(3, 4), torch.ones(3, 4 + rank)]),
        r"rank 1: .*\(3, 4\), \(3, 5\)",
    ),
    "rows_differ": (
        lambda rank: vicreg_loss(torch.ones(3, 4), torch.ones(3 + rank, 4)),
        "rank 1: .*one shape",
    ),
    "width_of_ranks": (
        lambda rank: barlow_twins_loss(*torch.ones(2, 3, 4 + rank)),
        "rank 0: 2 views of width 4 .*rank 1: 2 views of width 5",
    ),
    "number_of_views": (lambda rank: eckart_young_loss(torch.ones(2 + rank, 3, 4)), "rank 1: 3 views"),
    "one_view": (
        lambda rank: eckart_young_loss(torch.ones(2 - rank, 3, 4)),
        "rank 1: there is only one view",
    ),
    "precision": (
        lambda rank: vicreg_loss(*torch.ones(2, 3, 4, dtype=(torch.float32, torch.float64)[rank])),
        "float32.*rank 1: .*float64",
    ),
    "validity": (
        lambda rank: vicreg_loss(*torch.ones(2, 3, 4), valid_B=torch.ones(3 - rank, dtype=torch.bool)),
        "rank 1: validity must be one boolean a row, for 3 rows",
    ),
    "second_batch_on_one_rank": (
        lambda rank: eckart_young_loss(
            torch.ones(2, 3, 4), independent_BD=None if rank else torch.ones(2, 3, 4)
        ),
        "rank 0: .*an independent batch.*rank 1: .*no independent batch",
    ),
    "second_batch_differs": (
        lambda rank: eckart_young_loss(torch.ones(2, 3, 4), independent_BD=torch.ones(2 + rank, 3, 4)),
        "rank 1: the first batch has 2 views .*the independent one 3 views",
    ),
}


def _errors_of_rank(rank: int) -> dict[str, str]:
    found = {}
    for name, (call, _) in BAD_INPUT.items():
        with pytest.raises(UserError) as error:
            call(rank)
        found[name] = error.value.where
        # No message of the failed call is left to be taken for one of the next.
        assert vicreg_loss(*torch.zeros(2, 3, 4)) == pytest.approx(50 * 0.99)
    return found


def test_bad_input__the_same_error_on_every_rank() -> None:
    first, second = run_ranks(2, _errors_of_rank)
    assert first == second
    for name, (_, pattern) in BAD_INPUT.items():
        assert re.search(pattern, first[name]), (name, first[name])


def test_bad_input__one_process() -> None:
    with pytest.raises(UserError, match=r"do not fit together\n  where: the views .* \(3, 4\), \(3, 5\)"):
        vicreg_loss(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(UserError, match="one boolean a row, for 3 rows"):
        barlow_twins_loss(*torch.ones(2, 3, 4), valid_B=torch.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eckart_young_loss([]), "at least two views"),
        (lambda: eckart_young_loss(torch.ones(2, 3, 4), form="sum"), "not 'sum'"),
        (lambda: eckart_young_loss(torch.ones(2, 3, 4), valid_independent_B=torch.ones(3)), "independent_BD"),
        (lambda: barlow_twins_loss(*torch.ones(2, 3, 4), eps=0), "eps must be positive"),
        (lambda: vicreg_loss(*torch.ones(2, 3, 4), eps=0), "eps must be positive"),
    ],
)
def test_bad_argument__refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", sorted(CASES))
def test_float32__a_large_mean_costs_few_digits(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    case, every = CASES[name], torch.ones(256, dtype=torch.bool)
    views = [100 + torch.randn(256, WIDTH, generator=generator) for _ in range(case.num_views)]
    loss, grads = case.answer(views, every, every)
    wanted, wanted_grads = with_grads(case.dense, [view.double() for view in views])
    assert _relative_error(loss, wanted) <= 1e-6
    assert all(_relative_error(f, w) <= 2e-5 for f, w in zip(grads, wanted_grads, strict=True))


@pytest.mark.parametrize("name", sorted(CASES))
def test_bfloat16_features__float32_sums_forward_and_backward(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    case, every = CASES[name], torch.ones(64, dtype=torch.bool)
    views = [torch.randn(64, WIDTH, generator=generator).bfloat16() for _ in range(case.num_views)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = case.answer(views, every, every)
    wanted, wanted_grads = with_grads(case.dense, [view.double() for view in views])
    assert loss.dtype == torch.float32
    assert _relative_error(loss, wanted) <= 2e-6
    for found, dense in zip(grads, wanted_grads, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), dense, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("num_views", [2, 3])
def test_eckart_young__lowest_for_equal_uncorrelated_views(num_views: int) -> None:
    orthogonal = torch.linalg.qr(torch.randn(20, WIDTH + 1, dtype=torch.float64))[0]
    centred = torch.linalg.qr(orthogonal[:, 1:] - orthogonal[:, 1:].mean(0))[0]
    variance = (num_views - 1) / num_views
    loss, grads = with_grads(eckart_young_loss, [centred * (19 * variance) ** 0.5] * num_views)
    torch.testing.assert_close(loss.item(), -((num_views - 1.0) ** 2) * WIDTH)
    assert max(grad.abs().max() for grad in grads) < 1e-12


def test_second_derivative__refused() -> None:
    views = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    (grad, _) = torch.autograd.grad(vicreg_loss(*views), views, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
