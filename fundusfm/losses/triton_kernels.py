"""Triton kernels of the contrastive loss, one tile of logits a program; `triton_contrastive` says what for.

Legend: r rows and s columns of a rectangle of the logits, of which a tile has M rows and N columns; K
features of a step through a product; EM, EN, EK these edges as constants.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def"
# Triton has no types, and its functions are no Python: they are compiled for the GPU from their source.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Tiles of 128 x 128 leave room for two programs on a multiprocessor: one computes exponentials while the
# other one multiplies. The interpreter pays by the program, and tests want several of them.
EDGE = 16 if INTERPRETED else 128


def _tuned(kernel: Any) -> Any:
    """The kernel with the fastest of a few settings for each width and dtype, found at its first use."""
    if INTERPRETED:
        return kernel
    settings = ((64, 4, 3), (32, 4, 4), (64, 8, 3), (32, 8, 4), (32, 8, 2))
    configs = [triton.Config({"EK": k}, num_warps=warps, num_stages=stages) for k, warps, stages in settings]
    prune = {"early_config_prune": _with_enough_registers}
    return triton.autotune(configs, key=["width", "NUM_MASKS"], prune_configs_by=prune)(kernel)


def _with_enough_registers(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Products of float32 do not run on tensor cores: with four warps a tile of them spills."""
    is_float32 = arguments["a"].dtype == torch.float32
    return [config for config in configs if config.num_warps == 8 or not is_float32]


@triton.jit
def _first_of_tile(num_rows, num_columns, EM: tl.constexpr, EN: tl.constexpr):
    """First row and column of this program's tile; neighbours in time share rows and columns in the cache."""
    tall: tl.constexpr = 8
    blocks_m, blocks_n = tl.cdiv(num_rows, EM), tl.cdiv(num_columns, EN)
    number = tl.program_id(0)
    first = number // (tall * blocks_n) * tall
    height = tl.minimum(blocks_m - first, tall)
    inner = number % (tall * blocks_n)
    return (first + inner % height) * EM, (inner // height) * EN


@triton.jit
def _equal(ids_a, ids_b, row_M, column_N, number, stride: tl.constexpr):
    id_M = tl.load(ids_a + row_M * stride + number)
    id_N = tl.load(ids_b + column_N * stride + number)
    return (id_M[:, None] == id_N[None, :]) & (id_M >= 0)[:, None]


@triton.jit
def _exponentials(
    a, b, ids_a, ids_b, row_0, column_0, num_rows, num_columns, width, scale, offset,
    NUM_MASKS: tl.constexpr, EM: tl.constexpr, EN: tl.constexpr, EK: tl.constexpr,
):  # fmt: skip
    """2^(scale * a b^T + offset) of a tile, 0 outside of the rectangle and for pairs that are left out."""
    in_M, in_N, k_K = tl.arange(0, EM), tl.arange(0, EN), tl.arange(0, EK)
    # Rows past the end are computed as their tile's first one, so that only the last step of D needs care.
    safe_M = tl.where(row_0 + in_M < num_rows, in_M, 0)
    safe_N = tl.where(column_0 + in_N < num_columns, in_N, 0)
    at_a = a + row_0.to(tl.int64) * width + (safe_M[:, None] * width + k_K[None, :])
    at_b = b + column_0.to(tl.int64) * width + (safe_N[None, :] * width + k_K[:, None])
    cosine_MN = tl.zeros((EM, EN), tl.float32)
    for start in range(0, width, EK):
        is_feature_K = k_K < width - start
        a_MK = tl.load(at_a + start, mask=is_feature_K[None, :], other=0.0)
        b_KN = tl.load(at_b + start, mask=is_feature_K[:, None], other=0.0)
        cosine_MN = tl.dot(a_MK, b_KN, cosine_MN, input_precision="ieee")
    is_pair_MN = (row_0 + in_M < num_rows)[:, None] & (column_0 + in_N < num_columns)[None, :]
    if NUM_MASKS > 0:
        row_M, column_N = row_0 + safe_M, column_0 + safe_N
        is_left_out_MN = _equal(ids_a, ids_b, row_M, column_N, 0, NUM_MASKS + 1)
        for number in tl.static_range(1, NUM_MASKS):
            is_left_out_MN |= _equal(ids_a, ids_b, row_M, column_N, number, NUM_MASKS + 1)
        is_positive_MN = _equal(ids_a, ids_b, row_M, column_N, NUM_MASKS, NUM_MASKS + 1)
        is_pair_MN &= is_positive_MN | (is_left_out_MN == 0)
    return tl.where(is_pair_MN, tl.exp2(cosine_MN * scale + offset), 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _sum_tile(
    a, b, ids_a, ids_b, row_sums, column_sums, num_rows, num_columns, width, scale, offset,
    NUM_MASKS: tl.constexpr, EM: tl.constexpr, EN: tl.constexpr, EK: tl.constexpr,
):  # fmt: skip
    """`row_sums` (tiles across, r) and `column_sums` (tiles down, s) of the exponentials, a tile each."""
    row_0, column_0 = _first_of_tile(num_rows, num_columns, EM, EN)
    exp_MN = _exponentials(
        a, b, ids_a, ids_b, row_0, column_0, num_rows, num_columns, width, scale, offset,
        NUM_MASKS, EM, EN, EK,
    )  # fmt: skip
    row_M, column_N = row_0 + tl.arange(0, EM), column_0 + tl.arange(0, EN)
    at_row = row_sums + (column_0 // EN).to(tl.int64) * num_rows + row_M
    at_column = column_sums + (row_0 // EM).to(tl.int64) * num_columns + column_N
    tl.store(at_row, tl.sum(exp_MN, 1), mask=row_M < num_rows)
    tl.store(at_column, tl.sum(exp_MN, 0), mask=column_N < num_columns)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _weigh_tile(
    a, b, ids_a, ids_b, row_weight, column_weight, partner, grad, lost,
    num_rows, num_columns, width, stride, scale, offset,
    NUM_MASKS: tl.constexpr, IS_PAIRED: tl.constexpr, IS_SPLIT: tl.constexpr,
    EM: tl.constexpr, EN: tl.constexpr, EK: tl.constexpr,
):  # fmt: skip
    """One tile of G into `grad` (parts, r, `stride`); what rounding took from pairs into `lost` (r,)."""
    row_0, column_0 = _first_of_tile(num_rows, num_columns, EM, EN)
    exp_MN = _exponentials(
        a, b, ids_a, ids_b, row_0, column_0, num_rows, num_columns, width, scale, offset,
        NUM_MASKS, EM, EN, EK,
    )  # fmt: skip
    row_M, column_N = row_0 + tl.arange(0, EM), column_0 + tl.arange(0, EN)
    is_row_M, is_column_N = row_M < num_rows, column_N < num_columns
    weight_M = tl.load(row_weight + row_M, mask=is_row_M, other=0.0)
    weight_N = tl.load(column_weight + column_N, mask=is_column_N, other=0.0)
    grad_MN = exp_MN * (weight_M[:, None] + weight_N[None, :])
    rounded_MN = grad_MN.to(grad.dtype.element_ty)
    at_MN = grad + row_M[:, None] * stride + column_N[None, :]
    is_inside_MN = is_row_M[:, None] & is_column_N[None, :]
    tl.store(at_MN, rounded_MN, mask=is_inside_MN)
    if IS_SPLIT:
        rest_MN = grad_MN - rounded_MN.to(tl.float32)
        tl.store(at_MN + num_rows * stride, rest_MN.to(grad.dtype.element_ty), mask=is_inside_MN)
    if IS_PAIRED:  # without a branch for the few tiles that hold a pair: it would cost half the registers
        place_M = tl.load(partner + row_M, mask=is_row_M, other=-1)
        is_here_M = (place_M >= column_0) & (place_M < tl.minimum(column_0 + EN, num_columns))
        is_pair_MN = (place_M - column_0)[:, None] == tl.arange(0, EN)[None, :]
        grad_M = tl.sum(tl.where(is_pair_MN, grad_MN, 0.0), 1)
        lost_M = grad_M - grad_M.to(grad.dtype.element_ty).to(tl.float32)
        tl.store(lost + row_M, lost_M, mask=is_here_M)  # no other tile holds this row's pair


sum_tiles, weigh_tiles = _tuned(_sum_tile), _tuned(_weigh_tile)
