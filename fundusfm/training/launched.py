"""How this process was started: alone, by torchrun, by srun, or as a rank that Lightning starts itself."""

from __future__ import annotations

import json
import os
import pickle
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.rendezvous import rendezvous

from fundusfm.errors import ToldByAnotherRank, UserError
from fundusfm.recipe.schema import TrainerConfig

_HANDED_DOWN = "FUNDUSFM_START"  # from the first rank to those that it starts
_KEY = "fundusfm"
# What Lightning sets for the ranks that it starts, and leaves to whatever runs next in this process.
_OF_RUN = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


@dataclass
class Launch:
    """The launcher as Lightning sees it. `outside`: it started all ranks at once, before any of our code."""

    environment: ClusterEnvironment
    outside: bool
    _store: Any = None
    _before: dict[str, str | None] = field(
        default_factory=lambda: {name: os.environ.get(name) for name in _OF_RUN}
    )

    @classmethod
    def found(cls) -> Launch:
        """What the environment variables say; UserError for tasks of SLURM that Lightning cannot number."""
        if TorchElasticEnvironment.detect():
            return cls(TorchElasticEnvironment(), outside=True)
        if not _is_one_of_several_tasks():
            return cls(LightningEnvironment(), outside=False)
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            if os.environ["SLURM_PROCID"] != "0":
                raise SystemExit(0)  # all tasks are here, and one voice is enough
            raise UserError(
                f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks without --ntasks-per-node",
                where="srun",
                fix="give srun --ntasks-per-node=N beside --nodes: one task is one rank",
            )
        # Its own requeueing saves inside a signal handler, and loader workers inherit that.
        return cls(SLURMEnvironment(auto_requeue=False), outside=True)

    @property
    def rank(self) -> int:
        """This process among all of the run."""
        return self.environment.global_rank() if self.outside else self.environment.local_rank()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def started_by_first_rank(self) -> bool:
        """Whether this process is a child of rank 0."""
        return not self.outside and not self.is_first

    @property
    def process_of_first_rank(self) -> int | None:
        """The process that started this one; None where a launcher did.

        As told when this one was started: its parent may be another by now, since the first rank can end
        while this one is still importing.
        """
        return _handed_down()[2] if self.started_by_first_rank else None

    def refuse_other_world(self, trainer: TrainerConfig) -> None:
        """UserError unless the recipe's ranks are those that were started."""
        if not self.outside:
            if trainer.nodes > 1:
                raise UserError(
                    f"trainer.nodes = {trainer.nodes}, but this process was started alone",
                    where="trainer.nodes",
                    fix="start it with launch/pretrain.sbatch, or on every node with launch/torchrun.sh",
                )
            return
        started, wanted = self.environment.world_size(), trainer.devices * trainer.nodes
        per_node = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
        if started != wanted or (per_node or str(trainer.devices)) != str(trainer.devices):
            of_node = f", {per_node} a node" if per_node else ""
            raise UserError(
                f"{started} ranks were started{of_node}, but the recipe is for {trainer.devices} on each of "
                f"{trainer.nodes} nodes",
                where="trainer.devices, trainer.nodes",
                fix="set both to what is started; the scripts in launch/ do",
            )

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Within, each rank does what comes before any process group. If one cannot, the first rank says why.

        UserError on the first rank, a silent end with code 0 on the others, if any rank raises one.
        Collective for ranks that were started at once: those that the first rank starts come later, and meet
        no error that it has not met.
        """
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        found = self._first_of_all_ranks(error) if self._is_one_of_many else error
        if found is not None:
            found.ends_every_rank = self.outside
            if self.outside and not self.is_first:
                raise ToldByAnotherRank(found)
            raise found

    def from_first_rank(self, about: str, word: str) -> str:
        """The first rank's word, on every rank; what the others give does not count.

        Comes before any process group: the launcher's store carries the word, or, where Lightning starts the
        other ranks later on, the environment they inherit. `about`: the run that it is for; a rank that was
        started for another run refuses.
        """
        if not self.outside:
            return self._inherited(about, word)
        if not self._is_one_of_many:
            return word
        if self.is_first:
            self._met().set(self._key("start"), word)
        return bytes(self._met().get(self._key("start"))).decode()

    @property
    def _is_one_of_many(self) -> bool:
        return self.outside and self.environment.world_size() > 1

    def _met(self) -> Any:
        """The store of all ranks. Kept: the process group meets at the same one."""
        if self._store is None:
            address = f"tcp://{self.environment.main_address}:{self.environment.main_port}"
            size = self.environment.world_size()
            self._store, _, _ = next(iter(rendezvous(address, self.environment.global_rank(), size)))
        return self._store

    @staticmethod
    def _key(name: str) -> str:
        """torchrun keeps its store when it starts the ranks again, with what they heard the last time."""
        return f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"

    def _first_of_all_ranks(self, error: UserError | None) -> UserError | None:
        """The error of the lowest rank that has one; of another than the first it names rank and host."""
        if error is not None and not self.is_first:
            error.what = f"rank {self.rank} ({platform.node()}): {error.what}"
        store, size = self._met(), self.environment.world_size()
        store.set(self._key(f"error/{self.rank}"), pickle.dumps(error))
        errors = [pickle.loads(store.get(self._key(f"error/{rank}"))) for rank in range(size)]
        store.set(self._key(f"heard/{self.rank}"), b"")
        if self.is_first:  # its end may be the end of the store
            for rank in range(size):
                store.get(self._key(f"heard/{rank}"))
        return next((one for one in errors if one is not None), None)

    def _inherited(self, about: str, word: str) -> str:
        if self.is_first:
            os.environ[_HANDED_DOWN] = json.dumps([about, word, os.getpid()])
            return word
        of_run, inherited, _ = _handed_down()
        if of_run != about:
            raise UserError(
                f"this rank was started for {of_run or 'no run'}",
                where=about,
                fix="start every run of several ranks in a process of its own, and let it start the ranks",
            )
        return inherited

    def forget(self) -> None:
        """Nothing that was handed down or set for this run reaches what is started later."""
        os.environ.pop(_HANDED_DOWN, None)
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _handed_down() -> tuple[str, str, int | None]:
    """The run that this rank was started for, what the first rank said, and the first rank's process."""
    about, word, process = json.loads(os.environ.get(_HANDED_DOWN, '["", "", null]'))
    return about, word, process


def _is_one_of_several_tasks() -> bool:
    """Whether srun started this process as a rank beside others.

    A batch script and the shell of salloc carry the variables of their job, with all its tasks, and are one
    process; only a step has a number of tasks of its own. The shell of `srun --pty` is in a step, perhaps of
    many, but has a terminal, which the ranks of a step have not.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not has_terminal()


def has_terminal() -> bool:
    """Whether this process was started from a terminal, wherever its input and output go."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True
