"""Tensors of a checkpoint as ranges of their flattened values, each range in the file of one rank.

Data parallel ranks hold whole tensors, FSDP blocks of rows, ZeRO any stretch of values. All of these are
ranges of the flattened tensor. So whoever wrote a checkpoint, any number of ranks under any strategy reads
from it just what it needs, and nothing has to be converted. A file holds plain safetensors: whole tensors
under their names in their shapes, other ranges flat, with their place told in the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fundusfm.errors import UserError

_RANGES, _ALIASES = "ranges", "aliases"


class TornCheckpointError(UserError):
    """A checkpoint that is not whole, with the file that shows it."""


class UnreadableCheckpointError(TornCheckpointError):
    """A checkpoint whose storage does not give it now; later it may be whole without anyone's doing."""

    exit_code = 1  # launchers start a run again that ended so


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor: `values` are live, from place `start` of the flattened whole on.

    `shared`: every rank holds the whole, so that one of them writes it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    shared: bool

    @classmethod
    def whole(cls, name: str, values: Tensor) -> Piece:
        """A tensor that every rank holds."""
        return cls(name, tuple(values.shape), 0, values.detach(), True)

    def copied(self) -> Piece:
        """The same in memory of its own, on the CPU: later steps do not change it."""
        values = self.values.detach().to("cpu", copy=True).contiguous()
        return Piece(self.name, self.shape, self.start, values, self.shared)


def deal(pieces: Iterable[Piece], rank: int, world_size: int) -> list[Piece]:
    """What a rank writes: its own ranges, and a fair part of what all hold. The same deal on every rank."""
    load = [0] * world_size
    mine = []
    for piece in pieces:
        if piece.shared:
            owner = load.index(min(load))
            load[owner] += piece.values.numel() * piece.values.element_size()
            if owner == rank:
                mine.append(piece)
        elif piece.values.numel():
            mine.append(piece)
    return mine


def write_pieces(path: Path, pieces: Iterable[Piece], aliases: Mapping[str, str]) -> None:
    """One file of pieces. `aliases`: further names of tied tensors -> the name they are stored under."""
    tensors, ranges = {}, {}
    for piece in pieces:
        if piece.values.numel() == math.prod(piece.shape):
            tensors[piece.name] = piece.values.reshape(piece.shape)
        else:
            tensors[piece.name] = piece.values.flatten()
            ranges[piece.name] = [piece.start, list(piece.shape)]
    save_file(tensors, path, {_RANGES: json.dumps(ranges), _ALIASES: json.dumps(dict(aliases))})


class _Range(NamedTuple):
    start: int
    stop: int
    file: Any
    is_flat: bool


class PieceReader:
    """The tensors that files of one checkpoint hold together, to be read whole or in part."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where = str(paths[0].parent) if paths else ""
        self._ranges: dict[str, list[_Range]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.aliases: dict[str, str] = {}
        for path in paths:
            self._index(safe_open(path, "pt"))
        for name in self._shapes:
            self._refuse_gap(name)

    @property
    def names(self) -> list[str]:
        """Names that tensors are stored under; aliases are not among them."""
        return sorted(self._shapes)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def whole(self, name: str) -> Tensor:
        """A tensor in its shape."""
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` values of the flattened tensor, from `start` on."""
        parts = [
            _slice(one, name, max(start, one.start), min(start + count, one.stop))
            for one in self._ranges[name]
            if (one.start < start + count and start < one.stop) or one.start == one.stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fill(self, piece: Piece) -> None:
        """Bring back the values of a piece."""
        if piece.values.numel():
            found = self.read(piece.name, piece.start, piece.values.numel())
            piece.values.copy_(found.reshape(piece.values.shape))

    def _index(self, file: Any) -> None:
        notes = file.metadata() or {}
        ranges = json.loads(notes.get(_RANGES, "{}"))
        self.aliases |= json.loads(notes.get(_ALIASES, "{}"))
        for name in file.keys():  # noqa: SIM118 - not a mapping
            stored = tuple(file.get_slice(name).get_shape())
            start, shape = ranges.get(name, (0, stored))
            self._shapes[name] = tuple(shape)
            one = _Range(start, start + math.prod(stored), file, len(stored) == 1)
            self._ranges.setdefault(name, []).append(one)

    def _refuse_gap(self, name: str) -> None:
        reached = 0
        self._ranges[name].sort(key=lambda one: one.start)
        for one in self._ranges[name]:
            if one.start != reached:
                break
            reached = one.stop
        if reached != math.prod(self._shapes[name]):
            raise TornCheckpointError(
                f"values of {name} from place {reached} on are in no file", where=self._where
            )


def _slice(one: _Range, name: str, start: int, stop: int) -> Tensor:
    if (start, stop) == (one.start, one.stop):
        values: Tensor = one.file.get_tensor(name)
        return values.flatten()
    if one.is_flat:
        part: Tensor = one.file.get_slice(name)[start - one.start : stop - one.start]
        return part
    whole: Tensor = one.file.get_tensor(name)
    return whole.flatten()[start - one.start : stop - one.start]
