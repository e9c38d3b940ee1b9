"""The contrastive core beside open_clip's ClipLoss and the dense formula; micro-batches beside a big batch.

    python tests/bench/contrastive.py [--quick]

Width 512, float32, scale 14.3, forward and backward, one thread a rank, ranks dealt out to the cores. All
variants of a size take turns, round after round, each in a process of its own; times are processor seconds of
the busiest rank in its best round, so another job on the machine does not decide. Peak memory is what the
process needed on top of its inputs, gradients included; pieces of 4 MiB and more go back to the system when
they are freed, so that it is what was in use and not what the allocator held back. `sent` is what went over
the loopback device, for one rank.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fundusfm.losses import contrastive_loss
from fundusfm.objectives.cached import Features, cached_loss

WIDTH, SCALE = 512, 14.3
OURS, PEER, DENSE = "ours", "open_clip ClipLoss", "dense formula"
# Products of N x N x WIDTH in forward and backward, two operations each.
PRODUCTS = {OURS: 4, PEER: 6, DENSE: 3}
# By ranks and rows, of ours to the peer: time and peak memory.
GOALS = {
    (1, 8192): (0.49, 1 / 11),
    (1, 16384): (0.50, 1 / 30),
    (2, 8192): (0.49, 1 / 9.7),
    (4, 8192): (0.52, 1 / 6.8),
}
MIB = 2**20
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**22)}


@dataclass(frozen=True)
class Cost:
    """One round: processor seconds, peak bytes and sent bytes of a rank, and the loss."""

    cpu_s: float
    peak_bytes: int
    sent_bytes: float
    loss: float


def dense_formula(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """One matrix of logits and two cross-entropies; on one rank only."""
    logits, pairs = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def make_loss(variant: str, rank: int, world_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if variant == OURS:
        return contrastive_loss
    if variant == DENSE:
        return dense_formula
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)


def measure(rank: int, variant: str, num_rows: int, world_size: int) -> Cost:
    generator = torch.Generator().manual_seed(rank)
    share = num_rows // world_size
    a, b = (F.normalize(torch.randn(share, WIDTH, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(SCALE, requires_grad=True)
    loss_of = make_loss(variant, rank, world_size)
    a.requires_grad_(), b.requires_grad_()
    warm = F.normalize(torch.randn(256, WIDTH), dim=-1).requires_grad_()
    loss_of(warm, warm, scale).backward()  # threads and buffers of the libraries
    base_bytes, sent_bytes = start_peak(), sent_so_far()
    start_s = time.process_time()
    loss = loss_of(a, b, scale)
    loss.backward()
    cpu_s = time.process_time() - start_s
    if world_size > 1:
        dist.barrier()
    return Cost(cpu_s, peak() - base_bytes, (sent_so_far() - sent_bytes) / world_size, loss.item())


def start_peak() -> int:
    """Forget the highest memory of this process so far; bytes it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def sent_so_far() -> int:
    """Bytes sent over the loopback device since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def in_ranks(world_size: int, work: Callable[..., Cost], *arguments: Any) -> Cost:
    """The cost of the busiest rank, each in a new process."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, queue, work, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        costs = [queue.get() for _ in ranks]
        for process in ranks:
            process.join()
    values = zip(*((c.cpu_s, c.peak_bytes, c.sent_bytes, c.loss) for c in costs), strict=True)
    return Cost(*(max(v) for v in values))


def _rank(rank: int, world_size: int, folder: str, queue: Any, work: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # so that no two share one while another idles
    if world_size > 1:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    queue.put(work(rank, *arguments, world_size))


def best_of(rounds: int, variants: list[str], work: Any, world_size: int, *arguments: Any) -> dict[str, Cost]:
    """Each variant's best round."""
    best: dict[str, Cost] = {}
    for _ in range(rounds):
        for variant in variants:
            cost = in_ranks(world_size, work, variant, *arguments)
            if variant not in best or cost.cpu_s < best[variant].cpu_s:
                best[variant] = cost
    return best


def fits(variant: str, num_rows: int) -> bool:
    """Whether the matrices of a variant (16 bytes a logit over all ranks) leave the machine some memory."""
    free_kib = next(
        int(x.split()[1]) for x in Path("/proc/meminfo").read_text().splitlines() if "Available" in x
    )
    return variant == OURS or 16 * num_rows**2 < 0.5 * free_kib * 1024


def compare(console: Console, sizes: dict[int, list[int]], rounds: int) -> None:
    table = Table(title=f"forward and backward, width {WIDTH}, float32")
    for name in ("ranks", "N", "loss", "CPU s", "GFLOP/s", "peak MiB", "sent MiB", "time", "memory", "goal"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for world_size, lengths in sizes.items():
        for num_rows in lengths:
            variants = [
                v for v in (OURS, PEER, DENSE) if (v != DENSE or world_size == 1) and fits(v, num_rows)
            ]
            # Short rounds suffer more from whatever else a machine does, and cost less to repeat.
            turns = 2 * rounds if num_rows <= 8192 else rounds
            best = best_of(turns, variants, measure, world_size, num_rows)
            for variant in best:
                table.add_row(*_row(world_size, num_rows, variant, best))
            table.add_section()
    console.print(table)


def _row(world_size: int, num_rows: int, variant: str, best: dict[str, Cost]) -> list[str]:
    cost, peer = best[variant], best.get(PEER)
    gflop = PRODUCTS[variant] * 2 * num_rows**2 * WIDTH / world_size / 1e9
    row = [str(world_size), f"{num_rows:,}", variant, f"{cost.cpu_s:.3f}", f"{gflop / cost.cpu_s:.0f}"]
    row += [f"{cost.peak_bytes / MIB:.0f}", f"{cost.sent_bytes / MIB:.1f}"]
    if variant != OURS or peer is None:
        return row
    goal = ""
    if (world_size, num_rows) in GOALS:
        time_goal, memory_goal = GOALS[world_size, num_rows]
        goal = f"{time_goal:.2f}x, 1/{1 / memory_goal:.1f}"
    return [*row, f"{cost.cpu_s / peer.cpu_s:.2f}x", f"1/{peer.peak_bytes / cost.peak_bytes:.1f}", goal]


WHOLE, CACHED, OWN_NEGATIVES = "whole batch", "cached features", "negatives of a micro-batch"


def measure_step(rank: int, variant: str, num_images: int, micro: int, world_size: int) -> Cost:
    """One training step of a ViT-Ti/16 at 224 px against fixed texts."""
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", num_classes=128)
    log_scale = torch.nn.Parameter(torch.tensor(2.66))
    images, texts = torch.randn(num_images, 3, 224, 224), F.normalize(torch.randn(num_images, 128), dim=-1)
    pieces = list(zip(images.split(micro), texts.split(micro), strict=True))

    def encode(piece: tuple[Tensor, Tensor]) -> Features:
        return {"a": F.normalize(tower(piece[0]), dim=-1), "b": piece[1]}

    def loss_of(rows: Features) -> Tensor:
        return contrastive_loss(rows["a"], rows["b"], log_scale.exp())

    tower(images[:1]).sum().backward()
    base_bytes, start_s = start_peak(), time.process_time()
    if variant == WHOLE:
        loss = remainder = loss_of(encode((images, texts)))
    elif variant == CACHED:
        parameters = [*tower.parameters(), log_scale]
        loss, remainder = cached_loss(pieces, encode, loss_of, lambda piece: None, parameters)
    else:
        for piece in pieces:
            loss = loss_of(encode(piece)) / len(pieces)
            loss.backward()
        remainder = None
    if remainder is not None:
        remainder.backward()
    return Cost(time.process_time() - start_s, peak() - base_bytes, 0.0, loss.item())


def compare_steps(console: Console, num_images: int, micro: int, rounds: int) -> None:
    best = best_of(rounds, [WHOLE, CACHED, OWN_NEGATIVES], measure_step, 1, num_images, micro)
    table = Table(title=f"ViT-Ti/16, 224 px: a batch of {num_images} in micro-batches of {micro}")
    for name in ("step", "CPU s", "peak MiB", "time", "memory", "goal"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for variant, cost in best.items():
        time_ratio = cost.cpu_s / best[WHOLE].cpu_s
        memory_ratio = best[WHOLE].peak_bytes / cost.peak_bytes
        goal = "1.17x, 1/6" if variant == CACHED else ""
        peak_mib = f"{cost.peak_bytes / MIB:.0f}"
        table.add_row(
            variant, f"{cost.cpu_s:.2f}", peak_mib, f"{time_ratio:.2f}x", f"1/{memory_ratio:.1f}", goal
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    quick = parser.parse_args().quick
    if not FREED_AT_ONCE.items() <= os.environ.items():
        # The allocator reads this when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **FREED_AT_ONCE})
    console = Console(width=120)
    sizes = {1: [2048, 4096, 8192, 16384, 32768], 2: [2048, 8192, 16384], 4: [2048, 8192, 16384]}
    if quick:
        sizes = {1: [2048, 4096], 2: [2048]}
    compare(console, sizes, rounds=1 if quick else 3)
    compare_steps(console, 16 if quick else 128, 4 if quick else 16, rounds=1 if quick else 2)


if __name__ == "__main__":
    main()
