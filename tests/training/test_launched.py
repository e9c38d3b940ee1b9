"""Which launcher started this process, and how the first rank's word reaches the others."""

from __future__ import annotations

import os
import socket

import pytest

from fundusfm.errors import UserError
from fundusfm.recipe.schema import TrainerConfig
from fundusfm.training.launched import Launch
from tests.distributed.ranks import run_ranks

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *(one for one in os.environ if one.startswith(("SLURM_", "TORCHELASTIC_")))):
        monkeypatch.delenv(name, raising=False)


def _torchrun(rank: int, size: int, port: int = 1) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "x",
    }


def _srun(rank: int, size: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS_PER_NODE": str(size),
        "SLURM_NNODES": "1",
    }


@pytest.mark.parametrize("variables", [_torchrun, _srun])
def test_started_from_outside(monkeypatch: pytest.MonkeyPatch, variables: object) -> None:
    assert callable(variables)
    for name, value in variables(1, 2).items():
        monkeypatch.setenv(name, value)
    launch = Launch.found()
    assert (launch.outside, launch.rank, launch.is_first, launch.started_by_first_rank) == (
        True,
        1,
        False,
        False,
    )
    launch.refuse_other_world(TrainerConfig(devices=2))
    for devices, nodes in ((1, 1), (1, 2), (4, 1)):
        with pytest.raises(UserError, match="2 ranks were started, 2 a node"):
            launch.refuse_other_world(TrainerConfig(devices=devices, nodes=nodes))


def test_batch_script__is_no_rank_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _srun(0, 2).items():
        if name != "SLURM_STEP_ID":
            monkeypatch.setenv(name, value)
    assert not Launch.found().outside


def test_started_alone__several_nodes_are_refused() -> None:
    launch = Launch.found()
    assert (launch.outside, launch.is_first) == (False, True)
    launch.refuse_other_world(TrainerConfig(devices=2))
    with pytest.raises(UserError, match="started alone"):
        launch.refuse_other_world(TrainerConfig(nodes=2))


def test_word_of_the_first_rank__inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDUSFM_START", "of an earlier run")
    assert Launch.found().from_first_rank("runs/a", lambda: "step-1") == "step-1"
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch = Launch.found()
    assert launch.started_by_first_rank
    assert launch.from_first_rank("runs/a", lambda: "not asked") == "step-1"
    with pytest.raises(UserError, match="started for runs/a"):
        launch.from_first_rank("runs/b", lambda: "not asked")
    launch.forget()
    with pytest.raises(UserError, match="started for no run"):
        launch.from_first_rank("runs/a", lambda: "not asked")


def _word(rank: int, port: int) -> list[str]:
    """What is heard, and what after torchrun has started the ranks again and kept its store."""
    heard = []
    for attempt in ("0", "1"):
        os.environ.update(_torchrun(rank, 2, port) | {"TORCHELASTIC_RESTART_COUNT": attempt})
        launch = Launch.found()
        heard.append(launch.from_first_rank("runs/a", lambda: f"asked {rank} at {attempt}"))  # noqa: B023
        store = launch._store  # torchrun's own lives on
    assert store is not None
    return heard


def test_word_of_the_first_rank__over_the_launchers_store() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(2, _word, port) == [["asked 0 at 0", "asked 0 at 1"]] * 2
