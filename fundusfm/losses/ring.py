"""Blocks that travel from rank to rank, for features too many to gather.

Legend: n this rank's rows, K any width, W ranks.

A rank computes with one block of another rank at a time and passes it on. In backward the gradient of a block
travels with it and every rank adds its share, so it is complete when it is home. Memory is that of two
blocks, whatever the number of ranks; what is sent is half as much again as with a gather.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fundusfm.losses.columns import Block, Columns, pad


class Ring:
    """The same interface as `Gather`."""

    keeps_blocks = False

    def __init__(self, columns: Columns) -> None:
        self.columns, self._ranks = columns, columns.ranks
        self._works: list[dist.Work] = []
        self._gradient: Tensor | None = None

    def blocks(self, rows_nK: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Every rank's rows, this rank's first; the next are on their way meanwhile."""
        size, rank = self._ranks.size, self._ranks.rank
        current = pad(rows_nK, self.columns.longest)
        for step in range(size):
            owner = (rank - step) % size
            is_last = step == size - 1
            incoming, works = (current, []) if is_last else self._pass_on(current)
            yield self._block(owner), current[: self.columns.counts[owner]]
            for work in works:
                work.wait()
            current = incoming

    def kept(self, rows_cK: list[Tensor]) -> Iterator[tuple[Block, Tensor]]:
        """Nothing was kept of other ranks: the blocks travel once more."""
        return self.blocks(rows_cK[0])

    def gradient(self, rows_cK: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the gradient of a block's rows."""
        return torch.zeros_like(rows_cK, dtype=dtype)

    def give_back(self, grad_cK: Tensor, block: Block) -> None:
        """Add this rank's share to the gradient that came with the block, and pass both on."""
        gradient = pad(grad_cK, self.columns.longest)
        if self._gradient is not None:
            self._wait()
            gradient = gradient + self._gradient
        self._gradient = gradient
        if self._ranks.size > 1:
            self._sending = gradient  # must live until it was sent
            self._gradient, self._works = self._pass_on(gradient)

    def received(self) -> Tensor | None:
        """The gradient of this rank's rows, summed over ranks; None where no rank has any."""
        self._wait()
        home, self._gradient = self._gradient, None
        return None if home is None else home[: self.columns.counts[self._ranks.rank]]

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []

    def _pass_on(self, tensor: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Start sending to the next rank and receiving from the one before."""
        size, rank, group = self._ranks.size, self._ranks.rank, self._ranks.group
        incoming = tensor.new_empty(tensor.shape)
        calls = [
            dist.P2POp(dist.isend, tensor, self._ranks.peer((rank + 1) % size), group),
            dist.P2POp(dist.irecv, incoming, self._ranks.peer((rank - 1) % size), group),
        ]
        return incoming, dist.batch_isend_irecv(calls)

    def _block(self, owner: int) -> Block:
        count = self.columns.counts[owner]
        own = slice(0, count if owner == self._ranks.rank else 0)
        return Block(self.columns.of_rank(owner), count, own, 0)
