"""How the rows of one side lie over the ranks, and in which blocks they travel.

Legend: n this rank's rows of the side that travels, N those of all ranks ("columns" of the logits), c those
of one block, W ranks, K any width.

Ranks may hold different numbers of rows, none included. Columns are numbered rank by rank. A block takes a
few rows of every rank, so that one block is exchanged while the last one is computed with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fundusfm.losses.ranks import Ranks

# Products of fewer columns leave a GPU idle; blocks of many more leave nothing to overlap, and backward holds
# the gradients of two. A core is busy with one column of tiles.
BLOCK_COLUMNS = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Block:
    """Some of the columns.

    `index`: which of the N, and `size` how many; `own`: which of the block's are this rank's; `start`: the
    first of this rank's rows among them; `slot`: their places in the padded buffer of an exchange, None when
    it has no padding.
    """

    index: slice | Tensor
    size: int
    own: slice
    start: int
    slot: Tensor | None = None


@dataclass(frozen=True)
class Columns:
    """`counts[k]` rows lie on rank k."""

    counts: tuple[int, ...]
    ranks: Ranks
    device: torch.device

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    def of_rank(self, rank: int) -> slice:
        """The columns of a rank."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def own(self) -> slice:
        return self.of_rank(self.ranks.rank)

    def gather(self, rows_n: Tensor) -> Tensor:
        """A small tensor a row, of all ranks: (n, ...) to (N, ...)."""
        if self.ranks.size == 1 or not self.total:
            return rows_n
        padded = self.ranks.gather(pad(rows_n, self.longest))
        starts = range(0, len(padded), self.longest)
        return torch.cat([padded[i : i + count] for i, count in zip(starts, self.counts, strict=True)])

    def blocks(self) -> list[tuple[slice, Block]]:
        """The blocks of a gather, each with the rows that every rank sends; past its last it sends zeros."""
        size, longest = self.ranks.size, self.longest
        if size == 1:
            return [(slice(0, longest), Block(slice(None), longest, slice(0, longest), 0))]
        step = max(1, BLOCK_COLUMNS["cpu" if self.device.type == "cpu" else "cuda"] // size)
        bounds = [slice(start, min(start + step, longest)) for start in range(0, longest, step)]
        return [(bound, self._block(bound)) for bound in bounds]

    def _block(self, bound: slice) -> Block:
        width = bound.stop - bound.start
        lengths = [min(max(count - bound.start, 0), width) for count in self.counts]
        before = [0, *itertools.accumulate(lengths)]
        rank = self.ranks.rank
        own = slice(before[rank], before[rank + 1])
        if width == self.longest and len(set(lengths)) == 1:
            return Block(slice(None), self.total, own, bound.start)
        places = [(self.of_rank(k).start + bound.start, k * width, n) for k, n in enumerate(lengths)]
        index = torch.cat([torch.arange(column, column + n) for column, _, n in places])
        slot = torch.cat([torch.arange(first, first + n) for _, first, n in places])
        has_padding = len(slot) < width * self.ranks.size
        return Block(
            index.to(self.device, non_blocking=True),
            len(index),
            own,
            bound.start,
            slot.to(self.device, non_blocking=True) if has_padding else None,
        )


def pad(rows_n: Tensor, length: int) -> Tensor:
    """The rows, followed by zeros up to `length`."""
    if len(rows_n) == length:
        return rows_n.contiguous()
    padded = rows_n.new_zeros(length, *rows_n.shape[1:])
    padded[: len(rows_n)] = rows_n
    return padded


class _Turns:
    """Two pieces of memory in turn: what is in one may still be on its way while the other is filled."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def next(self, num_rows: int, like: Tensor) -> Tensor:
        """Room for rows as wide as `like`; never for more of them than before."""
        has_both = len(self._pieces) == 2
        self._pieces.append(self._pieces.pop(0) if has_both else like.new_empty(num_rows, *like.shape[1:]))
        return self._pieces[-1][:num_rows]


class Gather:
    """Blocks come by all-gather, their gradients go back by reduce-scatter, while others are computed."""

    keeps_blocks = True  # for backward: N x D numbers, which saves gathering them again

    def __init__(self, columns: Columns) -> None:
        self.columns, self._ranks = columns, columns.ranks
        self._blocks = columns.blocks()
        self._sent: list[tuple[slice, Tensor, dist.Work, Tensor]] = []
        self._home: Tensor | None = None
        self._gradients, self._received = _Turns(), _Turns()

    def blocks(self, rows_nK: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every block with its rows (c, K); the next one is on its way meanwhile."""
        if self._ranks.size == 1:
            yield self._blocks[0][1], rows_nK
            return
        # One piece of memory for all: many, with tiles coming and going in between, would tear it.
        store = rows_nK.new_empty(self._ranks.size * self.columns.longest, *rows_nK.shape[1:])
        coming = [self._request(rows_nK, store, *one) for one in self._blocks[:1]]
        for number in range(len(self._blocks)):
            block, rows_cK, _, work = coming.pop()
            coming += [self._request(rows_nK, store, *one) for one in self._blocks[number + 1 : number + 2]]
            work.wait()
            yield block, rows_cK if block.slot is None else rows_cK[block.slot]

    def kept(self, rows_cK: list[Tensor]) -> Iterator[tuple[Block, Tensor]]:
        """The same blocks from what forward kept of them."""
        for (_, block), rows in zip(self._blocks, rows_cK, strict=True):
            yield block, rows

    def _request(
        self, rows_nK: Tensor, store: Tensor, bound: slice, block: Block
    ) -> tuple[Block, Tensor, Tensor, dist.Work]:
        own_tK = pad(rows_nK[bound], bound.stop - bound.start)
        out = store[self._ranks.size * bound.start : self._ranks.size * bound.stop]
        work = dist.all_gather_into_tensor(out, own_tK, group=self._ranks.group, async_op=True)
        assert work is not None
        return block, out, own_tK, work  # what is being sent must live until the work is done

    def gradient(self, rows_cK: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the gradient of a block's rows; good until the gradient after the next is asked for."""
        if self._ranks.size == 1:
            return torch.zeros_like(rows_cK, dtype=dtype)
        return self._gradients.next(
            len(rows_cK), rows_cK.new_empty(0, *rows_cK.shape[1:], dtype=dtype)
        ).zero_()

    def give_back(self, grad_cK: Tensor, block: Block) -> None:
        """Send this rank's share of the gradient of a block's rows to those who own them."""
        if self._ranks.size == 1:
            self._home = grad_cK
            return
        bound = next(bound for bound, one in self._blocks if one is block)
        width = bound.stop - bound.start
        if block.slot is not None:
            padded = grad_cK.new_zeros(width * self._ranks.size, *grad_cK.shape[1:])
            grad_cK = padded.index_copy_(0, block.slot, grad_cK)
        parts_WtK = self._received.next(len(grad_cK) if self._ranks.swaps_rows else width, grad_cK)
        # What is being sent is held, too: it must live until the work is done.
        work = self._ranks.start_reduce_scatter(grad_cK, parts_WtK)
        parts_WtK = parts_WtK.view(len(parts_WtK) // width, width, *grad_cK.shape[1:])
        self._sent.append((bound, grad_cK, work, parts_WtK))
        if len(self._sent) > 1:
            self._take(*self._sent.pop(0))

    def _take(self, bound: slice, grad_cK: Tensor, work: dist.Work, parts_WtK: Tensor) -> None:
        """Put the gradient of a block with that of this rank's rows; so two blocks are held, not all."""
        if self._home is None:
            self._home = grad_cK.new_zeros(self.columns.counts[self._ranks.rank], *grad_cK.shape[1:])
        work.wait()
        num_rows = max(0, min(bound.stop, len(self._home)) - bound.start)
        torch.sum(parts_WtK[:, :num_rows], 0, out=self._home[bound.start : bound.start + num_rows])

    def received(self) -> Tensor | None:
        """The gradient of this rank's rows, summed over ranks; None where no rank has any."""
        while self._sent:
            self._take(*self._sent.pop(0))
        home, self._home = self._home, None  # held no longer, so that autograd need not copy it
        self._gradients, self._received = _Turns(), _Turns()
        return home
