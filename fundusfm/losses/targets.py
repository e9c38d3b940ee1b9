"""Who is whose positive, and which pairs are no candidates. Ids and labels only: never a matrix of pairs.

Legend: B this rank's rows as the caller gave them, m and n its valid rows of the sides a and b, N the valid
rows of b on all ranks, c those of one block, C labels, K any width.

A target says how much pair (i, j) weighs, w_ij >= 0. Row i's mass w_ij / sum_j w_ij lies on its positives,
column j's is w_ij / sum_i w_ij. What the losses need of it is linear in w, so pairs are never listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses.columns import Block, Columns
from fundusfm.losses.faults import are_unusable, ids_fault, shape_fault
from fundusfm.losses.ranks import accumulation_dtype


@dataclass(frozen=True)
class Sides:
    """The valid rows of both sides: their places among the rows as given, and how they lie over ranks.

    `rows_m`, `rows_n`: indices into this rank's B rows, None for all of them; `given`: layout of b's rows
    before the invalid ones were left out, `columns`: after.
    """

    rows_m: Tensor | None
    rows_n: Tensor | None
    given: Columns
    columns: Columns

    def of_a(self, value_B: Tensor) -> Tensor:
        return value_B if self.rows_m is None else value_B[self.rows_m]

    def of_b(self, value_B: Tensor) -> Tensor:
        return value_B if self.rows_n is None else value_B[self.rows_n]


class Positives(ABC):
    """A target on the valid rows.

    `own_fault`: what is wrong with this rank's part, or empty; `is_paired`: no row or column has two
    positives; `are_neighbours`: the rows and columns that `reach` names belong together one by one.
    """

    own_fault = ""
    is_paired = False
    are_neighbours = False

    @abstractmethod
    def row_mass(self, dtype: torch.dtype) -> Tensor:
        """sum_j w_ij over all columns, (m,)."""

    @abstractmethod
    def column_mass(self, dtype: torch.dtype) -> Tensor:
        """sum_i w_ij over the rows of all ranks for this rank's columns, (n,). Collective."""

    def reach(self, block: Block) -> tuple[slice, slice]:
        """The s of this rank's rows and t of the block's columns between which its positives lie."""
        return slice(None), slice(None)

    @abstractmethod
    def rows(self, value_tK: Tensor, block: Block) -> Tensor:
        """sum_j w_ij value_j over the columns within reach, (s, K); may be `value_tK` itself."""

    @abstractmethod
    def columns(self, value_sK: Tensor, block: Block) -> Tensor:
        """sum_i w_ij value_i over the rows within reach, (t, K); may be `value_sK` itself."""

    def keys(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """Ids (m,) and (c,), equal where w_ij > 0, if ids can say it; a negative id equals nothing."""
        return None

    @abstractmethod
    def is_positive(self, row: slice, column: slice, block: Block) -> Tensor:
        """w_ij > 0 for a tile of the block."""


class Target(ABC):
    """A rule for positives, as the caller gives it."""

    @property
    @abstractmethod
    def signature(self) -> tuple[int, int, int]:
        """Numbers in which the ranks must agree: kind, width, and bits of a number that travels."""

    @abstractmethod
    def fault(self, num_a: int, num_b: int) -> str:
        """What is wrong with it for so many rows of this rank, or an empty text."""

    @abstractmethod
    def on(self, sides: Sides) -> Positives:
        """The target on the valid rows. Collective."""


@dataclass(frozen=True)
class Diagonal(Target):
    """Row i of one side and row i of the other are each other's only positive."""

    @property
    def signature(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def fault(self, num_a: int, num_b: int) -> str:
        return "" if num_a == num_b else f"Diagonal pairs rows, but a has {num_a} and b has {num_b}"

    def on(self, sides: Sides) -> Positives:
        return _Pairs(sides)


@dataclass(frozen=True, eq=False)
class SameGroup(Target):
    """Equal ids are positives and share the mass evenly; a negative id belongs to no group.

    `ids_a_B`: integers; `ids_b_B` only when the other side's rows are not the partners of the first's. A row
    whose positives are all invalid has no term. A row of a whose group nobody has in b is an error; a row of
    b whose group nobody has in a is a candidate without a term.
    """

    ids_a_B: Tensor
    ids_b_B: Tensor | None = None

    @property
    def signature(self) -> tuple[int, int, int]:
        return 1, 0, 64

    def fault(self, num_a: int, num_b: int) -> str:
        return ids_fault("ids", self.ids_a_B, num_a, _partner(self.ids_a_B, self.ids_b_B), num_b)

    def on(self, sides: Sides) -> Positives:
        return _Groups(self.ids_a_B.long(), _partner(self.ids_a_B, self.ids_b_B).long(), sides)


@dataclass(frozen=True, eq=False)
class LabelOverlap(Target):
    """Mass by the number of shared labels; `labels_a_BC` holds 0 and 1, or weights of labels."""

    labels_a_BC: Tensor
    labels_b_BC: Tensor | None = None

    @property
    def signature(self) -> tuple[int, int, int]:
        return 2, self.labels_a_BC.shape[-1], 8 * accumulation_dtype(self.labels_a_BC).itemsize

    def fault(self, num_a: int, num_b: int) -> str:
        labels_b = _partner(self.labels_a_BC, self.labels_b_BC)
        num_labels = self.labels_a_BC.shape[-1] if self.labels_a_BC.ndim else 0
        return shape_fault("labels", self.labels_a_BC, (num_a, num_labels), labels_b, (num_b, num_labels))

    def on(self, sides: Sides) -> Positives:
        labels_b = _partner(self.labels_a_BC, self.labels_b_BC)
        # One type on all ranks: numbers are sent as they are.
        dtype = accumulation_dtype(self.labels_a_BC)
        return _Overlap(sides.of_a(self.labels_a_BC).to(dtype), sides.of_b(labels_b).to(dtype), sides)


@dataclass(frozen=True, eq=False)
class Soft(Target):
    """`weights_BN`: weights >= 0 of this rank's rows against all ranks' rows of b, invalid ones included."""

    weights_BN: Tensor

    @property
    def signature(self) -> tuple[int, int, int]:
        return 3, self.weights_BN.shape[-1], 0

    def fault(self, num_a: int, num_b: int) -> str:
        if self.weights_BN.ndim != 2 or len(self.weights_BN) != num_a:
            return f"the weights of Soft have shape {tuple(self.weights_BN.shape)} for {num_a} rows of a"
        return "the weights of Soft are not all finite and >= 0" if are_unusable(self.weights_BN) else ""

    def on(self, sides: Sides) -> Positives:
        if self.weights_BN.shape[1] != sides.given.total:
            positives: Positives = _Weights(self.weights_BN.new_zeros(0, 0), sides)
            found, needed = self.weights_BN.shape[1], sides.given.total
            positives.own_fault = f"Soft has weights for {found} rows of b, but there are {needed}"
            return positives
        weights_mN = sides.of_a(self.weights_BN)
        if sides.given.counts != sides.columns.counts:
            valid_N = sides.given.gather(_chosen(sides.rows_n, sides.given))
            weights_mN = weights_mN[:, valid_N]
        return _Weights(weights_mN, sides)


@dataclass(frozen=True, eq=False)
class SameId:
    """A pair mask: pairs with an equal id >= 0 are no candidates of each other, unless they are positives."""

    ids_a_B: Tensor
    ids_b_B: Tensor | None = None

    def fault(self, num_a: int, num_b: int) -> str:
        """What is wrong with it for so many rows of this rank, or an empty text."""
        return ids_fault("ids of a mask", self.ids_a_B, num_a, self.of_b, num_b)

    @property
    def of_b(self) -> Tensor:
        return _partner(self.ids_a_B, self.ids_b_B)


class Exclusions:
    """Pairs that are left out of every denominator: equal in one of several ids, and no positives."""

    def __init__(self, masks: Sequence[SameId], positives: Positives, sides: Sides) -> None:
        self.positives = positives
        self.ids = [
            (sides.of_a(m.ids_a_B).long(), sides.columns.gather(sides.of_b(m.of_b).long())) for m in masks
        ]

    def tile(self, row: slice, column: slice, block: Block) -> Tensor:
        """Which pairs of a tile of the block are left out."""
        equal = [_equal(ids_m[row], ids_N[block.index][column]) for ids_m, ids_N in self.ids]
        return torch.stack(equal).any(0) & ~self.positives.is_positive(row, column, block)


class _Pairs(Positives):
    """Row m of this rank belongs to one of its own columns, or to none."""

    is_paired = True

    def __init__(self, sides: Sides) -> None:
        columns, device = sides.columns, sides.columns.device
        number_B = torch.full((sides.given.counts[sides.given.ranks.rank],), -1, device=device)
        num_n = columns.counts[columns.ranks.rank]
        number_n = torch.arange(num_n, device=device)
        if sides.rows_n is None:
            number_B = number_n
        else:
            number_B[sides.rows_n] = number_n
        self._partner_m = sides.of_a(number_B)
        self._column_m = torch.where(self._partner_m >= 0, self._partner_m + columns.own.start, -1)
        self._num_n, self._number_N = num_n, torch.arange(columns.total, device=device)
        self.are_neighbours = sides.rows_m is None and sides.rows_n is None

    def row_mass(self, dtype: torch.dtype) -> Tensor:
        return (self._partner_m >= 0).to(dtype)

    def column_mass(self, dtype: torch.dtype) -> Tensor:
        mass_n = torch.zeros(self._num_n, dtype=dtype, device=self._number_N.device)
        return mass_n.index_fill_(0, self._partner_m[self._partner_m >= 0], 1)

    def reach(self, block: Block) -> tuple[slice, slice]:
        if not self.are_neighbours:
            return slice(None), slice(None)
        return slice(block.start, block.start + block.own.stop - block.own.start), block.own

    def rows(self, value_tK: Tensor, block: Block) -> Tensor:
        if self.are_neighbours:
            return value_tK
        # One row more, of zeros, for those whose partner is elsewhere: no wait for how many these are.
        return F.pad(value_tK, (0, 0, 0, 1))[self._places(block)]

    def columns(self, value_sK: Tensor, block: Block) -> Tensor:
        if self.are_neighbours:
            return value_sK
        out = value_sK.new_zeros(block.size + 1, *value_sK.shape[1:])
        return out.index_copy_(0, self._places(block), value_sK)[:-1]

    def keys(self, block: Block) -> tuple[Tensor, Tensor]:
        return self._column_m, self._number_N[block.index]

    def is_positive(self, row: slice, column: slice, block: Block) -> Tensor:
        partner_m, number_c = self.keys(block)
        return _equal(partner_m[row], number_c[column])

    def _places(self, block: Block) -> Tensor:
        """Where in the block each row's partner is; one past its end for those that have none there."""
        offset_m = self._partner_m - block.start
        is_here_m = (offset_m >= 0) & (offset_m < block.own.stop - block.own.start) & (self._partner_m >= 0)
        return torch.where(is_here_m, offset_m + block.own.start, block.size)


class _Groups(Positives):
    """Groups are numbered by the ids of this rank's rows; sums over a group stand for sums over pairs."""

    def __init__(self, ids_a_B: Tensor, ids_b_B: Tensor, sides: Sides) -> None:
        self._ids_m = sides.of_a(ids_a_B)
        self._ids_N = sides.columns.gather(sides.of_b(ids_b_B))
        self._sides = sides
        known = self._ids_m.sort().values
        known = known[torch.cat([known.new_ones(1, dtype=torch.bool), known[1:] != known[:-1]])[: len(known)]]
        self._num_groups = len(known)
        self._group_m, self._group_N = (self._number(known, ids) for ids in (self._ids_m, self._ids_N))
        self.own_fault = self._lonely(sides.given.gather(ids_b_B))

    def _number(self, known: Tensor, ids_x: Tensor) -> Tensor:
        """Number of the group of each id; one group more for those whom no row wants or who want nobody."""
        if not self._num_groups:
            return torch.zeros_like(ids_x)
        found_x = torch.searchsorted(known, ids_x).clamp_(max=self._num_groups - 1)
        return torch.where((known[found_x] == ids_x) & (ids_x >= 0), found_x, self._num_groups)

    def _lonely(self, given_ids_N: Tensor) -> str:
        alone_m = (self._ids_m >= 0) & ~torch.isin(self._ids_m, given_ids_N)
        if not bool(alone_m.any()):
            return ""
        ids = ", ".join(str(i) for i in sorted(set(self._ids_m[alone_m].tolist()))[:5])
        return f"groups without members on the other side: {ids}"

    def row_mass(self, dtype: torch.dtype) -> Tensor:
        ones_N = torch.ones(len(self._ids_N), 1, dtype=dtype, device=self._ids_N.device)
        return self._sum(ones_N, self._group_N)[self._group_m].squeeze(1)

    def column_mass(self, dtype: torch.dtype) -> Tensor:
        ones_m = torch.ones(len(self._ids_m), 1, dtype=dtype, device=self._ids_m.device)
        mass_N = self._sum(ones_m, self._group_m)[self._group_N].squeeze(1)
        return self._sides.columns.ranks.reduce(mass_N, "sum")[self._sides.columns.own]

    def rows(self, value_tK: Tensor, block: Block) -> Tensor:
        return self._sum(value_tK, self._group_N[block.index])[self._group_m]

    def columns(self, value_sK: Tensor, block: Block) -> Tensor:
        return self._sum(value_sK, self._group_m)[self._group_N[block.index]]

    def keys(self, block: Block) -> tuple[Tensor, Tensor]:
        return self._ids_m, self._ids_N[block.index]

    def is_positive(self, row: slice, column: slice, block: Block) -> Tensor:
        return _equal(self._ids_m[row], self._ids_N[block.index][column])

    def _sum(self, value_xK: Tensor, group_x: Tensor) -> Tensor:
        sums = value_xK.new_zeros(self._num_groups + 1, *value_xK.shape[1:]).index_add_(0, group_x, value_xK)
        sums[-1] = 0
        return sums


class _Overlap(Positives):
    """w = labels_a labels_b^T has rank C at most, so its products with anything are cheap."""

    def __init__(self, labels_mC: Tensor, labels_nC: Tensor, sides: Sides) -> None:
        self._mine_mC, self._theirs_NC = labels_mC, sides.columns.gather(labels_nC)
        self._labels_nC, self._sides = labels_nC, sides
        if are_unusable(labels_mC) or are_unusable(labels_nC):
            self.own_fault = "the labels of LabelOverlap are not all finite and >= 0"

    def row_mass(self, dtype: torch.dtype) -> Tensor:
        return self._mine_mC.to(dtype) @ self._theirs_NC.to(dtype).sum(0)

    def column_mass(self, dtype: torch.dtype) -> Tensor:
        total_C = self._sides.columns.ranks.reduce(self._mine_mC.to(dtype).sum(0), "sum")
        return self._labels_nC.to(dtype) @ total_C

    def rows(self, value_tK: Tensor, block: Block) -> Tensor:
        dtype = value_tK.dtype
        return self._mine_mC.to(dtype) @ (self._theirs_NC[block.index].to(dtype).T @ value_tK)

    def columns(self, value_sK: Tensor, block: Block) -> Tensor:
        dtype = value_sK.dtype
        return self._theirs_NC[block.index].to(dtype) @ (self._mine_mC.to(dtype).T @ value_sK)

    def is_positive(self, row: slice, column: slice, block: Block) -> Tensor:
        return self._mine_mC[row].float() @ self._theirs_NC[block.index][column].float().T > 0


class _Weights(Positives):
    """The weights as given, without the invalid rows and columns."""

    def __init__(self, weights_mN: Tensor, sides: Sides) -> None:
        self._weights_mN, self._sides = weights_mN, sides

    def row_mass(self, dtype: torch.dtype) -> Tensor:
        return self._weights_mN.to(dtype).sum(1)

    def column_mass(self, dtype: torch.dtype) -> Tensor:
        columns = self._sides.columns
        return columns.ranks.reduce(self._weights_mN.to(dtype).sum(0), "sum")[columns.own]

    def rows(self, value_tK: Tensor, block: Block) -> Tensor:
        return self._weights_mN[:, block.index].to(value_tK.dtype) @ value_tK

    def columns(self, value_sK: Tensor, block: Block) -> Tensor:
        return self._weights_mN[:, block.index].to(value_sK.dtype).T @ value_sK

    def is_positive(self, row: slice, column: slice, block: Block) -> Tensor:
        return self._weights_mN[row][:, block.index][:, column] > 0


def _partner(a: Tensor, b: Tensor | None) -> Tensor:
    """What belongs to the rows of b; the same as to their partners in a if nothing was said."""
    return a if b is None else b


def _equal(ids_x: Tensor, ids_y: Tensor) -> Tensor:
    """Which pairs have one id, (x, y); a negative id is nobody's."""
    return (ids_x[:, None] == ids_y) & (ids_x >= 0)[:, None]


def _chosen(rows_n: Tensor | None, given: Columns) -> Tensor:
    """Which of this rank's rows are valid, as booleans."""
    num_rows = given.counts[given.ranks.rank]
    if rows_n is None:
        return torch.ones(num_rows, dtype=torch.bool, device=given.device)
    return torch.zeros(num_rows, dtype=torch.bool, device=given.device).index_fill_(0, rows_n, True)
