"""The same sums and gradients as `Shifted`, by Triton kernels: no logit of the forward pass leaves the chip.

Legend: m rows of this rank, c columns of a block, r and s those of one rectangle of the logits, D feature
width, K masks and one.

Forward: a program computes one tile of a b^T on the tensor cores, makes exponentials of it while it is in
registers and leaves their row and column sums in a workspace that is summed up afterwards: no atomics, so
the same numbers every time. 2 m c D operations; rectangle comes after rectangle, so the workspace is bounded.

Backward multiplies G = e^S (weight_i + weight_j) by both sides. One kernel for all of it could keep G b or
G^T a on chip, not both: the other would go through atomics, an addition to memory for every 128 products, in
an order that differs from run to run; or the kernel would run twice and compute S twice, 8 m c D instead of
6. So a kernel writes G of one rectangle to a buffer of fixed size, and the library multiplies it twice, at
its own speed. G costs 6 bytes an element, which hide behind 6 D operations from D = 256 or so.

Rounding: features of float32 have a G of float32. For features of 16 bits G is float16 for the tensor cores
(bfloat16 alone would double the error of the gradient), scaled by the power of two that puts its largest
possible element just below overflow. The gradient is G less the pull of the positives, and where training
has succeeded the two nearly cancel, so what rounding took from the positives must not be lost. Where a row
has but one positive, the kernel reports what was taken, and it is put back. Otherwise G is written as
the sum of two float16, which costs two products more. So it is for blocks too small to notice the cost: in
the gradient of the scale, a sum over all pairs that may nearly vanish, few pairs average out little.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.losses.columns import Block
from fundusfm.losses.softmax import Pair, Shifted
from fundusfm.losses.targets import Exclusions, Positives
from fundusfm.losses.tiles import Logits

try:
    from fundusfm.losses import triton_kernels as kernels
except ImportError as error:
    raise UserError(
        f"the triton backend of the contrastive loss needs triton, which does not import: {error}",
        where="backend='triton'",
        fix="install triton, which comes with PyTorch for GPUs, or use backend='tiled'",
    ) from error

# Of a rectangle: wide enough to fill a GPU many times over (sums), and to fill it with products of tall and
# thin results (gradients: 128 MiB of float16).
_SUMS_EDGE, _GRADIENT_EDGE = 2**14, 2**13
_PAIRED_FROM = 2**22
_PART = 2**24  # so many numbers are put back at a time
_LOG2_E = math.log2(math.e)


class Fused(Shifted):
    """`Shifted` by fused kernels, for float32, bfloat16 and float16 on a GPU.

    `paired`: the target, where every row and every column has at most one positive (`Diagonal`); it lets
    backward do with two products instead of four. Pair masks beside a target without ids (`LabelOverlap`,
    `Soft`) are left to `Shifted`.
    """

    def __init__(
        self, logits: Logits, shift: float, exclusions: Exclusions | None, paired: Positives | None = None
    ) -> None:
        super().__init__(logits, shift, exclusions)
        self._paired = paired
        self._heaviest = 0.0

    def weights(self, sums: Tensor, weight: Tensor) -> Tensor:
        """As `Shifted`; no element of G is larger than the sum of a row's and a column's `weight`."""
        if weight.numel():
            self._heaviest = max(self._heaviest, float(weight.max()))
        return super().weights(sums, weight)

    def block_sums(self, a_mD: Tensor, b_cD: Tensor, block: Block) -> Pair:
        _check(a_mD)
        ids = self._ids(a_mD, block)
        if ids is None:
            return super().block_sums(a_mD, b_cD, block)
        a_mD, b_cD = a_mD.contiguous(), b_cD.contiguous()
        row_m, column_c = (x.new_zeros(len(x), dtype=torch.float32) for x in (a_mD, b_cD))
        for row, column in _rectangles(len(a_mD), len(b_cD), _SUMS_EDGE):
            num_r, num_s = row.stop - row.start, column.stop - column.start
            row_sums = row_m.new_empty(_cdiv(num_s, kernels.EDGE), num_r)
            column_sums = column_c.new_empty(_cdiv(num_r, kernels.EDGE), num_s)
            features = (a_mD[row], b_cD[column], ids[0][row], ids[1][column])
            self._launch(kernels.sum_tiles, features, (row_sums, column_sums), ())
            row_m[row] += row_sums.sum(0)
            column_c[column] += column_sums.sum(0)
        return row_m, column_c

    def push(self, a_mD: Tensor, b_cD: Tensor, block: Block, weights: Pair, into: Pair) -> None:
        ids = self._ids(a_mD, block)
        if ids is None:
            super().push(a_mD, b_cD, block, weights, into)
            return
        with torch.autocast(a_mD.device.type, enabled=False):
            self._push(a_mD.contiguous(), b_cD.contiguous(), block, ids, weights, into)

    def _push(self, a_mD: Tensor, b_cD: Tensor, block: Block, ids: Pair, weights: Pair, into: Pair) -> None:
        is_exact = a_mD.dtype == torch.float32
        dtype = torch.float32 if is_exact else torch.float16
        factor = 1.0 if is_exact else _headroom(self._heaviest)
        is_paired = not is_exact and self._paired is not None and len(a_mD) * len(b_cD) >= _PAIRED_FROM
        is_split = not is_exact and not is_paired
        row_m, column_c = (weight * factor for weight in weights)
        partner_m, lost_m = self._partners(row_m, block), torch.zeros_like(row_m)
        # Unit rows lose nothing on the way from bfloat16 to float16 that could be seen in a product.
        factors_a, factors_b = a_mD.to(dtype), b_cD.to(dtype)
        buffer: Tensor | None = None
        for row, column in _rectangles(len(a_mD), len(b_cD), _GRADIENT_EDGE):
            num_r, num_s = row.stop - row.start, column.stop - column.start
            stride = _cdiv(num_s, 64) * 64  # rows that start aligned, for the tensor cores
            size = (1 + is_split) * num_r * stride
            buffer = a_mD.new_empty(size, dtype=dtype) if buffer is None else buffer
            grad_prs = buffer[:size].view(1 + is_split, num_r, stride)
            features = (a_mD[row], b_cD[column], ids[0][row], ids[1][column])
            outputs = (row_m[row], column_c[column], partner_m[row] - column.start, grad_prs, lost_m[row])
            self._launch(
                kernels.weigh_tiles, features, outputs, (stride,), IS_PAIRED=is_paired, IS_SPLIT=is_split
            )
            for grad_rs in grad_prs[:, :, :num_s]:
                _add_product(grad_rs, factors_b[column], into[0][row], 1 / factor)
                _add_product(grad_rs.T, factors_a[row], into[1][column], 1 / factor)
        if self._paired is not None and is_paired:
            _put_back(self._paired, block, lost_m[:, None] / factor, (a_mD, b_cD), into)

    def _launch(
        self, kernel: Any, features: tuple[Tensor, ...], tensors: tuple[Tensor, ...], sizes: tuple[int, ...],
        **switches: bool,
    ) -> None:  # fmt: skip
        a_rD, b_sD, ids_rK, _ = features
        num_tiles = _cdiv(len(a_rD), kernels.EDGE) * _cdiv(len(b_sD), kernels.EDGE)
        numbers = (self._logits.scale * _LOG2_E, (self._logits.bias - self._shift) * _LOG2_E)
        constants = {"NUM_MASKS": ids_rK.shape[1] - 1, "EM": kernels.EDGE, "EN": kernels.EDGE, **switches}
        if kernels.INTERPRETED:
            constants["EK"] = kernels.EDGE
            if a_rD.dtype == torch.bfloat16:  # whose bits the interpreter would multiply as integers
                features = (a_rD.float(), b_sD.float(), *features[2:])
        with torch.cuda.device(a_rD.device) if a_rD.is_cuda else contextlib.nullcontext():
            kernel[(num_tiles,)](
                *features, *tensors, len(a_rD), len(b_sD), a_rD.shape[1], *sizes, *numbers, **constants
            )

    def _ids(self, a_mD: Tensor, block: Block) -> Pair | None:
        """The masks' ids and, last, the positives', (m, K) and (c, K); None if ids cannot say it."""
        if self._exclusions is None:
            none_m1, none_c1 = (a_mD.new_empty(n, 1, dtype=torch.long) for n in (len(a_mD), block.size))
            return none_m1, none_c1
        keys = self._exclusions.positives.keys(block)
        if keys is None:
            return None
        ids_m = [ids_m for ids_m, _ in self._exclusions.ids] + [keys[0]]
        ids_c = [ids_N[block.index] for _, ids_N in self._exclusions.ids] + [keys[1]]
        return torch.stack([x.long() for x in ids_m], 1), torch.stack([x.long() for x in ids_c], 1)

    def _partners(self, row_m: Tensor, block: Block) -> Tensor:
        """Which of the block's columns is each row's positive; negative for none of them."""
        if self._paired is None:
            return row_m.new_empty(len(row_m), dtype=torch.int32)
        rows, columns = self._paired.reach(block)
        number_c1 = torch.arange(1, block.size + 1, dtype=torch.float64, device=row_m.device)[:, None]
        partner_m = row_m.new_full((len(row_m),), -1, dtype=torch.int32)
        partner_m[rows] = self._paired.rows(number_c1[columns], block).squeeze(1).int() - 1
        return partner_m


def _check(features: Tensor) -> None:
    if features.dtype == torch.float64:
        raise UserError(
            "the triton backend of the contrastive loss computes in float32; the features are float64",
            where="backend='triton'",
            fix="use backend='tiled' or 'dense', or features of float32, bfloat16 or float16",
        )
    if not features.is_cuda and not kernels.INTERPRETED:
        raise UserError(
            f"the triton backend of the contrastive loss needs a GPU; the features are on {features.device}",
            where="backend='triton'",
            fix="move the features to a GPU, use backend='tiled', or set TRITON_INTERPRET=1 for a slow check",
        )


def _rectangles(num_rows: int, num_columns: int, edge: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the logits of at most edge x edge elements; where there are few rows, of more columns."""
    rows = min(num_rows, edge) or 1
    columns = edge * (edge // rows)
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            yield (
                slice(row, min(row + rows, num_rows)),
                slice(column, min(column + columns, num_columns)),
            )


def _headroom(heaviest: float) -> float:
    """The power of two that brings twice `heaviest` to between 2^14 and 2^15; float16 ends at 2^16."""
    return 2.0 ** math.floor(14 - math.log2(heaviest)) if heaviest > 0 else 1.0


def _add_product(grad_xy: Tensor, factor_yD: Tensor, into_xD: Tensor, by: float) -> None:
    if grad_xy.is_cuda and grad_xy.dtype == torch.float16:
        into_xD.add_(torch.mm(grad_xy, factor_yD, out_dtype=torch.float32), alpha=by)
    else:
        into_xD.addmm_(grad_xy.float(), factor_yD.float(), alpha=by)


def _put_back(paired: Positives, block: Block, lost_m1: Tensor, features: Pair, into: Pair) -> None:
    """Add what the elements of G lost that belong to pairs, to the gradients of both partners."""
    rows, columns = paired.reach(block)
    a_sD, b_tD, lost_s1 = features[0][rows], features[1][columns], lost_m1[rows]
    step = max(16, _PART // max(1, len(a_sD), len(b_tD)))
    for start in range(0, a_sD.shape[1], step):
        part = slice(start, start + step)
        into[0][rows, part] += paired.rows(b_tD[:, part].float(), block) * lost_s1
        into[1][columns, part] += paired.columns(a_sD[:, part].float() * lost_s1, block)


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)
