"""What many tests need: a small synthetic cohort with a tokenizer, and no thread pool to fight for cores."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fundusfm.shards.index import ShardIndex
from fundusfm.shards.synth import synthesise
from fundusfm.stream.vocabulary import train_tokenizer

# Runs in this process would take themselves for ranks of whatever the tests were started from.
_OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "FUNDUSFM_")
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
for _name in [name for name in os.environ if name.startswith(_OF_LAUNCHERS) or name in _RANKS]:
    del os.environ[_name]


@dataclass(frozen=True)
class Cohort:
    """Shards of 60 patients in tars of 7 exams, and a tokenizer of their reports. Read only, shared."""

    shards: Path
    tokenizer: Path

    @property
    def index(self) -> ShardIndex:
        return ShardIndex.load(self.shards)


def make_cohort(folder: Path) -> Cohort:
    """Write one into a folder."""
    synthesise(folder / "synth", patients=60, seed=3, size=48, workers=2, exams_per_shard=7)
    train_tokenizer([str(folder / "synth")], folder / "tokens.json", vocab_size=400)
    return Cohort(folder / "synth", folder / "tokens.json")


@pytest.fixture(scope="session")
def synth_cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would every process that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
