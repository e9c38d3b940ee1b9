"""Before any feature travels: the ranks compare what they brought, and invalid rows are left out.

Legend: B this rank's rows as given, m and n its valid rows of a and b, D feature width.

Whatever one rank has wrong, all ranks raise the same error at the same place; none is left waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from fundusfm.losses.columns import Columns, Gather
from fundusfm.losses.faults import are_unusable
from fundusfm.losses.ranks import Group, Ranks, accumulation_dtype
from fundusfm.losses.ring import Ring
from fundusfm.losses.targets import Diagonal, Exclusions, Positives, SameId, Sides, Soft, Target

Backend = Literal["auto", "dense", "tiled", "ring", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "dense", "tiled", "ring", "triton")
Mask = SameId | Sequence[SameId] | None

_TOO_LONG = 1.02  # unit rows of bfloat16 are off by half a percent
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FIX_ROWS = (
    "give unit rows, and every rank the same widths, targets and options; if features stopped being finite"
    " while training, fork the last checkpoint with a lower optim.lr or with optim.clip_norm"
)
_NUM_TERMS = 10
_FIX_GROUPS = "give rows without a counterpart a negative id, or leave them out"


@dataclass(frozen=True)
class Given:
    """The arguments of a loss, as the caller gave them."""

    a_BD: Tensor
    b_BD: Tensor
    scale: Tensor
    target: Target
    valid: tuple[Tensor | None, Tensor | None]
    weights: tuple[Tensor | None, Tensor | None]
    mask: Mask
    backend: Backend
    tile: int | None = None
    bias: Tensor | None = None

    @property
    def masks(self) -> tuple[SameId, ...]:
        if self.mask is None:
            return ()
        return (self.mask,) if isinstance(self.mask, SameId) else tuple(self.mask)


@dataclass(frozen=True)
class Prepared:
    """Valid rows only, on agreed terms. `scale` is a number; `longest_logit` bounds every |logit|."""

    a_mD: Tensor
    b_nD: Tensor
    scale: float
    largest_logit: float
    sides: Sides
    positives: Positives
    exclusions: Exclusions | None
    num_rows: int

    @property
    def ranks(self) -> Ranks:
        return self.sides.columns.ranks

    def exchange(self, backend: Backend) -> Gather | Ring:
        """How the rows of b come to the rows of a."""
        return Ring(self.sides.columns) if backend == "ring" else Gather(self.sides.columns)


def prepare(given: Given, group: Group) -> Prepared:
    """Agree, leave out invalid rows, open the target. Collective."""
    ranks = Ranks.of(group)
    faults = _local_faults(given)
    rows_m, rows_n = (None if faults else _places(valid_B) for valid_B in given.valid)
    told = _compare(given, ranks, faults, (rows_m, rows_n))
    columns = Columns(tuple(int(t[_NUM_VALID_B]) for t in told), ranks, given.b_BD.device)
    layout = Columns(tuple(int(t[_NUM_B]) for t in told), ranks, given.b_BD.device)
    sides = Sides(rows_m, rows_n, layout, columns)
    positives = given.target.on(sides)
    _check_target(given.target, positives, columns)
    exclusions = Exclusions(given.masks, positives, sides) if given.masks else None
    longest_a, longest_b = (max(t[place] for t in told) for place in (_LENGTH_A, _LENGTH_B))
    scale = told[0][_SCALE]
    return Prepared(
        sides.of_a(given.a_BD),
        sides.of_b(given.b_BD),
        scale,
        abs(scale) * longest_a * longest_b,
        sides,
        positives,
        exclusions,
        num_rows=sum(int(t[_NUM_VALID_A]) for t in told),
    )


# What a rank tells the others, by place; from `_ALIKE` on, what must be the same on all.
_FAULT, _LENGTH_A, _LENGTH_B, _NUM_VALID_A, _NUM_VALID_B, _NUM_B, _SCALE = range(7)
_ALIKE = slice(_SCALE, None)


def _compare(
    given: Given, ranks: Ranks, faults: list[str], rows: tuple[Tensor | None, Tensor | None]
) -> list[list[float]]:
    """Every rank's numbers; an error on all ranks if any has a fault or if they disagree."""
    sides = (given.a_BD, given.b_BD)
    lengths = [_longest(*one, faults) for one in zip("ab", sides, rows, strict=True)]
    terms = [] if faults else _terms(given)
    faults += [
        f"the {term} is {value}"
        for term, value, _ in terms
        if isinstance(value, float) and not isfinite(value)
    ]
    mine = [1.0] + [0.0] * (_SCALE - 1 + _NUM_TERMS)
    if not faults:
        counts = [len(x) if places is None else len(places) for x, places in zip(sides, rows, strict=True)]
        mine = [0.0, *lengths, *map(float, counts), float(len(given.b_BD)), *(n for _, _, n in terms)]
    told: list[list[float]] = ranks.gather(
        torch.tensor([mine], dtype=torch.float64, device=given.a_BD.device)
    ).tolist()
    if any(of_rank[_FAULT] for of_rank in told):
        ranks.raise_together(faults, _FIX_ROWS)
    for place, (term, value, _) in enumerate(terms, start=_SCALE):
        if len({of_rank[place] for of_rank in told}) > 1:
            ranks.raise_together([f"{term} {value}"], _FIX_ROWS)
    return told


def _terms(given: Given) -> list[tuple[str, object, float]]:
    """What ranks must have in common: its name, its value for people, and a number for it."""
    kind, width, num_bits = given.target.signature
    tensors = (given.a_BD, given.b_BD, given.scale, given.bias)
    has_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    terms: list[tuple[str, object, float]] = [
        # Scale and bias are parameters: equal on all ranks, or training went wrong long before.
        ("scale", *_number(given.scale)),
        ("bias", *_number(given.bias)),
        ("feature width of a", given.a_BD.shape[1], float(given.a_BD.shape[1])),
        ("dtype", given.a_BD.dtype, float(_DTYPES.index(given.a_BD.dtype))),
        ("target", type(given.target).__name__, float(kind)),
        ("width of the target", width, float(width)),
        ("bits of the target", num_bits, float(num_bits)),
        ("number of masks", len(given.masks), float(len(given.masks))),
        ("backend", given.backend, float(BACKENDS.index(given.backend))),
        # A rank without one would not take part in the backward pass that the others wait in.
        ("gradient", "wanted" if has_gradient else "not wanted", float(has_gradient)),
    ]
    assert len(terms) == _NUM_TERMS
    return terms


def _local_faults(given: Given) -> list[str]:
    a, b = given.a_BD, given.b_BD
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        return [f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; both must be rows of one width"]
    faults = _faults_of_options(given)
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        faults.append(f"a is {a.dtype} and b {b.dtype}; both must be the same floating type")
    if a.device != b.device:
        faults.append(f"a is on {a.device} and b on {b.device}")
    for name, rows, valid_B, weight_B in zip("ab", (a, b), given.valid, given.weights, strict=True):
        if valid_B is not None and (valid_B.dtype != torch.bool or valid_B.shape != rows.shape[:1]):
            faults.append(f"the validity of {name} must be {len(rows)} booleans")
        if weight_B is not None and (weight_B.shape != rows.shape[:1] or are_unusable(weight_B)):
            faults.append(f"the weights of {name} must be {len(rows)} finite numbers >= 0")
    about_rows = [given.target.fault(len(a), len(b)), *(mask.fault(len(a), len(b)) for mask in given.masks)]
    return [*faults, *filter(None, about_rows)]


def _faults_of_options(given: Given) -> list[str]:
    faults = []
    for name, value in (("scale", given.scale), ("bias", given.bias)):
        if value is not None and value.numel() != 1:
            faults.append(f"the {name} has {value.numel()} elements, not one")
    if given.backend not in BACKENDS:
        faults.append(f"there is no backend {given.backend!r}; there are {', '.join(BACKENDS)}")
    if given.tile is not None and given.tile < 1:
        faults.append(f"the edge of a tile is {given.tile}, not 1 or more")
    is_sigmoid = given.bias is not None
    if is_sigmoid and isinstance(given.target, Soft) and bool((given.target.weights_BN > 1).any()):
        faults.append("the weights of Soft are no probabilities: some are above 1")
    return faults


def _longest(side: str, rows_BD: Tensor, places: Tensor | None, faults: list[str]) -> float:
    """Length of the longest valid row; rows that are not finite or not of unit length become faults."""
    if faults or not len(rows_BD):
        return 0.0
    length_B = torch.linalg.vector_norm(rows_BD.detach(), dim=1, dtype=accumulation_dtype(rows_BD))
    number = torch.arange(len(length_B), device=length_B.device) if places is None else places
    length = length_B if places is None else length_B[places]
    is_good = (length <= _TOO_LONG) & ((length >= 2 - _TOO_LONG) | (length == 0))
    if bool(is_good.all()):
        return float(length.max()) if len(length) else 0.0
    for told, is_bad in (
        ("not finite", ~length.isfinite()),
        ("not of unit length", length.isfinite() & ~is_good),
    ):
        if is_bad.any():
            rows = ", ".join(f"{i}" for i in number[is_bad][:5].tolist())
            example = (
                "" if told == "not finite" else f" (the first has length {float(length[is_bad][0]):.4g})"
            )
            faults.append(f"{int(is_bad.sum())} rows of {side} are {told}{example}: {rows}")
    return 0.0


def _check_target(target: Target, positives: Positives, columns: Columns) -> None:
    if isinstance(target, Diagonal):
        return
    # Where features are: NCCL sends nothing that lies elsewhere.
    fault = torch.tensor([float(bool(positives.own_fault))], device=columns.device)
    if columns.ranks.reduce(fault, "max").item():
        columns.ranks.raise_together([positives.own_fault] if positives.own_fault else [], _FIX_GROUPS)


def _places(valid_B: Tensor | None) -> Tensor | None:
    """Indices of the valid rows; None if nothing was said, so that no copy is made."""
    return None if valid_B is None else valid_B.nonzero().flatten()


def _number(value: Tensor | None) -> tuple[float, float]:
    number = 0.0 if value is None else float(value.detach())
    return number, number
