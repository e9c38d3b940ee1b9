"""The real command line, in this process or in one of its own, on input as hospitals have it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fundusfm.cli import app
from tests.conftest import Cohort
from tests.training.launch import write_recipe


@dataclass(frozen=True)
class Answer:
    """Exit code, and everything that was printed."""

    code: int
    text: str


def ask(*arguments: str | Path) -> Answer:
    """Run the command line in this process. A bug, which would be a traceback, is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.output)


def refused(*arguments: str | Path) -> str:
    """The message of a command that must end as a user's mistake: what, where and what to do."""
    answer = ask(*arguments)
    assert answer.code == 2, answer.text
    errors = [line for line in answer.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in answer.text, answer.text
    assert "\n  where: " in answer.text, answer.text
    return answer.text


@pytest.fixture
def recipe(synth_cohort: Cohort, tmp_path: Path) -> Path:
    """A recipe of a run of 12 steps, saved every 5, that lands in `tmp_path/run`."""
    return write_recipe(tmp_path / "recipe.yaml", synth_cohort, max_steps=12)


@pytest.fixture
def shards(synth_cohort: Cohort, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(synth_cohort.shards, tmp_path / "眼底 shards"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("size=300k")` mounts a tmpfs or changes the one there is, and returns its folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        options = f"remount,{options}" if os.path.ismount(place) else options
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)
