"""The fused kernels against `Shifted` and dense fp64 formulas, in Triton's interpreter.

Whether Triton interprets is decided when the kernels are imported, so these cases run in a process of their
own: `interpreted(case, ...)` calls `case` there.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fundusfm.errors import UserError
from fundusfm.losses import Diagonal, LabelOverlap, SameGroup, SameId, Soft, contrastive_loss
from fundusfm.losses import columns as columns_module
from fundusfm.losses.columns import Columns
from fundusfm.losses.ranks import Ranks
from fundusfm.losses.softmax import Pair, Shifted
from fundusfm.losses.targets import Exclusions, Sides, Target
from fundusfm.losses.tiles import Logits
from tests.distributed.ranks import run_ranks
from tests.losses import dense
from tests.losses.fused import fused_loss, needs_triton

SHIFT, SCALE = 30.0, 100.0
SHAPES = [(37, 50, 19), (65, 3, 8), (1, 70, 33), (1, 1, 1), (16, 32, 16), (0, 5, 4), (5, 0, 4), (0, 0, 4)]
HALF = (torch.bfloat16, torch.float16)
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
Call = Callable[..., Any]

pytestmark = needs_triton


def _interpret(monkey: pytest.MonkeyPatch) -> None:
    monkey.setenv("TRITON_INTERPRET", "1")
    monkey.setenv("OMP_NUM_THREADS", "1")


def _one_product_for_pairs_of_any_number() -> None:
    from fundusfm.losses import triton_contrastive as module

    torch.set_num_threads(1)
    module._PAIRED_FROM = 0


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with pytest.MonkeyPatch.context() as monkey:
        _interpret(monkey)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(_one_product_for_pairs_of_any_number).result()
    with pool:
        yield lambda case, *arguments: pool.submit(case, *arguments).result()


def rows_of(number: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, width, generator=generator), dim=-1).to(dtype)


def target_of(kind: str, number: int) -> Target:
    ids = torch.arange(number)
    if kind == "group":
        return SameGroup(ids * 7 % 11 - 1)
    if kind == "labels":
        return LabelOverlap(torch.stack([ids % 2, ids % 3 == 0, ids % 5 == 1], 1).float())
    return Soft((ids[:, None] * 3 + ids) % 4 / 3.0) if kind == "soft" else Diagonal()


def masks_of(number: int) -> tuple[SameId, SameId]:
    ids = torch.arange(number)
    return SameId(ids % 6 - 1), SameId(2**40 + ids // 2)


def both_of(
    a: Tensor, b: Tensor, kind: str, *, masked: bool, scale: float = SCALE
) -> tuple[Any, Shifted, Any]:
    """The fused sums, the ones to compare with, and the block of one rank's columns."""
    from fundusfm.losses.triton_contrastive import Fused

    columns = Columns((len(b),), Ranks(1, 0, None), b.device)
    sides = Sides(None, None, columns, columns)
    exclusions, paired = None, None
    if len(a) == len(b) and kind != "none":
        positives = target_of(kind, len(a)).on(sides)
        paired = positives if kind == "diagonal" else None
        exclusions = Exclusions(masks_of(len(a)), positives, sides) if masked else None
    logits = Logits(scale, 16)
    return (
        Fused(logits, SHIFT, exclusions, paired),
        Shifted(logits, SHIFT, exclusions),
        columns.blocks()[0][1],
    )


def gradients(softmax: Any, a: Tensor, b: Tensor, block: Any, weights: Pair) -> Pair:
    sums = softmax.block_sums(a, b, block)
    into = a.new_zeros(a.shape, dtype=torch.float32), b.new_zeros(b.shape, dtype=torch.float32)
    row, column = (softmax.weights(s, w) for s, w in zip(sums, weights, strict=True))
    softmax.push(a, b, block, (row, column), into)
    return into


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    size = torch.linalg.vector_norm(wanted.double())
    return float(torch.linalg.vector_norm(found.double() - wanted.double()) / size.clamp(min=1e-30))


def case_sums(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, masked: bool) -> None:
    num_rows, num_columns, width = shape
    a, b = rows_of(num_rows, width, dtype, 0), rows_of(num_columns, width, dtype, 1)
    fused, shifted, block = both_of(a, b, kind, masked=masked)
    exp = (SCALE * a.double() @ b.double().T - SHIFT).exp()
    if masked:
        exp[shifted._exclusions.tile(slice(None), slice(None), block)] = 0
    found, again, tiled = (s.block_sums(a, b, block) for s in (fused, fused, shifted))
    for side, wanted in enumerate((exp.sum(1), exp.sum(0))):
        assert found[side].dtype == torch.float32
        torch.testing.assert_close(found[side], wanted.float(), rtol=2e-5, atol=0)
        torch.testing.assert_close(found[side], tiled[side], rtol=4e-5, atol=0)
        assert torch.equal(found[side], again[side])


def case_push(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str, masked: bool, is_small: bool = False
) -> None:
    num_rows, num_columns, width = shape
    a, b = rows_of(num_rows, width, dtype, 2), rows_of(num_columns, width, dtype, 3)
    fused, shifted, block = both_of(a, b, kind, masked=masked)
    weights = torch.rand(num_rows) / 50 * (torch.arange(num_rows) % 3 > 0), torch.rand(num_columns) / 50
    weights[1][::4] = 0
    exp = (SCALE * a.double() @ b.double().T - SHIFT).exp()
    if masked:
        exp[shifted._exclusions.tile(slice(None), slice(None), block)] = 0
    by_sum = [torch.where(w > 0, w / s, 0.0) for w, s in zip(weights, (exp.sum(1), exp.sum(0)), strict=True)]
    grad = exp * (by_sum[0][:, None] + by_sum[1])
    found, tiled = (gradients(s, a, b, block, weights) for s in (fused, shifted))
    # One float16 an element of G, whose pairs are exact; two are as good as float32.
    is_single = dtype in HALF and kind == "diagonal" and not is_small
    bound = 3e-4 if is_single else 2e-5
    for side, wanted in enumerate((grad @ b.double(), grad.T @ a.double())):
        assert error(found[side], wanted) < bound
        assert error(found[side], tiled[side]) < bound


def case_rectangles(dtype: torch.dtype, kind: str) -> None:
    """Results do not depend on how many rectangles the logits are taken in."""
    from fundusfm.losses import triton_contrastive as module

    with pytest.MonkeyPatch.context() as monkey:
        for name, size in (("_SUMS_EDGE", 40), ("_GRADIENT_EDGE", 24), ("_PART", 16 * 50)):
            monkey.setattr(module, name, size)
        assert len(list(module._rectangles(50, 50, 24))) == 9
        assert list(module._rectangles(3, 300, 24)) == [
            (slice(0, 3), slice(0, 192)),
            (slice(0, 3), slice(192, 300)),
        ]
        case_no_pull_lost(kind)
        for masked in (False, True):
            case_sums((50, 50, 21), dtype, kind, masked)
            case_push((50, 50, 21), dtype, kind, masked)


def case_small_blocks() -> None:
    """Two float16 an element of G even where each row has one positive."""
    from fundusfm.losses import triton_contrastive as module

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(module, "_PAIRED_FROM", 20 * 20 + 1)
        case_push((20, 20, 9), torch.bfloat16, "diagonal", False, is_small=True)


def case_loss(kind: str, dtype: torch.dtype, alignment: float, masked: bool) -> dict[str, float]:
    """The whole loss, with holes on both sides and weights, against the definition in fp64."""
    number = 45
    a, noise = rows_of(number, 20, torch.float32, 4), rows_of(number, 20, torch.float32, 5)
    b = F.normalize(alignment * a + noise, dim=-1)
    a, b = (x.to(dtype).requires_grad_() for x in (a, b))
    scale = torch.tensor(14.3, requires_grad=True)
    target = target_of(kind, number)
    valid = torch.arange(number) % 9 != 4, torch.arange(number) % 7 != 2
    weights = torch.arange(number) % 3 + 0.5, 2.0 - torch.arange(number) % 3
    mask = masks_of(number) if masked else None
    loss = fused_loss(a, b, scale, target, valid=valid, weights=weights, mask=mask)
    loss.backward()
    x, y, s = (t.detach().double().requires_grad_() for t in (a, b, scale))
    ids = masks_of(number)
    batch = dense.Batch(
        a, b, group_N=target.ids_a_B if kind == "group" else torch.arange(number),
        label_NC=target.labels_a_BC if kind == "labels" else a,
        soft_NN=target.weights_BN if kind == "soft" else a,
        patient_N=ids[0].ids_a_B, report_N=ids[1].ids_a_B,
        valid_a_N=valid[0], valid_b_N=valid[1], weight_a_N=weights[0], weight_b_N=weights[1],
    )  # fmt: skip
    wanted = dense.contrastive(x, y, s, kind, batch, masked=masked)
    wanted.backward()
    errors = {n: error(f.grad, w.grad) for n, f, w in (("a", a, x), ("b", b, y), ("scale", scale, s))}
    errors["loss"] = abs(float(loss.detach()) - float(wanted.detach()))
    assert errors["loss"] < 2e-5
    assert max(errors["a"], errors["b"]) < BOUND[dtype], errors
    assert errors["scale"] < max(1e-3, BOUND[dtype]), errors
    return errors


def case_no_pull_lost(kind: str) -> None:
    """Features that fit almost perfectly: G and the pull of the positives cancel to a hundredth."""
    number, ids = 48, torch.arange(48) if kind == "diagonal" else torch.arange(48) * 7 % 11
    centre = rows_of(number, 24, torch.float32, 6)[ids]
    a, b = (
        F.normalize(centre + 0.1 * rows_of(number, 24, torch.float32, seed), dim=-1).to(torch.bfloat16)
        for seed in (7, 8)
    )
    x, y = (t.double().requires_grad_() for t in (a, b))
    a.requires_grad_(), b.requires_grad_()
    fused_loss(a, b, torch.tensor(14.3), Diagonal() if kind == "diagonal" else SameGroup(ids)).backward()
    share = F.normalize((ids[:, None] == ids).double(), p=1, dim=1)
    logits = 14.3 * x @ y.T
    loss = -(share * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / (2 * number)
    loss.backward()
    pull = 14.3 * torch.linalg.vector_norm(share @ y.detach()) / number
    assert torch.linalg.vector_norm(x.grad) < 0.02 * pull
    assert max(error(a.grad, x.grad), error(b.grad, y.grad)) < BOUND[torch.bfloat16]


def _gradients_of_rank(rank: int) -> tuple[Tensor, list[Tensor]]:
    columns_module.BLOCK_COLUMNS = {
        "cuda": 10,
        "cpu": 10,
    }  # three blocks, of which the last holds rows of one rank only
    share = slice(0, 11) if rank == 0 else slice(11, 36)
    rows = [rows_of(36, 9, torch.bfloat16, seed)[share].requires_grad_() for seed in (8, 9)]
    scale, mask = torch.tensor(SCALE, requires_grad=True), masks_of(36)[0].ids_a_B[share]
    loss = fused_loss(*rows, scale, valid=(None, torch.arange(36)[share] % 5 > 0), mask=SameId(mask))
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in (*rows, scale)]


def case_ranks() -> None:
    """Two ranks of different size, each with pairs in some of the blocks, against one with all rows."""
    (loss, first), (_, second) = run_ranks(2, _gradients_of_rank)
    leaves = [
        *(rows_of(36, 9, torch.bfloat16, s).requires_grad_() for s in (8, 9)),
        torch.tensor(SCALE, requires_grad=True),
    ]
    valid = torch.arange(36) % 5 > 0
    wanted = contrastive_loss(*leaves, valid_b_B=valid, mask=masks_of(36)[0], backend="tiled")
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=2e-5)
    for x, y, leaf in zip(first[:2], second[:2], leaves[:2], strict=True):
        assert error(torch.cat([x, y]) / 2, leaf.grad) < 1.5 * BOUND[torch.bfloat16]
    assert error((first[2] + second[2]) / 2, leaves[2].grad) < 1e-3


def case_refuses_float64() -> str:
    a = rows_of(4, 3, torch.float64, 0)
    fused, _, block = both_of(a, a, "none", masked=False)
    with pytest.raises(UserError) as caught:
        fused.block_sums(a, a, block)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)),
     (SHAPES[0], torch.float16)],
    ids=str,
)  # fmt: skip
def test_sums_and_gradients__ragged_sizes(
    interpreted: Call, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    interpreted(case_sums, shape, dtype, "none", False)
    interpreted(case_push, shape, dtype, "none", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "group"])
def test_sums_and_gradients__masks_and_several_rectangles(
    interpreted: Call, kind: str, dtype: torch.dtype
) -> None:
    interpreted(case_rectangles, dtype, kind)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alignment", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["diagonal", "group", "labels", "soft"])
def test_loss(interpreted: Call, kind: str, dtype: torch.dtype, alignment: float, masked: bool) -> None:
    interpreted(case_loss, kind, dtype, alignment, masked)


@pytest.mark.parametrize("kind", ["diagonal", "group"])
def test_gradient__what_rounding_takes_from_positives_is_put_back(interpreted: Call, kind: str) -> None:
    interpreted(case_no_pull_lost, kind)


def test_gradient__small_blocks_are_as_good_as_float32(interpreted: Call) -> None:
    interpreted(case_small_blocks)


def test_loss__on_two_ranks(interpreted: Call) -> None:
    interpreted(case_ranks)


def test_products_on_a_gpu__accumulate_in_float32() -> None:
    """Shapes and dtypes only: the operator exists for a GPU alone, and this needs none."""
    from fundusfm.losses import triton_contrastive as module

    with FakeTensorMode():
        grad, rows = (torch.empty(8, n, dtype=torch.half, device="cuda") for n in (16, 4))
        into = torch.zeros(16, 4, device="cuda")
        with mock.patch.object(torch, "mm", wraps=torch.mm) as product:
            module._add_product(grad.T, rows, into, 0.5)
    assert product.call_args.kwargs == {"out_dtype": torch.float32}
    assert into.dtype == torch.float32


def test_float64_is_refused(interpreted: Call) -> None:
    told = interpreted(case_refuses_float64)
    assert "float64" in told
    assert "backend='tiled'" in told


def test_cpu_is_refused() -> None:
    a = rows_of(4, 3, torch.float32, 0)
    fused, _, block = both_of(a, a, "none", masked=False)
    with pytest.raises(UserError, match="needs a GPU; the features are on cpu"):
        fused.block_sums(a, a, block)


def test_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import fundusfm.losses as package

    for name in ("triton_contrastive", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"fundusfm.losses.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="needs triton, which does not import"):
        import fundusfm.losses.triton_contrastive  # noqa: F401
