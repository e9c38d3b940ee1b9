"""The fused contrastive loss on a GPU: is it right, how fast is it, and from which size on does it pay?

    python -m tests.gpu.contrastive [--smoke]

First loss and gradients against a dense fp64 formula and against tiles, then one table: time, achieved rate
and peak memory of every way to compute the loss on bfloat16 features of width 512, beside bare products of
as many operations. `--smoke` runs the same code at toy sizes on the CPU. Ends with 2 without a GPU, with 1 if
a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fundusfm.losses import Diagonal, SameGroup, SameId, contrastive_loss
from tests.losses.fused import fused_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
GOALS = {"forward": 60, "backward": 45}  # percent of the rate of the bare products
PRODUCT, STRIP = "cuBLAS products", 8192
SCALE = 14.3


@dataclass(frozen=True)
class Plan:
    """What to run where. A way that would need more than `limit_s` for one step is left out."""

    device: str
    width: int
    checked: tuple[int, int]  # rows against the dense formula, and against tiles
    sizes: tuple[int, ...]
    limit_s: float = 15.0
    repeat_s: float = 2.0


FULL = Plan("cuda", 512, (2500, 20011), tuple(512 * 2**k for k in range(11)))
SMOKE = Plan("cpu", 12, (20, 27), (16, 32), repeat_s=0.02)


@dataclass(frozen=True)
class Reading:
    """Times of one step, and the most memory that was held beside features and their gradients."""

    forward_s: float
    backward_s: float
    peak_mib: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


def features(num_rows: int, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both sides that half know each other, and the scale."""
    generator = torch.Generator(plan.device).manual_seed(num_rows)
    shape = num_rows, plan.width
    a, noise = (torch.randn(shape, generator=generator, device=plan.device) for _ in range(2))
    rows = (F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (a, a + noise))
    return (*rows, torch.tensor(SCALE, device=plan.device, requires_grad=True))


def gradients(loss: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tuple(leaves))]


def dense(a: Tensor, b: Tensor, scale: Tensor, ids: Tensor | None, left_out: Tensor | None) -> list[Tensor]:
    """Loss and gradients of the definition, in fp64. `ids`: groups, None for pairs; `left_out`: patients."""
    a, b, scale = (x.detach().double().requires_grad_() for x in (a, b, scale))
    ids = torch.arange(len(a), device=a.device) if ids is None else ids
    positive = ids[:, None] == ids
    logits = scale * a @ b.T
    if left_out is not None:
        logits = logits.masked_fill((left_out[:, None] == left_out) & ~positive, -torch.inf)
    mass = positive.double() / positive.sum(1, keepdim=True)
    terms = [torch.where(positive, logits.log_softmax(side), 0) for side in (0, 1)]
    loss = -(mass * sum(terms)).sum() / (2 * len(a))
    return gradients(loss, (a, b, scale))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(plan: Plan, console: Console) -> bool:
    """Whether all results lie within their bounds, and come out the same twice."""
    is_right = True
    for dtype, number in itertools.product(BOUND, plan.checked):
        is_dense = number == plan.checked[0]
        bound = BOUND[dtype] * (1 if is_dense else 1.5)  # tiles round their results as well
        cases = itertools.product((False, True), (False, True))
        errors = [check_case(number, dtype, plan, *case, is_dense=is_dense) for case in cases]
        is_good = max(map(max, errors)) < bound
        is_right &= is_good
        worst = [max(column) for column in zip(*errors, strict=True)]
        name = f"{dtype}, N = {number} against {'dense' if is_dense else 'tiled'}"
        console.print(
            f"{'right' if is_good else 'WRONG'}  {name}: "
            f"relative errors of loss, a, b, scale {' '.join(f'{e:.1e}' for e in worst)}, bound {bound:.1e}"
        )
    return is_right


def check_case(
    number: int, dtype: torch.dtype, plan: Plan, is_group: bool, has_mask: bool, *, is_dense: bool
) -> list[float]:
    """Errors of loss and gradients; infinite if a second run gives anything else."""
    leaves = features(number, plan, dtype)
    index = torch.arange(number, device=plan.device)
    ids, patients = index * 7 % (number // 9), index // 2
    target = SameGroup(ids) if is_group else Diagonal()
    mask = SameId(patients) if has_mask else None
    found, again = (gradients(fused_loss(*leaves, target, mask=mask), leaves) for _ in range(2))
    if is_dense:
        wanted = dense(*leaves, ids if is_group else None, patients if has_mask else None)
    else:
        wanted = gradients(contrastive_loss(*leaves, target=target, mask=mask, backend="tiled"), leaves)
    is_same = all(map(torch.equal, found, again))
    return [error(x, y) if is_same else float("inf") for x, y in zip(found, wanted, strict=True)]


def ways(console: Console) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "triton": fused_loss,
        "tiled": lambda a, b, s: contrastive_loss(a, b, s, backend="tiled"),
        "dense": lambda a, b, s: contrastive_loss(a, b, s, backend="dense"),
    }
    try:
        from open_clip.loss import ClipLoss
    except ImportError as missing:
        console.print(f"open_clip's ClipLoss is left out: {missing}")
        return found
    return found | {"open_clip": ClipLoss()}


class Clock:
    """Seconds between calls, of the device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(loss: Loss, number: int, plan: Plan) -> Reading:
    """The fastest of a few steps; the first one, which compiles, does not count."""
    clock, leaves = Clock(plan.device), features(number, plan, torch.bfloat16)
    gradients(loss(*leaves), leaves)
    held = _peak(plan, start=True)
    readings: list[tuple[float, float]] = []
    started = clock.now()
    while len(readings) < 20 and (not readings or clock.now() - started < plan.repeat_s):
        times = [clock.now()]
        value = loss(*leaves)
        times.append(clock.now())
        gradients(value, leaves)
        times.append(clock.now())
        readings.append((times[1] - times[0], times[2] - times[1]))
        del value
    forward, backward = (min(column) for column in zip(*readings, strict=True))
    return Reading(forward, backward, _peak(plan) - held)


def measure_products(number: int, plan: Plan) -> Reading:
    """One product of as many operations as forward has, and thrice as many."""
    clock, (a, b, _) = Clock(plan.device), features(number, plan, torch.bfloat16)
    a, b = a.detach(), b.detach()
    out = a.new_empty(min(STRIP, number), number)
    times = []
    for _ in range(4):
        start = clock.now()
        for row in range(0, number, STRIP):
            strip = a[row : row + STRIP]
            torch.mm(strip, b.T, out=out[: len(strip)])
        times.append(clock.now() - start)
    best = min(times[1:])
    return Reading(best, 3 * best, 0.0)


def _peak(plan: Plan, *, start: bool = False) -> float:
    if plan.device != "cuda":
        return 0.0
    if start:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return torch.cuda.max_memory_allocated() / 2**20


def sweep(plan: Plan, console: Console) -> dict[tuple[str, int], Reading]:
    """Every way at every size that it can reach."""
    found: dict[tuple[str, int], Reading] = {}
    for name, loss in ways(console).items():
        for number in plan.sizes:
            before = found.get((name, number // 2))
            if before is not None and 4 * before.total_s > plan.limit_s:
                break
            try:
                found[name, number] = measure(loss, number, plan)
            except torch.OutOfMemoryError:
                break
            finally:
                if plan.device == "cuda":
                    torch.cuda.empty_cache()
    return found | {(PRODUCT, number): measure_products(number, plan) for number in plan.sizes}


def show(found: dict[tuple[str, int], Reading], plan: Plan, console: Console) -> None:
    table = Table("N", "way", "forward ms", "TFLOP/s", "%", "backward ms", "TFLOP/s", "%", "peak MiB")
    for number in plan.sizes:
        product = found[PRODUCT, number]
        operations = 2 * number**2 * plan.width
        for (name, size), reading in found.items():
            if size != number:
                continue
            cells = [f"{number:,}", name]
            for ours, theirs, times in (
                (reading.forward_s, product.forward_s, 1),
                (reading.backward_s, product.backward_s, 3),
            ):
                rate = times * operations / ours / 1e12
                cells += [f"{ours * 1e3:.3f}", f"{rate:.3g}", f"{100 * theirs / ours:.0f}"]
            table.add_row(*cells, f"{reading.peak_mib:.0f}")
    console.print(table)


def verdict(found: dict[tuple[str, int], Reading], plan: Plan, console: Console) -> None:
    """From which size on triton is the fastest of our ways, and whether the goals are met at the largest."""
    start = None
    for number in reversed(plan.sizes):
        others = [found[name, number].total_s for name in ("tiled", "dense") if (name, number) in found]
        ours = found.get(("triton", number))
        if ours is not None and others and ours.total_s > min(others):
            break
        start = number
    console.print(f"auto picks triton from N = {start}" if start else "auto never picks triton")
    largest = max(number for name, number in found if name == "triton")
    ours, product = found["triton", largest], found[PRODUCT, largest]
    for name, mine, theirs in (
        ("forward", ours.forward_s, product.forward_s),
        ("backward", ours.backward_s, product.backward_s),
    ):
        percent = 100 * theirs / mine
        console.print(
            f"{name} at N = {largest:,}: {percent:.0f}% of the rate of the products, goal {GOALS[name]}%"
        )


def settings(console: Console) -> None:
    from fundusfm.losses import triton_kernels as kernels

    for name in ("sum_tiles", "weigh_tiles"):
        for key, config in getattr(getattr(kernels, name), "cache", {}).items():
            console.print(f"{name} {key}: {config}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on the CPU")
    is_smoke = parser.parse_args(arguments).smoke
    console = Console(width=120, highlight=False, soft_wrap=True)
    if is_smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is later
    elif not torch.cuda.is_available():
        console.print("this needs a GPU, and torch sees none; --smoke runs toy sizes on the CPU")
        return 2
    plan = SMOKE if is_smoke else FULL
    console.print(torch.cuda.get_device_name() if plan.device == "cuda" else "CPU, interpreted")
    is_right = check(plan, console)
    found = sweep(plan, console)
    settings(console)
    show(found, plan, console)
    verdict(found, plan, console)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
