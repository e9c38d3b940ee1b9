"""Images a second of the data path, beside RET-CLIP's and plain webdataset; and what each decoder costs.

    python tests/bench/data.py [--quick]

Every loader has 2 workers of one thread each and gives pairs of eyes with a tokenised report at 224 px. All
variants are measured in turn, round after round, and each keeps its best round, so that another job on the
machine slows none of them alone. `CPU ms` is the processor time of the workers for one image.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from photographs import Pair, build, camera_pairs, shrunk
from PIL import Image
from rich.console import Console
from rich.table import Table
from rivals import lmdb_loader, tar_loader, write_lmdb
from torch.utils.data import DataLoader
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from fundusfm.recipe.schema import AugmentConfig, DataConfig, Mirror
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.decode import Box, decode_crop
from fundusfm.stream.loader import TrainStream, World, make_loader
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.tokens import Tokens, load_tokens
from fundusfm.stream.transforms import DeviceTail
from fundusfm.stream.views import PatientPairView
from fundusfm.stream.vocabulary import train_tokenizer

WORKERS = 2
NUM_EXAMS = 64
STORED = {"camera": None, "512 px": 512, "256 px": 256}
BATCH = {"camera": 16, "512 px": 32, "256 px": 64}  # patients
OURS, IN_WORKER, RET_CLIP, WEBDATASET = "ours", "ours, tail in worker", "RET-CLIP", "webdataset + PIL"
GOALS = {"camera": 5.4, "512 px": 3.3, "256 px": 4.0}  # of ours to RET-CLIP, what a prototype reached
GOAL_SHRUNK = 37.0  # ours on 256 px to RET-CLIP on camera files
MakeLoader = Callable[[], DataLoader[Any]]


@dataclass(frozen=True)
class Speed:
    """A loader's images a second, and the workers' processor time for one image."""

    images_per_s: float
    cpu_ms: float


class TailInWorker(PatientPairView):
    """Our view with colour and normalisation done by the worker, as the other loaders do it."""

    def collate(self, *arguments: Any) -> Any:
        batch = super().collate(*arguments)
        tail = DeviceTail(self._config.mean, self._config.std)
        images = tail.normalise(batch.images, batch.color_N34, batch.erase_N4)
        return replace(batch, images=images)


def our_loader(index: ShardIndex, view: PatientPairView, config: DataConfig, cache: Path) -> DataLoader[Any]:
    reader = ShardReader(index, "train", view, ShardCache(cache, 0))
    stream = TrainStream(
        [(reader, 1.0)], view, seed=0, batch_size=config.global_batch_size, window=2, world=World()
    )
    return make_loader(stream, workers=WORKERS, start=0)


def loaders(pairs: Sequence[Pair], folder: Path, batch: int) -> dict[str, MakeLoader]:
    """The four loaders of one set of photographs, stored in `folder` in both ways."""
    index = build(pairs, NUM_EXAMS, folder / "shards")
    (folder / "lmdb").mkdir()
    write_lmdb(pairs, NUM_EXAMS, folder / "lmdb")
    config = DataConfig(global_batch_size=batch, augment=AugmentConfig(mirror=Mirror.per_eye))
    tokens = tokens_of(index, folder, config)
    tars = [index.path(shard.name) for shard in index.shards]
    return {
        OURS: lambda: our_loader(index, PatientPairView(config, tokens), config, folder),
        IN_WORKER: lambda: our_loader(index, TailInWorker(config, tokens), config, folder),
        RET_CLIP: lambda: lmdb_loader(folder / "lmdb", config, tokens, WORKERS),
        WEBDATASET: lambda: tar_loader(tars, config, tokens, WORKERS),
    }


def tokens_of(index: ShardIndex, folder: Path, config: DataConfig) -> Tokens:
    path = folder / "tokens.json"
    train_tokenizer([index.root], path, vocab_size=200)
    return load_tokens(str(path), config.context_length)


def measure(make: MakeLoader, batch: int, seconds: float) -> Speed:
    """Speed over whole turns of the workers, from the end of the first turn on."""
    before = set(multiprocessing.active_children())
    batches = iter(make())
    turn(batches)
    workers = set(multiprocessing.active_children()) - before
    start, cpu_start = time.perf_counter(), cpu_s(workers)
    num_batches = 0
    while time.perf_counter() - start < seconds:
        num_batches += turn(batches)
    num_images = 2 * batch * num_batches
    elapsed, cpu = time.perf_counter() - start, cpu_s(workers) - cpu_start
    return Speed(num_images / elapsed, 1000 * cpu / num_images)


def turn(batches: Iterator[Any]) -> int:
    for _ in range(WORKERS):
        next(batches)
    return WORKERS


def cpu_s(processes: Iterable[Any]) -> float:
    """Processor time of processes so far: fields 14 and 15 of their status line, in clock ticks."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def best_speeds(
    stored: dict[str, dict[str, MakeLoader]], rounds: int, seconds: float, console: Console
) -> dict[tuple[str, str], Speed]:
    best: dict[tuple[str, str], Speed] = {}
    for number in range(rounds):
        for size, makers in stored.items():
            for name, make in makers.items():
                console.print(f"round {number + 1} of {rounds}: {size}, {name}", style="dim")
                speed, old = measure(make, BATCH[size], seconds), best.get((size, name))
                best[size, name] = speed if old is None else better(speed, old)
    return best


def better(one: Speed, other: Speed) -> Speed:
    return Speed(max(one.images_per_s, other.images_per_s), min(one.cpu_ms, other.cpu_ms))


def speed_table(best: dict[tuple[str, str], Speed]) -> Table:
    table = Table("stored as", "loader", "images/s", "CPU ms", "times RET-CLIP", "by CPU", "goal")
    rival_camera = best["camera", RET_CLIP]
    for (size, name), speed in best.items():
        goal = f"{GOALS[size]:.1f}" if name == OURS else ""
        table.add_row(size, name, *ratios(speed, best[size, RET_CLIP]), goal, end_section=name == WEBDATASET)
    shrunk_speed = ratios(best["256 px", OURS], rival_camera)
    table.add_row("256 px", f"{OURS}, beside RET-CLIP on camera files", *shrunk_speed, f"{GOAL_SHRUNK:.1f}")
    return table


def ratios(speed: Speed, rival: Speed) -> list[str]:
    return [
        f"{speed.images_per_s:.0f}",
        f"{speed.cpu_ms:.2f}",
        f"{speed.images_per_s / rival.images_per_s:.2f}",
        f"{rival.cpu_ms / speed.cpu_ms:.2f}",
    ]


def pil_decode(raw: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def pil_draft(raw: bytes) -> Any:
    """PIL's own scaled decoding, and its resize of a box."""
    image = Image.open(io.BytesIO(raw))
    width, height = image.size
    image.draft("RGB", (336, 336))
    scale = image.width / width
    box = tuple(edge * scale for edge in crop_of(width, height))
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=box))


def pil_full(raw: bytes) -> Any:
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    return np.asarray(image.crop(crop_of(*image.size)).resize((224, 224), Image.Resampling.BICUBIC))


def torchvision_decode(raw: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


def torchvision_full(raw: bytes) -> Any:
    image = torchvision_decode(raw)
    left, top, right, bottom = (int(edge) for edge in crop_of(image.shape[2], image.shape[1]))
    bicubic = InterpolationMode.BICUBIC
    return resized_crop(image, top, left, bottom - top, right - left, [224, 224], bicubic, antialias=True)


def ours(raw: bytes) -> Any:
    height, width, *_ = simplejpeg.decode_jpeg_header(raw)
    return decode_crop(raw, crop_of(width, height), 224)


def crop_of(width: int, height: int) -> Box:
    """The crop that the decoders are compared on: nine tenths of the area."""
    return Box(width * 0.025, height * 0.025, width * 0.975, height * 0.975)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "PIL, whole image": pil_decode,
    "torchvision, whole image": torchvision_decode,
    "simplejpeg, whole image": simplejpeg.decode_jpeg,
    "PIL, crop to 224": pil_full,
    "torchvision, crop to 224": torchvision_full,
    "PIL draft, crop to 224": pil_draft,
    "ours (simplejpeg scaled), crop to 224": ours,
}


def decoder_table(photographs: dict[str, Sequence[Pair]], rounds: int) -> Table:
    """CPU milliseconds an image on one thread, best of the rounds."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for name, decode in DECODERS.items():
            for size, pairs in photographs.items():
                files = [raw for pair in pairs[:4] for raw in pair]
                start = time.process_time()
                for raw in files:
                    decode(raw)
                spent_ms = 1000 * (time.process_time() - start) / len(files)
                best[name, size] = min(spent_ms, best.get((name, size), spent_ms))
    table = Table("CPU ms an image, one thread", *photographs)
    for name in DECODERS:
        table.add_row(name, *(f"{best[name, size]:.2f}" for size in photographs))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    quick = parser.parse_args().quick
    num_pairs, rounds, seconds = (2, 1, 1.0) if quick else (8, 3, 6.0)
    torch.set_num_threads(1)
    console = Console()
    camera = camera_pairs(num_pairs)
    photographs = {size: camera if side is None else shrunk(camera, side) for size, side in STORED.items()}
    for size, pairs in photographs.items():
        num_bytes = np.mean([len(raw) for pair in pairs for raw in pair])
        console.print(f"{size}: {num_bytes / 1000:.0f} kB a file")
    console.print(decoder_table(photographs, rounds + 2))
    with tempfile.TemporaryDirectory() as folder:
        stored = {}
        for size, pairs in photographs.items():
            home = Path(folder) / size.split()[0]
            home.mkdir()
            stored[size] = loaders(pairs, home, BATCH[size])
        console.print(speed_table(best_speeds(stored, rounds, seconds, console)))


if __name__ == "__main__":
    main()
