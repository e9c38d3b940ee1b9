"""Which launcher started this process, and how the first rank's word reaches the others."""

from __future__ import annotations

import os
import platform
import pty
from collections.abc import Callable

import pytest
import torch.distributed as dist

from fundusfm.errors import ToldByAnotherRank, UserError
from fundusfm.recipe.schema import TrainerConfig
from fundusfm.training import launched
from fundusfm.training.launched import Launch, has_terminal
from tests.distributed.ranks import free_port, run_ranks

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *(one for one in os.environ if one.startswith(("SLURM_", "TORCHELASTIC_")))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launched, "has_terminal", lambda: False)  # whatever the tests were started from


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
        "SLURM_STEP_NUM_TASKS": str(size),
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


BATCH = {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None}


@pytest.mark.parametrize(
    ("differs", "terminal", "outside"),
    [
        (BATCH, False, False),
        (BATCH, True, False),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, True, False),
        ({}, True, False),
        ({"SLURM_JOB_NAME": "bash"}, False, True),
    ],
    ids=["batch script", "salloc", "salloc on the node", "srun --pty", "srun from such a shell"],
)
def test_typed_within_an_allocation__is_no_rank_of_slurm(
    monkeypatch: pytest.MonkeyPatch, differs: dict[str, str | None], terminal: bool, outside: bool
) -> None:
    for name, value in (_srun(0, 2) | differs).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(launched, "has_terminal", lambda: terminal)
    assert Launch.found().outside is outside


def test_srun_without_tasks_per_node__one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _srun(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="srun started 2 tasks without --ntasks-per-node"):
        Launch.found()
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit) as ended:
        Launch.found()
    assert ended.value.code == 0


@pytest.mark.parametrize("fork", [lambda: pty.fork()[0], os.fork], ids=["terminal", "none"])
def test_has_terminal(fork: Callable[[], int]) -> None:
    is_none = fork is os.fork
    child = fork()
    if child == 0:
        if is_none:
            os.setsid()
        os._exit(has_terminal())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if is_none else 1)


def test_started_alone__several_nodes_are_refused() -> None:
    launch = Launch.found()
    assert (launch.outside, launch.is_first) == (False, True)
    launch.refuse_other_world(TrainerConfig(devices=2))
    with pytest.raises(UserError, match="started alone"):
        launch.refuse_other_world(TrainerConfig(nodes=2))


def test_word_of_the_first_rank__inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNDUSFM_START", "of an earlier run")
    assert Launch.found().from_first_rank("runs/a", "step-1") == "step-1"
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch = Launch.found()
    assert launch.started_by_first_rank
    assert launch.process_of_first_rank == os.getpid() != os.getppid()
    assert launch.from_first_rank("runs/a", "") == "step-1"
    with pytest.raises(UserError, match="started for runs/a"):
        launch.from_first_rank("runs/b", "")
    launch.forget()
    with pytest.raises(UserError, match="started for no run"):
        launch.from_first_rank("runs/a", "")


def test_forget__what_lightning_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run in this process would take itself for a rank of this one."""
    monkeypatch.setenv("MASTER_PORT", "4711")
    launch = Launch.found()
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    launch.forget()
    assert os.environ["MASTER_PORT"] == "4711"
    assert not {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(os.environ)


def _word(rank: int, port: int) -> list[str]:
    """What is heard, and what after torchrun has started the ranks again and kept its store."""
    heard = []
    for attempt in ("0", "1"):
        os.environ.update(_torchrun(rank, 2, port) | {"TORCHELASTIC_RESTART_COUNT": attempt})
        launch = Launch.found()
        heard.append(launch.from_first_rank("runs/a", f"asked {rank} at {attempt}"))
        store = launch._store  # torchrun's own lives on
    assert store is not None
    dist.barrier()  # the store lives in the first rank, which is not to leave before the other has heard it
    return heard


def test_word_of_the_first_rank__over_the_launchers_store() -> None:
    assert run_ranks(2, _word, free_port()) == [["asked 0 at 0", "asked 0 at 1"]] * 2


def _break(broken: bool) -> None:
    if broken:
        raise UserError("broken", where="here", fix="mend")


def _speak(rank: int, port: int, failing: list[int]) -> str:
    os.environ.update(_torchrun(rank, 2, port))
    try:
        with Launch.found().one_voice():
            _break(rank in failing)
    except UserError as heard:
        return str(heard)
    except ToldByAnotherRank as ended:
        return f"silent {ended.code}"
    return "goes on"


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ([], ["goes on", "goes on"]),
        ([0, 1], ["broken\n  where: here\n  to do: mend", "silent 0"]),
        ([1], [f"rank 1 ({platform.node()}): broken\n  where: here\n  to do: mend", "silent 0"]),
    ],
)
def test_error_before_any_process_group__told_by_the_first_rank(failing: list[int], said: list[str]) -> None:
    assert run_ranks(2, _speak, free_port(), failing) == said


def test_one_voice__alone() -> None:
    with pytest.raises(UserError, match="broken"), Launch.found().one_voice():
        raise UserError("broken")
