"""Ctrl-C at any moment, to the whole process group as a terminal sends it."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fundusfm.interrupts import interrupts_kept
from tests.training.launch import start

LIMIT_S = 120


def others_of(session: int) -> list[str]:
    """Processes that still live in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(of) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> str:
    """Its output after Ctrl-C, once it has ended and left no process behind."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=LIMIT_S)
    deadline_s = time.monotonic() + LIMIT_S
    while others_of(process.pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not others_of(process.pid), "a worker outlived the command"
    assert "Traceback" not in output, output
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not path.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)


SWALLOWS = """
import os, signal, time
swallowed = False
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
except KeyboardInterrupt:  # as the initialisation of an extension module does
    swallowed = True
"""


def test_interrupt_within_an_import__waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swallows_interrupts.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_kept():
            importlib.import_module("swallows_interrupts")
            time.sleep(LIMIT_S)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not sys.modules.pop("swallows_interrupts").swallowed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
class TestInterrupt:
    @pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.9])
    def test_synth(self, tmp_path: Path, delay_s: float) -> None:
        out = tmp_path / "s"
        verb = ["shards", "synth", "--out", str(out), "--patients", "50000", "--size", "64", "--workers", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "fundusfm", *verb],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        wait_for(out / ".build" / "lock", process)
        time.sleep(delay_s)
        output = interrupt(process)
        assert process.returncode == 130 and output.count("interrupted") <= 1, output
        assert not (out / "index.json").exists() and not list((out / ".build").glob(".*"))

    @pytest.mark.parametrize(
        ("seen", "delay_s"), [(".lock", 0.1), ("recipe.yaml", 0.1), ("metrics.jsonl", 0)]
    )
    def test_pretrain(self, recipe: Path, seen: str, delay_s: float) -> None:
        """While the towers are built, while workers start, and while it trains."""
        run = recipe.parent / "run"
        process = start(recipe, "trainer.max_steps=4000", "trainer.val_every_steps=2", "data.workers=2")
        wait_for(run / seen, process)
        time.sleep(delay_s)
        output = interrupt(process)
        assert process.returncode == 130, output
        assert output.count("interrupted") + output.count("stopped at step") == 1, output
        assert not list(run.glob("checkpoints/.step-*"))
        if seen == "metrics.jsonl":
            assert "go on with --resume" in output and (run / "checkpoints" / "latest").exists()
