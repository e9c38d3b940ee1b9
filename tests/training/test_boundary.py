"""Stop flags, and errors that every rank hears of."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fundusfm.errors import ToldByAnotherRank, UserError
from fundusfm.recipe.schema import CheckpointConfig
from fundusfm.stream.faults import Fault
from fundusfm.training.boundary import StepBoundary, StopFlag, raise_together
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_flag__only_notes_the_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopFlag()
    stop.install()
    try:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    finally:
        stop.restore()
    assert signal.getsignal(number) == before


def test_stop_flag__an_interrupt_that_python_drops_is_met_at_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", dropped.append)

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    before, stop = signal.getsignal(signal.SIGINT), StopFlag()
    stop.watch()
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.signal_number = None
        things = [Dropped()]
        things.clear()
        assert len(dropped) == 1
        stop.install()
        assert stop.signal_number == signal.SIGINT
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) == before


def test_stop_flag__a_second_interrupt_stops_at_once() -> None:
    stop = StopFlag()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_hurried
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_hurried
    finally:
        stop.restore()


def _trainer(rank: int, world_size: int) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        local_rank=rank,
        is_global_zero=rank == 0,
        strategy=strategy,
        global_step=7,
    )


def test_raise_together__alone() -> None:
    raise_together(_trainer(0, 1), None)
    with pytest.raises(UserError, match="broken"):
        raise_together(_trainer(0, 1), UserError("broken"))


def _raise_on(rank: int, failing: list[int]) -> str:
    error = UserError(f"broken on rank {rank}", where="here", fix="mend") if rank in failing else None
    try:
        raise_together(_trainer(rank, dist.get_world_size()), error)
    except UserError as heard:
        assert heard.ends_every_rank
        return str(heard)
    except ToldByAnotherRank as ended:
        return f"silent {ended.code} of {ended.error.what}"
    return "goes on"


def test_raise_together__the_first_rank_speaks_for_any() -> None:
    assert run_ranks(3, _raise_on, []) == ["goes on"] * 3
    heard = str(UserError("broken on rank 2", where="here", fix="mend"))
    assert run_ranks(3, _raise_on, [2]) == [heard] + ["silent 0 of broken on rank 2"] * 2
    assert run_ranks(2, _raise_on, [0, 1])[0].startswith("broken on rank 0")


def _fault(rank: int) -> Fault:
    return Fault("set", f"train-{rank}.tar", "key", "decode", "cut short")


def _agree(rank: int, stopped: int, faulty: int) -> tuple[bool, bool, int | None, list[str]]:
    stop = StopFlag()
    stop.signal_number = signal.SIGTERM if rank == stopped else None
    config = CheckpointConfig(every_steps=None, every_minutes=None)
    boundary = StepBoundary(config, None, None, stop, lambda trainer: None)  # type: ignore[arg-type]
    faults = [_fault(rank)] if rank == faulty else []
    stopping, saving, all_faults = boundary._agree(_trainer(rank, dist.get_world_size()), faults)
    return stopping, saving, stop.agreed, [fault.shard for fault in all_faults]


@pytest.mark.parametrize(
    ("stopped", "faulty", "wanted"),
    [
        (9, 9, (False, False, None, [])),
        (1, 9, (True, False, int(signal.SIGTERM), [])),
        (9, 1, (False, False, None, ["train-1.tar"])),
    ],
)
def test_agree__one_rank_is_enough(stopped: int, faulty: int, wanted: tuple[Any, ...]) -> None:
    assert run_ranks(2, _agree, stopped, faulty) == [wanted, wanted]


@pytest.mark.parametrize(
    ("config", "due"),
    [
        (CheckpointConfig(every_steps=7, every_minutes=None), True),
        (CheckpointConfig(every_steps=5, every_minutes=None), False),
        (CheckpointConfig(every_steps=None, every_minutes=1e-9), True),
        (CheckpointConfig(every_steps=None, every_minutes=60), False),
    ],
)
def test_save_due__by_steps_or_by_clock(config: CheckpointConfig, due: bool) -> None:
    boundary = StepBoundary(config, None, None, StopFlag(), lambda trainer: None)  # type: ignore[arg-type]
    assert boundary._is_save_due(_trainer(0, 1)) is due


def test_agree__a_signal_that_comes_meanwhile_is_heard_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopFlag()
    config = CheckpointConfig(every_steps=None, every_minutes=None)
    boundary = StepBoundary(config, None, None, stop, lambda trainer: None)  # type: ignore[arg-type]

    def interrupted(tensor: torch.Tensor, op: Any) -> None:
        stop.signal_number = signal.SIGTERM

    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_reduce", interrupted)
        assert boundary._agree(_trainer(1, 2), [])[0] is False
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    assert boundary._agree(_trainer(1, 2), [])[0] is True
