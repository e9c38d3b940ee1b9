"""How this process was started: alone, by torchrun, by srun, or as a rank that Lightning starts itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.rendezvous import rendezvous

from fundusfm.errors import UserError
from fundusfm.recipe.schema import TrainerConfig

_HANDED_DOWN = "FUNDUSFM_START"  # from the first rank to those that it starts
_KEY = "fundusfm/start"


@dataclass
class Launch:
    """The launcher as Lightning sees it. `outside`: it started all ranks at once, before any of our code."""

    environment: ClusterEnvironment
    outside: bool
    _store: Any = None

    @classmethod
    def found(cls) -> Launch:
        """What the environment variables say.

        Only processes that srun started are ranks of SLURM: a batch script has the same variables, and there
        Lightning may start the ranks of one node.
        """
        if TorchElasticEnvironment.detect():
            return cls(TorchElasticEnvironment(), outside=True)
        if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
            # Its own requeueing saves inside a signal handler, and loader workers inherit that.
            return cls(SLURMEnvironment(auto_requeue=False), outside=True)
        return cls(LightningEnvironment(), outside=False)

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

    def from_first_rank(self, about: str, decide: Callable[[], str]) -> str:
        """What the first rank decides, on every rank. Only the first calls `decide`; its error ends it alone.

        Comes before any process group: the launcher's store carries the word, or, where Lightning starts the
        other ranks later on, the environment they inherit. `about`: the run that it is for; a rank that was
        started for another run refuses.
        """
        if not self.outside:
            return self._inherited(about, decide)
        rank, size = self.environment.global_rank(), self.environment.world_size()
        if size == 1:
            return decide()
        address = f"tcp://{self.environment.main_address}:{self.environment.main_port}"
        # Kept: the process group meets at the same store.
        self._store, _, _ = next(iter(rendezvous(address, rank, size)))
        # torchrun keeps its store when it starts the ranks again, and with it what they heard the last time.
        key = f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if rank == 0:
            self._store.set(key, decide())
        return bytes(self._store.get(key)).decode()

    def _inherited(self, about: str, decide: Callable[[], str]) -> str:
        if self.is_first:
            word = decide()
            os.environ[_HANDED_DOWN] = json.dumps([about, word])
            return word
        of_run, word = json.loads(os.environ.get(_HANDED_DOWN, '["", ""]'))
        if of_run != about:
            raise UserError(
                f"this rank was started for {of_run or 'no run'}",
                where=about,
                fix="start every run of several ranks in a process of its own, and let it start the ranks",
            )
        return str(word)

    @staticmethod
    def forget() -> None:
        """Nothing that was handed down reaches processes that are started later."""
        os.environ.pop(_HANDED_DOWN, None)
