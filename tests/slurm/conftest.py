"""A real SLURM for the length of a test session: two nodes on this machine, or a skip that says why not.

`make test-slurm` runs these tests; `make test` leaves them out: they take minutes, and root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Cohort
from tests.training.launch import PROJECT, write_recipe

LIMIT_S = 1200
SCRIPT = Path(__file__).with_name("cluster.sh")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
# Four ranks at most on one machine, and a step that is slow enough to be met in the middle of a run.
TINY = (
    *("objective.name=tests.training.own:Slow", "objective.fidelity=corrected", "model.text.dropout=0"),
    *(
        "trainer.max_steps=30",
        "trainer.val_every_steps=null",
        "data.workers=1",
        "telemetry.tensorboard=false",
    ),
)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only who asks for this folder gets its tests."""
    return None if any("slurm" in argument for argument in config.args) else True


class Slurm:
    """Commands of the cluster, and the folder in which jobs are submitted."""

    def __init__(self, folder: Path, settings: Path) -> None:
        self.folder = folder
        command = os.environ.get("FUNDUSFM_COMMAND") or f"{sys.executable} -m fundusfm"
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "SLURM_CONF": str(settings),
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "FUNDUSFM_COMMAND": command,
            "FUNDUSFM_SITE": "/dev/null",
        }

    def call(self, *command: str, **settings: str) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(
        self, script: str, *arguments: str, options: tuple[str, ...] = TWO_BY_TWO, **settings: str
    ) -> str:
        """The number of a new job."""
        path = str(PROJECT / "launch" / script)
        return self.call("sbatch", "--parsable", "--time=60", *options, path, *arguments, **settings)

    def about(self, job: str) -> dict[str, str]:
        """What `scontrol` knows of a job."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.about(job)["JobState"]

    def said(self, job: str) -> str:
        """The output of the job's script, and the end of what its tasks said."""
        texts = [path.read_text() for path in sorted(self.folder.glob(f"*-{job}.out"))]
        logs = sorted(self.folder.glob(f"logs/*-{job}/*.log"))
        return "\n".join([*texts, *(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)])

    def wait(self, job: str, *states: str) -> None:
        """Until the job is in one of the states, by default COMPLETED; it must not end in another."""
        wanted = states or ("COMPLETED",)
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.state(job) in {*wanted, *final}, f"job {job} to be {wanted}")
        assert self.state(job) in wanted, self.said(job)

    def wait_for_step(self, job: str, run: Path, step: int) -> None:
        """Until a step has been logged."""
        metrics = run / "metrics.jsonl"
        self.until(
            lambda: (
                (metrics.exists() and f'"step": {step},' in metrics.read_text())
                or self.state(job) not in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
            ),
            f"step {step} of job {job}",
        )
        assert self.state(job) == "RUNNING", self.said(job)

    def until(self, true: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < deadline_s, f"waited in vain for {what}"
            time.sleep(0.5)

    def idle(self) -> None:
        """Both nodes free again, as the next test expects them."""
        self.until(lambda: self.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "idle nodes")


@pytest.fixture(scope="session")
def slurm_settings() -> Iterator[Path]:
    # Short: the socket of munge lies in it. Open: root only is no user of the cluster.
    folder = Path(tempfile.mkdtemp(prefix="fundusfm-slurm."))
    started = subprocess.run([SCRIPT, "up", folder], capture_output=True, text=True, timeout=900, check=False)
    try:
        if started.returncode == 3:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield folder / "etc" / "slurm.conf"
    finally:
        subprocess.run([SCRIPT, "down", folder], timeout=120, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm(slurm_settings: Path, tmp_path: Path) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path, slurm_settings)
    yield cluster
    cluster.call("scancel", "--user=root")
    cluster.idle()


@pytest.fixture(scope="session")
def undisturbed(slurm_settings: Path, synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run on two nodes with two tasks each that nothing happened to."""
    cluster = Slurm(tmp_path_factory.mktemp("undisturbed"), slurm_settings)
    recipe = write_recipe(cluster.folder / "recipe.yaml", synth_cohort)
    job = cluster.submit("pretrain.sbatch", str(recipe), *TINY)
    cluster.wait(job)
    assert "run is done" in cluster.said(job), cluster.said(job)
    cluster.idle()
    return cluster.folder / "run" / "metrics.jsonl"
