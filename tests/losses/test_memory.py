"""Memory grows with the number of rows, not with its square: by hooks and by the allocator's own count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fundusfm.losses import SameGroup, SameId, columns, contrastive_loss, sigmoid_loss
from tests.distributed.ranks import run_ranks

WIDTH = 32
# Besides what grows: a tile of 4 MiB and, up to a million logits, the logits themselves.
FIXED = 3 * 1024 * 1024 * 4
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    ids = torch.arange(len(a)) // 2
    return contrastive_loss(a, b, scale, target=SameGroup(ids), mask=SameId(ids // 3), backend="tiled")


LOSSES: dict[str, Loss] = {
    "tiled": lambda a, b, scale: contrastive_loss(a, b, scale, backend="tiled"),
    "ring": lambda a, b, scale: contrastive_loss(a, b, scale, backend="ring"),
    "auto": contrastive_loss,
    "groups and masks": grouped,
    "sigmoid": lambda a, b, scale: sigmoid_loss(a, b, scale, scale.detach()),
}


def saved_bytes(loss: Loss, num_rows: int) -> int:
    """Bytes that autograd keeps for backward, tensors kept elsewhere on the graph's nodes included."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    a, b, scale = _inputs(num_rows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(a, b, scale)
    return sum(kept.values())


def peak_bytes(loss: Loss, num_rows: int, *, backward: bool = True) -> int:
    """Largest sum of live allocations during forward and, if wanted, backward; inputs not counted."""
    a, b, scale = _inputs(num_rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        value = loss(a, b, scale)
        if backward:
            value.backward()
    live, peak = 0, 0
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_of_rank(loss: Loss, num_rows: int, *, backward: bool = True) -> int:
    """The smallest peak of five passes: what a thread of gloo frees last is never counted as free."""
    return min(peak_bytes(loss, num_rows, backward=backward) for _ in range(5))


def _inputs(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(num_rows, WIDTH, generator=generator), dim=-1) for _ in range(2)]
    return rows[0].requires_grad_(), rows[1].requires_grad_(), torch.tensor(14.3, requires_grad=True)


def _forward_of_rank(rank: int, backend: str) -> list[float]:
    """Peak memory of forward passes, in blocks of one rank's rows."""
    num_rows = 256
    losses: list[Loss] = [
        lambda a, b, scale: contrastive_loss(a, b, scale, backend=backend, tile=128),
        lambda a, b, scale: sigmoid_loss(a, b, scale, scale.detach(), backend=backend, tile=128),
    ]
    return [peak_of_rank(loss, num_rows, backward=False) / (num_rows * WIDTH * 4) for loss in losses]


def test_ring__needs_no_more_for_more_ranks() -> None:
    # Four blocks more of others would be four more; sums and weights of all columns are one.
    few, many = (run_ranks(size, _forward_of_rank, "ring")[0] for size in (2, 6))
    assert all(more <= less + 2 for less, more in zip(few, many, strict=True)), (few, many)
    few, many = (run_ranks(size, _forward_of_rank, "tiled")[0] for size in (2, 6))
    assert all(more >= less + 3 for less, more in zip(few, many, strict=True)), (few, many)


def _both_ways_of_rank(rank: int, block_columns: int) -> float:
    """Peak memory of forward and backward, in units of one rank's rows."""
    columns.BLOCK_COLUMNS = {"cpu": block_columns}
    num_rows = 1024
    peak = peak_of_rank(lambda a, b, scale: contrastive_loss(a, b, scale, tile=64, backend="tiled"), num_rows)
    return peak / (num_rows * WIDTH * 4)


def test_gather__backward_holds_two_blocks_and_their_gradients() -> None:
    # The rows of 4 ranks, gradients of its own, two blocks of half its rows that travel, copies of parts.
    many, one = (run_ranks(4, _both_ways_of_rank, block)[0] for block in (512, 4096))
    assert many <= 9.5, many
    # All columns in one block: 4 + 4 on their way, not 2, and no second piece for what never comes.
    assert many + 5 <= one <= 17, (many, one)


def test_gradients__are_not_copied_once_more() -> None:
    size = 16384
    assert peak_bytes(LOSSES["tiled"], size) <= 5 * size * WIDTH * 4 + FIXED


@pytest.mark.parametrize("name", LOSSES)
def test_linear(name: str) -> None:
    sizes = (1024, 4096, 16384)
    kept = [saved_bytes(LOSSES[name], size) for size in sizes]
    peak = [peak_bytes(LOSSES[name], size) for size in sizes]
    row_bytes = WIDTH * 4
    for size, of_graph, live in zip(sizes, kept, peak, strict=True):
        assert of_graph <= 6 * size * row_bytes, (size, of_graph)
        assert live <= 10 * size * row_bytes + FIXED, (size, live)
    assert kept[2] <= 4.2 * kept[1]


def test_what_is_measured__sees_a_matrix() -> None:
    def with_matrix(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * a @ b.T, torch.arange(len(a)))

    assert saved_bytes(with_matrix, 4096) > 4096**2 * 4
    assert peak_bytes(with_matrix, 4096) > 4096**2 * 4
