"""Batches by number: global batch b of rank r is a function of (recipe, b, r), whichever worker makes it."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fundusfm.errors import UserError
from fundusfm.shards.workers import interrupts_blocked
from fundusfm.stream.faults import ExamUnreadableError, Fault
from fundusfm.stream.hashing import generator
from fundusfm.stream.order import Draw, EpochOrder, Mixture, Slot
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.view import Batch, Item, View

MAX_REPLACEMENTS = 8
_AUGMENT = 21  # what a generator is for; part of its key


@dataclass(frozen=True)
class World:
    """This process among the data-parallel processes."""

    rank: int = 0
    size: int = 1


class TrainStream(Dataset[Batch], Generic[Item, Batch]):
    """`stream[b]` is this rank's slice of global batch b, for any b >= 0."""

    def __init__(
        self,
        sources: Sequence[tuple[ShardReader, float]],
        view: View[Item, Batch],
        *,
        seed: int,
        batch_size: int,
        window: int,
        world: World,
    ) -> None:
        self._readers = [reader for reader, _ in sources]
        self._orders = [EpochOrder(r.sizes, seed + s, window) for s, r in enumerate(self._readers)]
        self._mixture = Mixture([weight for _, weight in sources], batch_size, seed)
        self._view, self._seed = view, seed
        self._batch_size, self._world = batch_size, world

    def places(self, batch: int) -> range:
        """The places of the endless stream that this rank reads for a global batch."""
        share = self._batch_size // self._world.size
        start = batch * self._batch_size + self._world.rank * share
        return range(start, start + share)

    def slot(self, place: int) -> tuple[int, Slot]:
        """Source and slot of a place, before any replacement."""
        draw = self._mixture(place)
        return draw.source, self._orders[draw.source](draw.position)

    def __getitem__(self, batch: int) -> Batch:
        faults: list[Fault] = []
        items, keys = [], []
        for place in self.places(batch):
            item, key = self._load(place, faults)
            items.append(item)
            keys.append(key)
        return self._view.collate(items, keys, faults)

    def _load(self, place: int, faults: list[Fault]) -> tuple[Item, str]:
        """The item of a place; an unreadable exam gives way to another one drawn with the same seed."""
        draw = self._mixture(place)
        for attempt in range(MAX_REPLACEMENTS + 1):
            slot = self._slot(draw, attempt)
            rng = generator(self._seed, _AUGMENT, place, attempt)
            try:
                return load_item(self._readers[draw.source], slot, self._view, rng)
            except ExamUnreadableError as error:
                faults.append(error.fault)
        raise UserError(
            f"{MAX_REPLACEMENTS + 1} exams in a row cannot be read, the last because: {faults[-1].message}",
            where=f"{faults[-1].shards}, shard {faults[-1].shard}",
            fix="run `fundusfm shards check`",
        )

    def _slot(self, draw: Draw, attempt: int) -> Slot:
        order = self._orders[draw.source]
        return order.replacement(draw.position, attempt) if attempt else order(draw.position)


def load_item(reader: ShardReader, slot: Slot, view: View[Item, Any], rng: Any) -> tuple[Item, str]:
    """The item of a slot and where it lies; ExamUnreadableError naming shard, key and cause."""
    stored = reader.read(slot)
    try:
        return view.load(stored, rng), f"{reader.shard_name(slot)}:{stored.key}"
    except (ValueError, KeyError) as error:
        raise reader.unreadable(slot, "unreadable image or text", error) from error


class EvalStream(Dataset[Batch], Generic[Item, Batch]):
    """Every exam of a split exactly once over all ranks, in batches of at most `batch_size`, not augmented.

    Whole batches are dealt to ranks in turn; a rank that runs short repeats its last one, or the first there
    is, marked `padding`, so that all ranks take the same number of steps.
    """

    def __init__(
        self,
        reader: ShardReader,
        view: View[Item, Batch],
        *,
        batch_size: int,
        world: World,
        max_exams: int | None = None,
    ) -> None:
        slots = reader.slots()[:max_exams]
        batches = [slots[i : i + batch_size] for i in range(0, len(slots), batch_size)]
        self._num_own = len(batches[world.rank :: world.size])
        self._length = len(batches[:: world.size])
        self._batches = batches[world.rank :: world.size] or batches[:1]
        self._reader, self._view = reader, view

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Batch:
        batch = self._load(self._batches[min(number, len(self._batches) - 1)])
        batch.padding = number >= self._num_own
        return batch

    def _load(self, slots: list[Slot]) -> Batch:
        loaded, faults = [], []
        for slot in slots:
            try:
                loaded.append(load_item(self._reader, slot, self._view, None))
            except ExamUnreadableError as error:
                faults.append(error.fault)
        if not loaded:
            first = faults[0]
            raise UserError(
                f"no exam of a whole batch can be read, the first because: {first.message}",
                where=f"{first.shards}, shard {first.shard}, exam {first.key}",
                fix="run `fundusfm shards check`",
            )
        return self._view.collate([item for item, _ in loaded], [key for _, key in loaded], faults)


class Forever(Sampler[int]):
    """start, start + 1, start + 2, ...: the loader's only state."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        number = self._start
        while True:
            yield number
            number += 1


class _HandOver(Dataset[Any]):
    """A stream whose user errors are returned: raised in a worker, they would come with its traceback."""

    def __init__(self, stream: Dataset[Any]) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Any:
        try:
            return self._stream[number]
        except UserError as error:
            return error


class Loader(DataLoader[Any]):
    """A loader that raises the user errors its workers hand over, or, without `raises`, yields them."""

    raises = True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers == 0:
            yield from self._checked(super().__iter__())
            return
        with interrupts_blocked():
            batches = self._started()
            # Workers do not listen to the termination signal by which a process that exits ends its children:
            # it would wait for them for ever. This runs before that, however the process comes to its end.
            end = functools.partial(_end_workers, batches)
            atexit.register(end)
        try:
            yield from self._checked(batches)
        finally:
            atexit.unregister(end)
            end()

    def _started(self) -> Any:
        """The workers at work. Where one cannot be started, those before it are not left to be waited for."""
        others = set(multiprocessing.active_children())
        try:
            return super().__iter__()
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise

    def _checked(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if isinstance(batch, UserError) and self.raises:
                raise batch
            yield batch


def _end_workers(batches: Any) -> None:
    """Ask the workers to end; one that does not in some seconds, since its storage hangs, is killed."""
    try:
        batches._shutdown_workers()
    finally:
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()


def make_loader(stream: Dataset[Any], *, workers: int, start: int | None = None, pin: bool = False) -> Loader:
    """A loader of ready batches: endless from batch `start` on, or once through a sized stream if None."""
    return Loader(
        _HandOver(stream),
        batch_size=None,
        sampler=None if start is None else Forever(start),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=prepare_worker,
    )


def prepare_worker(worker: int) -> None:
    """One thread a worker, and no inherited signal handlers: stopping is the main process's decision."""
    torch.set_num_threads(1)
    sys.excepthook = _unless_unread
    # A job that is to end has its signals sent to all of its processes. The main one takes its step and
    # saves, however long that takes, then ends its workers, which also end by themselves once it is gone.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _unless_unread(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A thread of the worker hands its batches over: a main process that is stopped while it takes one is
    no fault of the worker's, and what stopped it has its own message."""
    if not isinstance(error, (EOFError, OSError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, trace)
