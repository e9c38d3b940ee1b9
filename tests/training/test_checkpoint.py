"""A checkpoint is whole or not there: torn ones are named and passed over, a full disk loses nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from fundusfm.errors import UserError
from fundusfm.training import checkpoint
from fundusfm.training.checkpoint import (
    LATEST,
    MANIFEST,
    OPTIMISER,
    WEIGHTS,
    Manifest,
    find_checkpoint,
    load_trainer_state,
    load_weights,
    newest_whole,
    pieces_of,
    step_folder,
    verify,
)
from fundusfm.training.pieces import Piece, TornCheckpointError
from fundusfm.training.saving import Saver, Snapshot

TIMEOUT = timedelta(minutes=5)
FILES = ("weights-00000.safetensors", "optimiser-00000.safetensors", "trainer.pt", "recipe.yaml")


def _snapshot(step: int) -> Snapshot:
    weights = {"tower.weight": torch.full((2, 3), float(step)), "log_scale": torch.ones(1)}
    state = {"exp_avg/tower.weight": torch.full((2, 3), float(step)), "step/tower.weight": torch.tensor(3.0)}
    return Snapshot(
        weights=[Piece.whole(name, tensor) for name, tensor in weights.items()],
        optimiser=[Piece.whole(name, tensor) for name, tensor in state.items()],
        aliases={"head.weight": "tower.weight"},
        state={"global_step": step, "lr_schedulers": [{"last_epoch": step}]},
        manifest=Manifest(
            step=step, exams_seen=8 * step, world_size=1, strategy="ddp", made_with={}, shards={}
        ),
    )


def _save(folder: Path, step: int, keep: int = 3) -> Path:
    final = folder / step_folder(step)
    saver = Saver(
        lambda f: (f / "recipe.yaml").write_text("name: x") and None, keep, TIMEOUT, in_background=False
    )
    error = saver.open(final)
    if error is None:
        saver.write(final, _snapshot(step))
        error = saver.wait()
    if error:
        raise error
    return final


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    final = _save(tmp_path, 5)
    manifest = verify(final)
    assert (manifest.step, manifest.exams_seen) == (5, 40)
    assert set(manifest.files) == {*FILES}
    tower_23 = torch.full((2, 3), 5.0)
    wanted = {"tower.weight": tower_23, "head.weight": tower_23, "log_scale": torch.ones(1)}
    torch.testing.assert_close(load_weights(final), wanted, rtol=0, atol=0)
    assert pieces_of(final, OPTIMISER).whole("step/tower.weight").equal(torch.tensor(3.0))
    assert load_trainer_state(final)["lr_schedulers"] == [{"last_epoch": 5}]
    assert (tmp_path / LATEST).resolve() == final


def test_stray_file__not_read(tmp_path: Path) -> None:
    final = _save(tmp_path, 5)
    (final / "weights-00001.safetensors").write_bytes(b"of another run")
    assert verify(final)
    assert set(load_weights(final)) == {"tower.weight", "head.weight", "log_scale"}


def test_retention__keeps_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == {step_folder(4), step_folder(5), LATEST}


def test_retention__never_takes_the_one_just_written(tmp_path: Path) -> None:
    """A run that has passed over a torn checkpoint goes on from before it."""
    for step in (1, 5):
        _save(tmp_path, step, keep=2)
    (tmp_path / step_folder(5) / MANIFEST).unlink()
    for step in (2, 3):
        final = _save(tmp_path, step, keep=1)
        assert newest_whole(tmp_path)[0] == final
    assert _names(tmp_path) == {step_folder(3), step_folder(5), LATEST}


def _missing(path: Path, content: bytes) -> None:
    path.unlink()


def _cut_at(share: float) -> Callable[[Path, bytes], None]:
    return lambda path, content: path.write_bytes(content[: int(len(content) * share)]) and None


def _flipped_at(share: float) -> Callable[[Path, bytes], None]:
    def flip(path: Path, content: bytes) -> None:
        changed = bytearray(content)
        changed[int(len(content) * share)] ^= 0x01
        path.write_bytes(changed)

    return flip


DAMAGES = {
    "missing": _missing,
    **{f"cut at {share}": _cut_at(share) for share in (0, 0.1, 0.5, 0.99)},
    **{f"flipped at {share}": _flipped_at(share) for share in (0, 0.01, 0.2, 0.4, 0.6, 0.8, 0.99)},
}


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_torn__named_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    path = bad / name
    DAMAGES[damage](path, path.read_bytes())
    newest, torn = newest_whole(tmp_path)
    assert newest == good
    assert len(torn) == 1
    assert str(bad) in str(torn[0])
    with pytest.raises(TornCheckpointError):
        verify(bad)


def test_manifest__no_digit_may_change(tmp_path: Path) -> None:
    """A wrong number of exams seen would go on with other exams, and say nothing."""
    path = _save(tmp_path, 1) / MANIFEST
    path.write_text(path.read_text().replace('"exams_seen": 8,', '"exams_seen": 9,'))
    with pytest.raises(TornCheckpointError, match="damaged"):
        verify(path.parent)


def test_values_in_no_file__refused(tmp_path: Path) -> None:
    snapshot = _snapshot(1)
    snapshot.weights.append(Piece("halved", (4, 2), 4, torch.ones(4), shared=False))
    final = tmp_path / step_folder(1)
    saver = Saver(lambda f: None, 1, TIMEOUT, in_background=False)
    assert saver.open(final) is None
    saver.write(final, snapshot)
    assert saver.wait() is None
    with pytest.raises(TornCheckpointError, match="values of halved from place 0"):
        pieces_of(final, WEIGHTS)


def test_full_disk__one_error_and_earlier_ones_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = _save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        _save(tmp_path, 2)
    assert _names(tmp_path) == {step_folder(1), LATEST}
    assert newest_whole(tmp_path) == (good, [])


def test_bug_while_writing__no_excuse_of_a_full_disk(tmp_path: Path) -> None:
    saver = Saver(lambda folder: {}["gone"], 1, TIMEOUT, in_background=True)  # type: ignore[arg-type, return-value]
    assert saver.open(tmp_path / step_folder(1)) is None
    saver.write(tmp_path / step_folder(1), _snapshot(1))
    with pytest.raises(KeyError, match="gone"):
        saver.wait()
    assert not _names(tmp_path)


def test_killed_while_writing__leaves_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def die(*args: object, **kwargs: object) -> None:
        raise Killed

    for name in ("digest", "_flush"):
        final = tmp_path / step_folder(2)
        partial = checkpoint.open_partial(final)
        (partial / "recipe.yaml").write_text("name: x")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, die)
            with pytest.raises(Killed):
                checkpoint.complete(partial, final, _snapshot(2).manifest, {}, 3)
        assert newest_whole(tmp_path) == (good, [])
    assert newest_whole(tmp_path)[0] == find_checkpoint(tmp_path / LATEST)
    again = _save(tmp_path, 2)
    assert newest_whole(tmp_path) == (again, [])


def test_find__run_folder_step_or_latest(tmp_path: Path) -> None:
    final = _save(tmp_path / "checkpoints", 3)
    for path in (tmp_path, tmp_path / "checkpoints" / LATEST, final):
        assert find_checkpoint(path) == final
    with pytest.raises(UserError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_pruning_that_fails__costs_no_run_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that a reader has open on network storage leaves its folder not empty."""

    def held(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    _save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", held)
        final = _save(tmp_path, 2, keep=1)
    assert "cannot be removed yet" in caplog.text and "Directory not empty" in caplog.text
    assert newest_whole(tmp_path) == (final, [])
    assert ".step-00000001.pruned" in _names(tmp_path)
    _save(tmp_path, 3, keep=1)
    assert _names(tmp_path) == {step_folder(3), LATEST}


@pytest.mark.parametrize(("code", "ends"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_file_that_cannot_be_read__named_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, ends: int
) -> None:
    before, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    digest = checkpoint.digest

    def unreadable(path: Path) -> str:
        if path == newest / "trainer.pt":
            raise OSError(code, os.strerror(code))
        return digest(path)

    monkeypatch.setattr(checkpoint, "digest", unreadable)
    found, torn = newest_whole(tmp_path)
    assert found == before
    assert f"cannot be read: {os.strerror(code)}" in torn[0].what
    assert torn[0].where == str(newest / "trainer.pt")
    assert torn[0].exit_code == ends, "launchers start a run again whose storage may come back"
