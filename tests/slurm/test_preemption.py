"""What clusters do to a run on two nodes: it goes on, and ends with the losses of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import newest_whole
from tests.conftest import Cohort
from tests.slurm.conftest import TINY, Slurm
from tests.training.launch import losses, write_recipe


def the_same_curve(run: Path, undisturbed: Path) -> None:
    """Every step once, with the losses and the rate of the run that nothing happened to, bit for bit."""
    assert losses(run / "metrics.jsonl") == losses(undisturbed)


class Job:
    """A run of the tiny recipe that has taken `step` steps."""

    def __init__(self, slurm: Slurm, cohort: Cohort, step: int, *overrides: str) -> None:
        self._slurm, self.run = slurm, slurm.folder / "run"
        recipe = write_recipe(slurm.folder / "recipe.yaml", cohort)
        self.number = slurm.submit("pretrain.sbatch", str(recipe), *TINY, *overrides)
        slurm.wait_for_step(self.number, self.run, step)

    def starts(self) -> list[str | None]:
        """The checkpoint that each start went on from."""
        return [json.loads(line)["from"] for line in (self.run / "starts.jsonl").read_text().splitlines()]

    def ends_like(self, undisturbed: Path, *, saved_on_the_way: bool) -> None:
        """Requeued once, done, the same losses; saved where it was stopped, or every fifth step only."""
        self._slurm.wait(self.number)
        said = self._slurm.said(self.number)
        assert "run is done" in said, said
        assert self._slurm.about(self.number)["Restarts"] == "1", said
        first, second = self.starts()
        assert first is None
        assert second is not None
        assert bool(int(second.rpartition("-")[2]) % 5) is saved_on_the_way, said
        the_same_curve(self.run, undisturbed)


def test_signal_before_the_limit__saved_requeued_resumed(
    slurm: Slurm, synth_cohort: Cohort, undisturbed: Path
) -> None:
    """The signal of --signal=B:USR1@N, sent now."""
    job = Job(slurm, synth_cohort, 7, "checkpoint.every_steps=1000")
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    slurm.wait(job.number)
    said = slurm.said(job.number)
    assert "requeued" in said
    assert "stopping takes" in said
    _, second = job.starts()
    assert second is not None
    assert f"{second}, as it was left; start 2 of this run" in said
    the_same_curve(job.run, undisturbed)


def test_term_to_the_tasks__as_preemption_sends_it(
    slurm: Slurm, synth_cohort: Cohort, undisturbed: Path
) -> None:
    job = Job(slurm, synth_cohort, 6)
    slurm.call("scancel", "--signal=TERM", job.number)
    job.ends_like(undisturbed, saved_on_the_way=True)


def test_scancel__saves_and_stays_away(slurm: Slurm, synth_cohort: Cohort) -> None:
    job = Job(slurm, synth_cohort, 6)
    slurm.call("scancel", job.number)
    slurm.wait(job.number, "CANCELLED")
    slurm.idle()
    assert slurm.about(job.number)["Restarts"] == "0"
    newest, torn = newest_whole(job.run / "checkpoints")
    assert newest is not None and not torn
    assert int(newest.name.rpartition("-")[2]) >= 6, slurm.said(job.number)
    assert "cancelled" in slurm.said(job.number)


def test_scontrol_requeue(slurm: Slurm, synth_cohort: Cohort, undisturbed: Path) -> None:
    job = Job(slurm, synth_cohort, 6)
    slurm.call("scontrol", "requeue", job.number)
    slurm.until(lambda: slurm.about(job.number)["Restarts"] == "1", "the second leg")
    slurm.wait(job.number)
    the_same_curve(job.run, undisturbed)


def _task(job: str, rank: int) -> int:
    """The process of a rank."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().split(b"\0"))
            command = (process / "cmdline").read_bytes()
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            of_step = b"slurmstepd" in Path(f"/proc/{parent}/comm").read_bytes()
        except OSError:
            continue
        if wanted <= environment and b"pretrain" in command and b"SLURM_STEP_ID=0" in environment and of_step:
            return int(process.name)
    raise AssertionError(f"job {job} has no rank {rank}")


def test_killed_task__the_others_end_and_all_begin_again(
    slurm: Slurm, synth_cohort: Cohort, undisturbed: Path
) -> None:
    job = Job(slurm, synth_cohort, 8)
    os.kill(_task(job.number, 3), signal.SIGKILL)
    job.ends_like(undisturbed, saved_on_the_way=False)


def test_node_down__requeued_by_slurm(slurm: Slurm, synth_cohort: Cohort, undisturbed: Path) -> None:
    job = Job(slurm, synth_cohort, 8)
    slurm.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    # Its daemon answers, so the node comes back by itself; a dead one would leave the job waiting.
    slurm.until(lambda: slurm.about(job.number)["Restarts"] == "1", "the second leg")
    slurm.wait(job.number)
    the_same_curve(job.run, undisturbed)


@pytest.mark.parametrize("objective", ["CrashOnOneRank"])
def test_crash_without_progress__not_for_ever(slurm: Slurm, synth_cohort: Cohort, objective: str) -> None:
    recipe = write_recipe(slurm.folder / "recipe.yaml", synth_cohort)
    own = f"objective.name=tests.training.own:{objective}"
    job = slurm.submit("pretrain.sbatch", str(recipe), *TINY, own, FUNDUSFM_MAX_FAILURES="2")
    slurm.wait(job, "FAILED")
    said = slurm.said(job)
    assert slurm.about(job)["Restarts"] == "1", said
    assert "not requeued: 2 legs in a row ended without a new checkpoint" in said
    first_leg = [path.read_text() for path in sorted(slurm.folder.glob(f"logs/*-{job}/leg-0.rank-*.log"))]
    assert sum("Traceback" in log for log in first_leg) == 1, said
    assert "broken on purpose" in first_leg[-1]


def test_refused_recipe__ends_at_once(slurm: Slurm, synth_cohort: Cohort) -> None:
    recipe = write_recipe(slurm.folder / "recipe.yaml", synth_cohort)
    job = slurm.submit("pretrain.sbatch", str(recipe), *TINY, "optim.lrr=1")
    slurm.wait(job, "FAILED")
    assert "did you mean lr?" in slurm.said(job)
    assert slurm.about(job)["Restarts"] == "0"


def test_refusal_of_one_rank__final_whatever_srun_says(slurm: Slurm, synth_cohort: Cohort) -> None:
    """Only ranks can see it, in the middle of the run; srun kills those that wait for the one that ends."""
    recipe = write_recipe(slurm.folder / "recipe.yaml", synth_cohort)
    own = ("objective.name=tests.training.own:NanOnOneRank", "checkpoint.every_steps=1")
    job = slurm.submit("pretrain.sbatch", str(recipe), *TINY, *own)
    slurm.wait(job, "FAILED")
    said = slurm.said(job)
    assert slurm.about(job)["Restarts"] == "0", said
    assert "not requeued: see what rank 0 says" in said
    logs = [path.read_text() for path in sorted(slurm.folder.glob(f"logs/*-{job}/leg-0.rank-*.log"))]
    assert ["the loss is nan" in log for log in logs] == [True, False, False, False]
