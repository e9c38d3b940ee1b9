"""Exit code 2 for the script that started a launcher of several ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fundusfm.endings import REFUSED_FILE, plain_endings
from fundusfm.errors import EveryRankError, ToldByAnotherRank, UserError
from fundusfm.training.conduct import LostRankError


@pytest.mark.parametrize(
    ("error", "code", "is_noted"),
    [
        *[(UserError("x"), 2, True), (EveryRankError("x"), 0, True), (LostRankError("x"), 1, False)],
        *[(ToldByAnotherRank(UserError("x")), 0, True), (ToldByAnotherRank(LostRankError("x")), 0, False)],
    ],
)
def test_refusal__noted_where_it_is_asked_for(
    error: BaseException, code: int, is_noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "refused"
    monkeypatch.setenv(REFUSED_FILE, str(note))
    with pytest.raises(SystemExit) as ended, plain_endings():
        raise error
    assert (ended.value.code, note.exists()) == (code, is_noted)


@pytest.mark.parametrize("note", ["", "no/such/folder/refused"])
def test_refusal__without_a_note_it_is_the_code(note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSED_FILE, note)
    with pytest.raises(SystemExit) as ended, plain_endings():
        raise EveryRankError("x")
    assert ended.value.code == 2


def test_refusal__a_rank_that_is_started_after_it_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REFUSED_FILE, str(tmp_path))
    command = [sys.executable, "-m", "fundusfm", "pretrain", "no/such/recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
