"""Training runs in processes of their own, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from fundusfm.shards.index import ShardIndex
from tests.conftest import Cohort

LIMIT_S = 240
PROJECT = Path(__file__).parents[2]
# What is still training when a signal comes, on a machine of any speed.
SLOW = ("objective.name=tests.training.own:Slow", "objective.fidelity=corrected")


def write_recipe(path: Path, cohort: Cohort, **trainer: Any) -> Path:
    """A run of 24 steps of 12 exams, over two epochs of the 42 train exams and more, saved every 5 steps."""
    recipe = {
        "name": "run",
        "runs_dir": str(path.parent),
        "objective": {"name": "ret_clip", "temperature_init": 14.3},
        "model": {
            "vision": {"options": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}},
            "text": {
                "layers": 1,
                "width": 32,
                "heads": 2,
                "mlp_width": 64,
                "max_positions": 64,
                "dropout": 0.2,
            },
            "embed_dim": 16,
        },
        "data": {
            "sources": [{"shards": str(cohort.shards)}],
            "global_batch_size": 12,
            "image_size": 32,
            "context_length": 48,
            "tokenizer": str(cohort.tokenizer),
            "workers": 2,
            "shuffle_window": 2,
        },
        "optim": {"lr": 0.001, "warmup_steps": 3, "clip_norm": 1.0},
        "trainer": {"max_steps": 24, "val_every_steps": 7, "device": "cpu", **trainer},
        "checkpoint": {"every_steps": 5},
        "telemetry": {"images_every_steps": 10},
    }
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def start(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    """`fundusfm pretrain` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fundusfm", "pretrain", str(recipe), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},  # tests have objectives too
    )


def finish(process: subprocess.Popen[str], expected_code: int = 0) -> str:
    """Its output, once it has ended with the expected exit code."""
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == expected_code, output
    return output


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Return once the step has been logged, or the process has ended."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.005)


def signal_at_step(process: subprocess.Popen[str], metrics: Path, step: int, number: int) -> None:
    """Send a signal once the step has been logged; SIGKILL to the whole group, loader workers included."""
    wait_for_step(process, metrics, step)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def losses(metrics: Path) -> dict[tuple[int, bool], dict[str, float]]:
    """What must not depend on interruptions: (step, is validation) -> losses, temperatures, learning rate."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    timing = ("exams_per_s", "data_wait")
    values = [{k: v for k, v in line.items() if k not in timing} for line in lines]
    table = {(line["step"], "val/loss" in line): line for line in values}
    assert len(table) == len(lines), "a step was logged twice"
    return table


def break_val_exam(shards: Path, number: int) -> tuple[str, str]:
    """Make the images of one exam of the val split unreadable; returns its shard and its key."""
    shard = shards / next(one.name for one in ShardIndex.load(shards).shards if one.split == "val")
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    key = list(dict.fromkeys(one.name.partition(".")[0] for one in members))[number]
    with shard.open("r+b") as stream:
        for one in members:
            if one.name.startswith(f"{key}.") and one.name.endswith(".jpg"):
                stream.seek(one.offset_data)
                stream.write(bytes(600))
    return shard.name, key
