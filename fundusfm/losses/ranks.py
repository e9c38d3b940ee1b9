"""What the ranks of a loss tell each other: who they are, small sums, and faults.

Every function here is collective when `ranks.size > 1`: all ranks of the group must call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fundusfm.errors import EveryRankError, UserError

Group = dist.ProcessGroup | Literal["rank"] | None


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a batch: how many, which one this is, and the group they talk through."""

    size: int
    rank: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: Group) -> Ranks:
        """`None`: every rank there is (one, if nothing was initialised); `"rank"`: this rank's own rows."""
        if group == "rank" or not (dist.is_available() and dist.is_initialized()):
            return cls(1, 0, None)
        rank = dist.get_rank(group)
        if rank < 0:
            raise UserError(
                "this rank is no member of the process group of the loss",
                where=f"rank {dist.get_rank()}",
                fix="call the loss on the members of the group only",
            )
        return cls(dist.get_world_size(group), rank, group)

    def gather(self, rows_B: Tensor) -> Tensor:
        """Rows of all ranks, in rank order; every rank brings the same number."""
        if self.size == 1:
            return rows_B
        out = rows_B.new_empty(self.size * len(rows_B), *rows_B.shape[1:])
        dist.all_gather_into_tensor(out, rows_B.contiguous(), group=self.group)
        return out

    def reduce(self, value: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """Sum or maximum over ranks, elementwise; changes `value` in place."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=self.group)
        return value

    @property
    def swaps_rows(self) -> bool:
        """Whether a sum of rows is left to who receives them: gloo's own reduce-scatter sends all twice."""
        return bool(dist.get_backend(self.group) == "gloo")

    def start_reduce_scatter(self, rows_N: Tensor, out: Tensor) -> dist.Work:
        """Begin to send every rank its rows; when the work is done, `out` holds their sum over ranks.

        Where ranks swap rows, `out` is as long as `rows_N` and holds what every rank sent, rank by rank.
        """
        send = dist.all_to_all_single if self.swaps_rows else dist.reduce_scatter_tensor
        work = send(out, rows_N, group=self.group, async_op=True)
        assert work is not None
        return work

    def peer(self, rank: int) -> int:
        """The number that point-to-point calls know a rank of this group by."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def raise_together(self, faults: Sequence[str], fix: str) -> None:
        """Called by all ranks once one of them has a fault: the same error on every rank."""
        told: list[list[str]] = [[] for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather_object(told, list(faults), group=self.group)
        else:
            told = [list(faults)]
        lines = [f"rank {rank}: {'; '.join(of_rank)}" for rank, of_rank in enumerate(told) if of_rank]
        raise EveryRankError("the loss was given rows it cannot use", where=" | ".join(lines), fix=fix)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks of a vector on which every rank then bases the same loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.num_ranks = ranks.size
        return ranks.reduce(value.clone(), "sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.num_ranks, None


def sum_over_ranks(ranks: Ranks, *values: Tensor) -> list[Tensor]:
    """Each value summed over ranks, in one all-reduce; values share a precision. Once differentiable.

    Every rank is to base the same loss on these sums: gradients are multiplied by the number of ranks.
    """
    packed: Tensor = _SumOverRanks.apply(torch.cat([value.flatten() for value in values]), ranks)
    parts = torch.split(packed, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """Logits and their sums are kept in float32 whatever the features are; float64 stays float64."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32
