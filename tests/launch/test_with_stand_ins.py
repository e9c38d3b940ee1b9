"""What the scripts of launch/ do when SLURM, torchrun or the program answer oddly: all are stand-ins."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.training.launch import PROJECT

# Each notes its arguments; what it does beyond that is set by a test.
_STAND_IN = '#!/bin/bash\necho "$@" >>"$NOTES/{name}"\neval "${{DO_{upper}:-}}"\n'
_NAMES = ("fundusfm", "srun", "scontrol", "squeue", "sbatch", "torchrun", "sleep")


class Scripts:
    """A folder of jobs in which scripts are started with stand-ins for the commands they call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name in _NAMES:
            (self._bin / name).write_text(_STAND_IN.format(name=name, upper=name.upper()))
            (self._bin / name).chmod(0o755)
        self.does = {
            "FUNDUSFM": "echo run",
            "SCONTROL": "[[ $1 != show ]] || echo localhost",
            "SRUN": "env >tasks",
            "SBATCH": "echo 7",
        }

    def start(self, script: str, *arguments: str, **settings: str) -> tuple[int, str]:
        """Exit code and output."""
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "FUNDUSFM_", "MASTER_"))},
            **{f"DO_{name}": what for name, what in self.does.items()},
            "NOTES": str(self.folder),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            **settings,
        }
        command = ["bash", PROJECT / "launch" / script, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a stand-in."""
        notes = self.folder / name
        return notes.read_text().splitlines() if notes.exists() else []

    def variables(self) -> dict[str, str]:
        """What the tasks of srun had in their environment."""
        lines = (self.folder / "tasks").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


_LATER = "date -d '+1 hour' +%FT%T"


@pytest.mark.parametrize(
    "answer", ["exit 1", "", "echo", "echo N/A", "echo tomorrow", "echo 2001-01-01T00:00:00"]
)
def test_pretrain__an_end_that_is_not_known_is_no_end(scripts: Scripts, answer: str) -> None:
    scripts.does["SQUEUE"] = answer
    scripts.start("pretrain.sbatch", "r.yaml")
    assert "SLURM_JOB_END_TIME" not in scripts.variables()


def test_pretrain__the_end_that_squeue_knows(scripts: Scripts) -> None:
    scripts.does["SQUEUE"] = _LATER
    scripts.start("pretrain.sbatch", "r.yaml")
    assert 3500 < int(scripts.variables()["SLURM_JOB_END_TIME"]) - time.time() < 3700


@pytest.mark.parametrize("end", ["0", "1000000000"])
def test_pretrain__an_end_that_has_passed_is_no_end(scripts: Scripts, end: str) -> None:
    scripts.start("pretrain.sbatch", "r.yaml", SLURM_JOB_END_TIME=end)
    assert "SLURM_JOB_END_TIME" not in scripts.variables()


def test_pretrain__tasks_get_the_environment_whatever_sbatch_was_told(scripts: Scripts) -> None:
    scripts.start("pretrain.sbatch", "r.yaml", SLURM_EXPORT_ENV="NONE")
    assert "--export=ALL" in scripts.calls("srun")[0].split()


@pytest.mark.parametrize("code", [127, 137, 1])
def test_pretrain__a_program_that_does_not_start_is_tried_again(scripts: Scripts, code: int) -> None:
    scripts.does["FUNDUSFM"] = f"exit {code}"
    for leg, is_last in enumerate((False, False, True)):
        ended, said = scripts.start("pretrain.sbatch", "r.yaml", SLURM_RESTART_COUNT=str(leg))
        assert ended == code
        assert f"the program could not be started: 'fundusfm recipe folder' ended with code {code}" in said
        assert "refused" not in said
        assert ("not requeued: 3 legs in a row" in said) is is_last
    assert scripts.calls("scontrol").count("requeue 7") == 2
    assert not scripts.calls("srun")


def test_pretrain__a_refusal_is_final(scripts: Scripts) -> None:
    scripts.does["FUNDUSFM"] = "exit 2"
    ended, said = scripts.start("pretrain.sbatch", "r.yaml")
    assert (ended, "the recipe is refused" in said, scripts.calls("scontrol")) == (2, True, [])


@pytest.mark.parametrize(("srun", "requeued"), [("exit 2", False), ("exit 137", True)])
@pytest.mark.parametrize("noted", [False, True])
def test_pretrain__a_refusal_that_srun_hides(
    scripts: Scripts, srun: str, requeued: bool, noted: bool
) -> None:
    scripts.does["SRUN"] = f': >"$FUNDUSFM_REFUSED_FILE"; {srun}' if noted else srun
    ended, said = scripts.start("pretrain.sbatch", "r.yaml")
    assert ("requeue 7" in scripts.calls("scontrol")) is (requeued and not noted), said
    assert ended == (137 if requeued and not noted else 2)
    before = scripts.calls("scontrol").count("requeue 7")
    scripts.does["SRUN"] = "exit 137"
    scripts.start("pretrain.sbatch", "r.yaml")
    after = scripts.calls("scontrol").count("requeue 7")
    assert after == before + 1, "the note of an earlier leg was taken for this one's"


def test_pretrain__the_last_element_of_an_array_requeues_itself_only(scripts: Scripts) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    scripts.start("pretrain.sbatch", "r.yaml", **array)
    assert "requeue 7_3" in scripts.calls("scontrol")
    assert scripts.calls("squeue") == ["-h -j 7_3 -o %e"]


@pytest.mark.parametrize("fork", [("--fork", "old run"), ("--fork=old run",)])
@pytest.mark.parametrize(("script", "starter"), [("pretrain.sbatch", "srun"), ("torchrun.sh", "torchrun")])
def test_fork__for_the_run_and_not_for_its_folder(
    scripts: Scripts, fork: tuple[str, ...], script: str, starter: str
) -> None:
    scripts.start(script, "r.yaml", *fork, "name=new", RANKS="2")
    world = "trainer.devices=2 trainer.nodes=1"
    assert scripts.calls("fundusfm")[0] == f"recipe folder r.yaml name=new {world}"
    wanted = f"pretrain r.yaml name=new {world} --resume-if-any {' '.join(fork)}"
    assert scripts.calls(starter)[0].endswith(wanted)


@pytest.mark.parametrize("script", ["pretrain.sbatch", "torchrun.sh"])
def test_fork__of_nothing(scripts: Scripts, script: str) -> None:
    ended, said = scripts.start(script, "r.yaml", "--fork")
    assert (ended, "usage:" in said, scripts.calls("fundusfm")) == (2, True, [])


@pytest.mark.parametrize(
    ("settings", "endpoint"),
    [
        ({}, "localhost:0"),
        ({"MASTER_PORT": "4711"}, "localhost:4711"),
        ({"NODES": "2", "MASTER_ADDR": "one"}, "one:29500"),
    ],
)
def test_torchrun__where_ranks_meet(scripts: Scripts, settings: dict[str, str], endpoint: str) -> None:
    scripts.start("torchrun.sh", "r.yaml", **settings)
    assert f"--rdzv-endpoint={endpoint}" in scripts.calls("torchrun")[0].split()


@pytest.mark.parametrize("code", [0, 1])
def test_torchrun__a_refusal_that_torchrun_hides(scripts: Scripts, code: int) -> None:
    scripts.does["TORCHRUN"] = f"exit {code}"
    assert scripts.start("torchrun.sh", "r.yaml", TMPDIR=str(scripts.folder))[0] == code
    scripts.does["TORCHRUN"] = f': >"$FUNDUSFM_REFUSED_FILE"; exit {code}'
    assert scripts.start("torchrun.sh", "r.yaml", TMPDIR=str(scripts.folder))[0] == 2
    assert not list(scripts.folder.glob("fundusfm.*")), "the notes were left behind"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pretrain.sbatch", ("r.yaml",)),
        ("torchrun.sh", ("r.yaml",)),
        ("evaluate.sbatch", ("run", "shards")),
        ("shards.sbatch", ("--publish", "table", "out")),
        ("sweep.sbatch", ("--gather", "launch", "7", "r.yaml")),
    ],
)
def test_site__may_use_what_is_not_set(scripts: Scripts, script: str, arguments: tuple[str, ...]) -> None:
    (scripts.folder / "run").mkdir()
    (scripts.folder / "run" / "DONE").touch()
    site = scripts.folder / "site.sh"
    site.write_text("PATH=$PATH:$NOBODY_SET_THIS\nfalse\n")
    _, said = scripts.start(script, *arguments, FUNDUSFM_SITE=str(site))
    assert "unbound" not in said
    assert scripts.calls("fundusfm"), said


def _recipes(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).write_text("{}")
    return list(names)


def test_sweep__a_recipe_whose_path_has_an_equals_sign(scripts: Scripts) -> None:
    recipes = _recipes(scripts.folder, "lr=1.yaml", "lr=2.yaml")
    scripts.does["FUNDUSFM"] = 'echo "runs/$3"'
    ended, said = scripts.start("sweep.sbatch", *recipes, "data.workers=1")
    assert (ended, "2 runs" in said) == (0, True), said
    assert "--array=0-1" in scripts.calls("sbatch")[0]
    assert [call.split()[-1] for call in scripts.calls("fundusfm")] == ["data.workers=1"] * 2


def test_sweep__two_recipes_with_one_run_folder(scripts: Scripts) -> None:
    recipes = _recipes(scripts.folder, "a.yaml", "b.yaml", "c.yaml")
    scripts.does["FUNDUSFM"] = (
        "case $3 in a.yaml) echo runs/x;; b.yaml) echo runs/y;; *) echo ./runs/x;; esac"
    )
    ended, said = scripts.start("sweep.sbatch", *recipes)
    assert ended == 2
    assert f"a.yaml and c.yaml have one run folder, {scripts.folder.resolve()}/runs/x" in said
    assert not scripts.calls("sbatch")


def test_sweep__submitted_where_the_program_does_not_start(scripts: Scripts) -> None:
    """A host to log in to has no container, and perhaps no libraries of the nodes."""
    recipes = _recipes(scripts.folder, "a.yaml", "b.yaml")
    scripts.does["FUNDUSFM"] = "exit 127"
    ended, said = scripts.start("sweep.sbatch", *recipes)
    assert (ended, "run folders are not compared" in said, "2 runs" in said) == (0, True, True), said
    scripts.does["FUNDUSFM"] = "exit 2"
    assert scripts.start("sweep.sbatch", *recipes)[0] == 2


def test_sweep__a_recipe_that_is_refused_does_not_hide_the_others(scripts: Scripts) -> None:
    (scripts.folder / "run").mkdir()
    (scripts.folder / "run" / "DONE").touch()
    scripts.does["FUNDUSFM"] = "[[ $3 != b.yaml ]] || exit 2; echo run"
    ended, said = scripts.start("sweep.sbatch", "--gather", "launch", "7", "b.yaml", "a.yaml")
    assert (ended, "b.yaml is refused and is left out" in said) == (1, True)
    assert scripts.calls("fundusfm")[-1] == "compare run --out comparisons/sweep-7"
