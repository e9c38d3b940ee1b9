"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fundusfm.errors import UserError
from fundusfm.training import starting
from fundusfm.training.pieces import TornCheckpointError, UnreadableCheckpointError
from fundusfm.training.runfolder import RunFolder

DAMAGED = TornCheckpointError("damaged", where="step-2")
SILENT = UnreadableCheckpointError("cannot be read: Input/output error", where="step-1")


@pytest.mark.parametrize(
    ("torn", "said", "ends"),
    [([DAMAGED], "none of the checkpoints", 2), ([DAMAGED, SILENT], "Input/output error", 1)],
)
def test_no_checkpoint_that_can_be_used__final_only_if_none_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: list[UserError], said: str, ends: int
) -> None:
    run: Any = SimpleNamespace(folder=RunFolder(tmp_path), recipe=None)
    monkeypatch.setattr(starting, "refuse_other_recipe", lambda folder, recipe: None)
    monkeypatch.setattr(starting, "newest_whole", lambda folder: (None, torn))
    with pytest.raises(UserError, match=said) as refused:
        starting.begin(run, Console(quiet=True), resume=True, fork=None)
    assert refused.value.exit_code == ends
