"""Global batches do not depend on workers, ranks or the start; damage is replaced, counted and listed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fundusfm.errors import UserError
from fundusfm.recipe.schema import AugmentConfig, DataConfig, Mirror
from fundusfm.shards.index import Offsets, ShardIndex
from fundusfm.shards.tarwalk import walk
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.faults import Fault, Quarantine
from fundusfm.stream.items import ImagesView
from fundusfm.stream.loader import EvalStream, TrainStream, World, make_loader
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.refusals import Holding
from fundusfm.stream.tokens import load_tokens
from fundusfm.stream.views import LEFT, RIGHT, UNKNOWN, PatientPairBatch, PatientPairView
from tests.conftest import Cohort

BATCH = 12


def _config(cohort: Cohort, **changes: object) -> DataConfig:
    config = DataConfig(
        tokenizer=str(cohort.tokenizer), global_batch_size=BATCH, image_size=32, context_length=48
    )
    return DataConfig(**{**config.__dict__, **changes})


def _view(cohort: Cohort, **changes: object) -> PatientPairView:
    config = _config(cohort, **changes)
    return PatientPairView(config, load_tokens(config.tokenizer, config.context_length))


ALONE = World()


def _reader(cohort: Cohort, view: PatientPairView, root: Path | None = None) -> ShardReader:
    return ShardReader(
        ShardIndex.load(root or cohort.shards), "train", view, ShardCache(cohort.shards.parent / "cache", 0)
    )


def _stream(cohort: Cohort, world: World = ALONE, root: Path | None = None, **changes: object) -> TrainStream:
    view = _view(cohort, **changes)
    readers = [(_reader(cohort, view, root), 2.0), (_reader(cohort, view, root), 1.0)]
    return TrainStream(readers, view, seed=5, batch_size=BATCH, window=2, world=world)


def _equal(one: PatientPairBatch, other: PatientPairBatch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((getattr(one, f), getattr(other, f)) for f in one.__dataclass_fields__)
    )


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_workers_and_start__same_batches(synth_cohort: Cohort, workers: int, start: int) -> None:
    stream = _stream(synth_cohort)
    loader = iter(make_loader(stream, workers=workers, start=start))
    for number in range(start, start + 9):
        assert _equal(next(loader), stream[number])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks__slices_of_the_same_global_batch(synth_cohort: Cohort, world_size: int) -> None:
    whole = _stream(synth_cohort)
    shares = [_stream(synth_cohort, World(rank, world_size)) for rank in range(world_size)]
    for number in (0, 3, 40):
        batch, parts = whole[number], [share[number] for share in shares]
        assert [key for part in parts for key in part.keys] == batch.keys
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.color_N34 for part in parts]), batch.color_N34)
        assert torch.equal(torch.cat([part.text_valid_B for part in parts]), batch.text_valid_B)


def test_missing_eye_and_report__first_class(synth_cohort: Cohort) -> None:
    stream = _stream(synth_cohort)
    batches = [stream[b] for b in range(12)]
    eyes = Counter(Counter(batch.patient_N.tolist())[row] for batch in batches for row in range(BATCH))
    assert set(eyes) == {1, 2}
    texts = torch.cat([batch.text_valid_B for batch in batches])
    assert texts.any()
    assert not texts.all()
    for batch in batches:
        assert set(batch.eye_N.tolist()) <= {LEFT, RIGHT, UNKNOWN}
        silent = batch.mask_BT[~batch.text_valid_B].sum(1)
        assert (silent == 2).all()  # [CLS] [SEP]


def test_eyes__match_the_exam(synth_cohort: Cohort) -> None:
    view = _view(synth_cohort)
    reader = _reader(synth_cohort, view)
    for slot in reader.slots():
        stored = reader.read(slot)
        item = view.load(stored, None)
        eyes = {image.eye for image in stored.exam.images if image.modality == "CFP"}
        assert {("left", "right", "")[eye] for eye, _, _ in item.images} == eyes


def test_eyes__exams_without_them_are_not_read(synth_cohort: Cohort) -> None:
    config = _config(synth_cohort)
    tokens = load_tokens(config.tokenizer, config.context_length)
    view = PatientPairView(config, tokens, eyes=(RIGHT,))
    reader = _reader(synth_cohort, view)
    assert 0 < reader.num_exams < _reader(synth_cohort, _view(synth_cohort)).num_exams
    items = [view.load(reader.read(slot), None) for slot in reader.slots()]
    assert all(RIGHT in [eye for eye, _, _ in item.images] for item in items)
    none = Holding("x", 0, {"left.cfp": 3}, {})
    told = view.refusal([none])
    assert told is not None and "an image of CFP of a right eye; there are 3 of CFP" in told.what


@pytest.mark.parametrize("mirror", list(Mirror))
def test_mirror__only_when_asked(synth_cohort: Cohort, mirror: Mirror) -> None:
    plain = AugmentConfig(
        crop_scale=(1, 1), crop_ratio=(1, 1), brightness=0, contrast=0, saturation=0, erase_probability=0
    )
    augment = AugmentConfig(**{**plain.__dict__, "mirror": mirror})
    stream = _stream(synth_cohort, augment=augment)
    still = _stream(synth_cohort, augment=plain)
    changed = same = 0
    for number in range(4):
        for image, unmirrored in zip(stream[number].images, still[number].images, strict=True):
            same += torch.equal(image, unmirrored)
            changed += torch.equal(image, unmirrored.flip(2))
    assert (changed > 20) is (mirror is Mirror.per_eye)
    assert same > 20
    assert (same == 4 * BATCH) or mirror is Mirror.per_eye or changed == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 40])
def test_evaluation__every_exam_exactly_once(synth_cohort: Cohort, world_size: int) -> None:
    view = _view(synth_cohort)
    reader = _reader(synth_cohort, view)
    streams = [EvalStream(reader, view, batch_size=5, world=World(r, world_size)) for r in range(world_size)]
    assert len({len(stream) for stream in streams}) == 1
    batches = [stream[b] for stream in streams for b in range(len(stream))]
    keys = [key for batch in batches if not batch.padding for key in batch.keys]
    assert len(keys) == len(set(keys)) == reader.num_exams


def test_images_view__every_image_with_its_facts(synth_cohort: Cohort) -> None:
    config = _config(synth_cohort, modalities=["CFP", "OCT"])
    view = ImagesView(config)
    reader = _reader(synth_cohort, view)
    totals = synth_cohort.index.totals["train"]
    loader = make_loader(EvalStream(reader, view, batch_size=4, world=World()), workers=2)
    batches = list(loader)
    modalities = Counter(m for batch in batches for m in batch.modalities)
    assert modalities == {m: totals["modalities"][m] for m in ("CFP", "OCT")}
    assert all(len(batch.images) == len(batch.labels) == len(batch.patients) for batch in batches)


@pytest.fixture
def damaged(synth_cohort: Cohort, tmp_path: Path) -> Path:
    """The cohort with the content of one exam's images overwritten and another exam's tar header broken."""
    root = tmp_path / "damaged"
    shutil.copytree(synth_cohort.shards, root)
    index = ShardIndex.load(root)
    first, second = index.of_split("train")[:2]
    offsets = Offsets.load(index.path(first.offsets))
    path = root / first.name
    content = bytearray(path.read_bytes())
    for member in walk(bytes(content), int(offsets.start_E[2]), int(offsets.end_E[2])):
        if member.name.endswith("jpg"):
            content[member.start + 100 : member.start + member.size] = bytes(member.size - 100)
    path.write_bytes(content)
    other = root / second.name
    content = bytearray(other.read_bytes())
    content[int(Offsets.load(index.path(second.offsets)).start_E[1])] ^= 1
    other.write_bytes(content)
    return root


def test_damage__replaced_the_same_way_everywhere(synth_cohort: Cohort, damaged: Path) -> None:
    stream, whole = _stream(synth_cohort, root=damaged), _stream(synth_cohort)
    loader = iter(make_loader(stream, workers=2, start=0))
    faults: set[tuple[str, str]] = set()
    replaced = 0
    for number in range(12):
        batch = next(loader)
        assert _equal(batch, stream[number])
        faults |= {(fault.key, fault.cause) for fault in batch.faults}
        pairs = zip(batch.keys, whole[number].keys, strict=True)
        replaced += sum(found != wanted for found, wanted in pairs)
    assert {cause for _, cause in faults} == {"torn exam", "unreadable image or text"}
    assert len(faults) == 2
    assert replaced >= 4


def test_shard_of_another_size__refused_at_the_start(synth_cohort: Cohort, tmp_path: Path) -> None:
    root = tmp_path / "short"
    shutil.copytree(synth_cohort.shards, root)
    path = root / ShardIndex.load(root).of_split("train")[0].name
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(UserError, match=r"has \d+ bytes, the index says"):
        _stream(synth_cohort, root=root)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        _stream(synth_cohort, root=root)


def test_workers_error__reaches_the_user_without_a_traceback(synth_cohort: Cohort, tmp_path: Path) -> None:
    root = tmp_path / "wiped"
    shutil.copytree(synth_cohort.shards, root)
    for shard in ShardIndex.load(root).of_split("train"):
        (root / shard.name).write_bytes(bytes((root / shard.name).stat().st_size))
    loader = iter(make_loader(_stream(synth_cohort, root=root), workers=2, start=0))
    with pytest.raises(UserError, match="in a row cannot be read") as error:
        next(loader)
    assert "Traceback" not in str(error.value)


def test_quarantine__writes_once_and_stops_over_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    faults = [Fault("set", f"train-{i}.tar", f"{i:06d}", "torn exam", "message") for i in range(3)]
    quarantine = Quarantine(path, num_exams=100, error_budget=0.02)
    quarantine.add(faults[:1], write=True)
    quarantine.add(faults[:2], write=True)
    assert len(path.read_text().splitlines()) == 2
    resumed = Quarantine(path, num_exams=100, error_budget=0.02)
    resumed.add(faults[:2], write=True)
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(UserError, match="3 of 100 exams") as error:
        resumed.add(faults, write=True)
    assert "torn exam in train-2.tar" in str(error.value)


def test_loader_left_in_the_middle__the_process_still_ends(synth_cohort: Cohort) -> None:
    program = """
from tests.stream.test_loader import _stream, make_loader
from tests.conftest import Cohort
from pathlib import Path
import sys
loader = iter(make_loader(_stream(Cohort(Path(sys.argv[1]), Path(sys.argv[2]))), workers=2, start=0))
next(loader)
raise SystemExit(3)
"""
    arguments = [sys.executable, "-c", program, str(synth_cohort.shards), str(synth_cohort.tokenizer)]
    assert subprocess.run(arguments, timeout=60, check=False).returncode == 3


def test_worker_that_cannot_be_started__the_process_still_ends() -> None:
    """Those before it do not hear the signal by which a process that exits ends its children."""
    program = """
import os
from tests.stream.test_loader import _Stuck, make_loader

def fork(own=os.fork, made=[]):
    made.append(None)
    if len(made) == 3:
        raise BlockingIOError("no more processes")
    return own()

os.fork = fork
next(iter(make_loader(_Stuck(), workers=4, start=0)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], timeout=60, check=False, stderr=subprocess.PIPE, text=True
    )
    assert (ended.returncode, "no more processes" in ended.stderr) == (1, True), ended.stderr


def test_batch_left_half_taken__the_worker_is_silent() -> None:
    """A main process that is interrupted while it takes a batch leaves the worker without a reader."""
    program = """
import multiprocessing
import os
import sys
from multiprocessing.connection import Client
from multiprocessing.reduction import DupFd

def work(answers, end):
    if "prepared" in sys.argv:
        from fundusfm.stream.loader import prepare_worker
        prepare_worker(0)
    answers.send(DupFd(os.open(os.devnull, os.O_RDONLY)))  # as torch shares the memory of a batch
    end.wait()

context = multiprocessing.get_context("fork")
(ours, theirs), end = context.Pipe(), context.Event()
worker = context.Process(target=work, args=(theirs, end))
worker.start()
shared = ours.recv()
Client(shared._id[0]).close()  # gone before it has answered the challenge
shared.detach()  # served after the one before
end.set()
worker.join()
"""
    said = {}
    for argument in ("bare", "prepared"):
        arguments = [sys.executable, "-c", program, argument]
        ended = subprocess.run(arguments, timeout=60, check=True, capture_output=True, text=True)
        said[argument] = ended.stderr
    assert "Traceback" in said["bare"]
    assert not said["prepared"]


class _Stuck(Dataset[int]):
    """Its second batch never comes, as from storage that hangs."""

    def __getitem__(self, number: int) -> int:
        if number:
            time.sleep(3600)
        return number


def test_workers__deaf_to_signals_of_a_job_and_ended_by_the_main_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the save takes for which the main process goes on."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = iter(make_loader(_Stuck(), workers=1, start=0))  # type: ignore[arg-type]
    assert next(batches) == 0
    worker = multiprocessing.active_children()[0]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
        status = Path(f"/proc/{worker.pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        assert ignored >> (number - 1) & 1, "what it does later, it would do in the middle of a save"
    worker.join(0.5)
    assert worker.is_alive()
    batches.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL
