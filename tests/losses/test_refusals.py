"""Rows, ids and options that a loss cannot use: the same clear error on every rank, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.losses import LabelOverlap, SameGroup, SameId, Soft, contrastive_loss, sigmoid_loss
from tests.distributed.ranks import run_ranks

Call = tuple[dict[str, Any], dict[str, Any]]  # changed rows or scale, and keywords


def nan_rows(rank: int) -> Call:
    a = _unit(4)
    if rank == 1:
        a[2, 0], a[3, 1] = torch.nan, torch.inf
    return {"a": a}, {}


def long_rows(rank: int) -> Call:
    return {"b": _unit(4) * (3.5 if rank == 0 else 1)}, {}


def short_row(rank: int) -> Call:
    b = _unit(4)
    b[1] *= 0.5
    return {"b": b if rank == 1 else _unit(4)}, {}


def other_width(rank: int) -> Call:
    return ({"a": _unit(4, 7), "b": _unit(4, 7)} if rank == 1 else {}), {}


def other_dtype(rank: int) -> Call:
    return ({"a": _unit(4).double(), "b": _unit(4).double()} if rank == 1 else {}), {}


def sides_of_two_widths(rank: int) -> Call:
    return ({"a": _unit(4, 7)} if rank == 0 else {}), {}


def unpaired(rank: int) -> Call:
    return ({"a": _unit(3)} if rank == 1 else {}), {}


def other_scale(rank: int) -> Call:
    return {"scale": torch.tensor(10.0 + rank)}, {}


def nan_scale(rank: int) -> Call:
    return {"scale": torch.tensor(torch.nan)}, {}


def other_target(rank: int) -> Call:
    return {}, ({"target": SameGroup(torch.zeros(4, dtype=torch.long))} if rank == 1 else {})


def group_without_members(rank: int) -> Call:
    theirs = torch.tensor([0, 1, 2, 3])
    mine = torch.tensor([0, 1, 2, 77]) if rank == 1 else theirs
    return {}, {"target": SameGroup(mine, theirs)}


def too_few_ids(rank: int) -> Call:
    return {}, {"target": SameGroup(torch.zeros(4 - rank, dtype=torch.long))}


def negative_labels(rank: int) -> Call:
    return {}, {"target": LabelOverlap(torch.full((4, 2), 1.0 - 2 * rank))}


def soft_for_one_rank_only(rank: int) -> Call:
    return {}, {"target": Soft(torch.ones(4, 4))}


def mask_of_other_length(rank: int) -> Call:
    return {}, {"mask": SameId(torch.zeros(4 + rank, dtype=torch.long))}


def validity_of_numbers(rank: int) -> Call:
    return {}, {"valid_a_B": torch.ones(4)}


def negative_weight(rank: int) -> Call:
    return {}, {"weight_b_B": torch.tensor([1.0, 1.0, 1.0, -1.0 if rank == 1 else 1.0])}


def infinite_weight(rank: int) -> Call:
    return {}, {"weight_a_B": torch.tensor([1.0, 1.0, 1.0, torch.inf if rank == 0 else 1.0])}


def tile_without_edge(rank: int) -> Call:
    return {}, {"tile": 1 - 2 * rank}


def number_for_rows(rank: int) -> Call:
    return ({"b": torch.tensor(1.0)} if rank == 1 else {}), {}


def other_device(rank: int) -> Call:
    return ({"b": _unit(4).to("meta")} if rank == 1 else {}), {}


def broken_ids(rank: int) -> Call:
    return {}, {"target": SameGroup(torch.arange(4) + 0.5 * rank)}


def label_of_nobody(rank: int) -> Call:
    return {}, {"target": LabelOverlap(torch.ones(4, 2) if rank == 0 else torch.tensor(1.0))}


def other_precision_of_labels(rank: int) -> Call:
    return {}, {"target": LabelOverlap(torch.ones(4, 2, dtype=(torch.float32, torch.float64)[rank]))}


def frozen_on_one_rank(rank: int) -> Call:
    return {"a": _unit(4).requires_grad_(rank == 0)}, {}


def other_backend(rank: int) -> Call:
    return {}, {"backend": "ring" if rank == 1 else "tiled"}


def no_backend(rank: int) -> Call:
    return {}, {"backend": "fast"}


CASES: list[tuple[Callable[[int], Call], list[str]]] = [
    (nan_rows, ["rank 1: 2 rows of a are not finite: 2, 3"]),
    (long_rows, ["rank 0: 4 rows of b are not of unit length (the first has length 3.5): 0, 1, 2, 3"]),
    (short_row, ["rank 1: 1 rows of b are not of unit length (the first has length 0.5): 1"]),
    (other_width, ["rank 0: feature width of a 5", "rank 1: feature width of a 7"]),
    (other_dtype, ["rank 0: dtype torch.float32", "rank 1: dtype torch.float64"]),
    (sides_of_two_widths, ["rank 0: a has shape (4, 7) and b (4, 5)"]),
    (unpaired, ["rank 1: Diagonal pairs rows, but a has 3 and b has 4"]),
    (other_scale, ["rank 0: scale 10", "rank 1: scale 11"]),
    (nan_scale, ["rank 0: the scale is nan", "rank 1: the scale is nan"]),
    (other_target, ["rank 0: target Diagonal", "rank 1: target SameGroup"]),
    (group_without_members, ["rank 1: groups without members on the other side: 77"]),
    (too_few_ids, ["rank 1: the ids of side a have shape (3,), not (4,)"]),
    (negative_labels, ["rank 1: the labels of LabelOverlap are not all finite and >= 0"]),
    (soft_for_one_rank_only, ["Soft has weights for 4 rows of b, but there are 8"]),
    (mask_of_other_length, ["rank 1: the ids of a mask of side a have shape (5,), not (4,)"]),
    (validity_of_numbers, ["the validity of a must be 4 booleans"]),
    (negative_weight, ["rank 1: the weights of b must be 4 finite numbers >= 0"]),
    (infinite_weight, ["rank 0: the weights of a must be 4 finite numbers >= 0"]),
    (tile_without_edge, ["rank 1: the edge of a tile is -1, not 1 or more"]),
    (number_for_rows, ["rank 1: a has shape (4, 5) and b ()"]),
    (other_device, ["rank 1: a is on cpu and b on meta"]),
    (broken_ids, ["rank 1: the ids of side a are torch.float32, not integers"]),
    (label_of_nobody, ["rank 1: the labels of side a have shape (), not (4, 0)"]),
    (other_precision_of_labels, ["rank 0: bits of the target 32", "rank 1: bits of the target 64"]),
    (frozen_on_one_rank, ["rank 0: gradient wanted", "rank 1: gradient not wanted"]),
    (other_backend, ["rank 0: backend tiled", "rank 1: backend ring"]),
    (no_backend, ["there is no backend 'fast'"]),
]


def _unit(num_rows: int, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1)), dim=-1)


def _told(rank: int) -> list[str]:
    told = []
    for make, _ in CASES:
        changed, keywords = make(rank)
        rows = {"a": _unit(4), "b": _unit(4), "scale": torch.tensor(10.0)} | changed
        try:
            contrastive_loss(rows["a"], rows["b"], rows["scale"], **keywords)
            told.append("accepted")
        except UserError as error:
            told.append(str(error))
    return told


def test_one_error_on_every_rank() -> None:
    first, second = run_ranks(2, _told)
    for (make, wanted), ours, theirs in zip(CASES, first, second, strict=True):
        assert ours == theirs, make.__name__
        for text in wanted:
            assert text in ours, (make.__name__, ours)


def test_sigmoid__a_bias_that_differs() -> None:
    for text in run_ranks(2, _other_bias):
        assert "bias -10" in text and "bias -9" in text


def _other_bias(rank: int) -> str:
    with pytest.raises(UserError) as caught:
        sigmoid_loss(_unit(4), _unit(4), torch.tensor(10.0), torch.tensor(-10.0 + rank))
    return str(caught.value)


def test_sigmoid__weights_that_are_no_probabilities() -> None:
    one = torch.ones(1)
    with pytest.raises(UserError, match="no probabilities: some are above 1"):
        sigmoid_loss(_unit(4), _unit(4), one, one, target=Soft(torch.full((4, 4), 1.5)))


def _empty_lists_of_rank(rank: int) -> float:
    ids = torch.tensor([] if rank == 0 else [3, 3, 1, 1])
    labels = torch.empty(0, 2, dtype=torch.bool) if rank == 0 else torch.ones(4, 2, dtype=torch.long)
    rows = _unit(4)[: len(ids)]
    losses = [
        contrastive_loss(rows, rows, torch.tensor(10.0), target=target, mask=SameId(ids))
        for target in (SameGroup(ids), LabelOverlap(labels))
    ]
    return float(sum(losses))


def test_rank_without_rows__whatever_type_its_empty_lists_have() -> None:
    first, second = run_ranks(2, _empty_lists_of_rank)
    assert first == second > 0


def test_invalid_rows_may_hold_anything() -> None:
    a, b = _unit(4), _unit(4)
    valid = torch.tensor([True, False, True, True])
    a[1] = torch.nan
    loss = contrastive_loss(a.requires_grad_(), b, torch.tensor(10.0), valid_a_B=valid)
    loss.backward()
    assert loss.isfinite()
    assert not a.grad[1].any()


def _outsider(rank: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(UserError, match="no member of the process group") as caught:
        contrastive_loss(_unit(4), _unit(4), torch.tensor(10.0), group=group)
    return str(caught.value)


def test_rank_outside_the_group() -> None:
    assert "rank 1" in run_ranks(2, _outsider)[1]
