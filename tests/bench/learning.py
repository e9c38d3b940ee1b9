"""Every tiny recipe, trained and measured one after another: does it learn, what, and in how many minutes?

    python tests/bench/learning.py [RECIPE ...] [--minutes 5]

The synthetic cohorts are drawn if they are not there. A recipe passes if it trains within the minutes, if the
loss of its last steps is below that of its first, and if the linear probe's gain over the untrained tower, by
macro AUROC on held-out patients, has a 95% interval above 0. Exit code 1 if one does not. For the clock to
mean something nothing else may run; all seven take about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fundusfm.evaluation.results import PRETRAINED, PROBE, UNTRAINED

RECIPES = ("ret_clip", "flair", "keepfit", "eyeclip", "urfound", "mae", "caption")
SHARDS, EXPERTS = Path("shards/built/synth"), Path("shards/built/synth_experts")
RUNS = Path("runs/bench")
TOKENS = Path("shards/built/synth.tokens.json")
COHORTS = {
    SHARDS: ("shards", "synth", "--patients", "2500", "--seed", "0", "--size", "96"),
    EXPERTS: ("shards", "synth", "--patients", "300", "--seed", "1", "--size", "96"),
    TOKENS: ("tokens", "train", "--shards", str(SHARDS), "--vocab-size", "1000"),
}
NUM_ENDS = 20  # logged steps at either end over which a loss is averaged


@dataclass(frozen=True)
class Learnt:
    """One recipe: seconds of training, loss terms (first, last), and results of the probe."""

    recipe: str
    seconds: float
    terms: dict[str, tuple[float, float]]
    probes: dict[str, dict[str, float]]
    gain: dict[str, float]

    def faults(self, minutes: float) -> list[str]:
        """What it fails at."""
        first, last = self.terms["loss"]
        return [
            told
            for told, is_so in {
                f"takes {self.seconds / 60:.1f} minutes": self.seconds > 60 * minutes,
                "its loss does not fall": not last < first,
                "its probe is not surely above the untrained one": not self.gain["low"] > 0,
            }.items()
            if is_so
        ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    recipes = options.recipes or RECIPES
    if unknown := sorted({*recipes} - {*RECIPES}):
        parser.error(f"no such recipe: {', '.join(unknown)}")
    console = Console(width=150)
    for path, words in COHORTS.items():
        if path != EXPERTS or "keepfit" in recipes:
            run(*words, "--out", str(path))  # what is there already is kept
    all_learnt = []
    for recipe in recipes:
        learnt = learn(recipe)
        all_learnt.append(learnt)
        console.print(table_of(all_learnt, options.minutes))
    return int(any(learnt.faults(options.minutes) for learnt in all_learnt))


def run(*words: str) -> None:
    """A command of this package as a user starts it; its own lines show how it gets on."""
    subprocess.run([sys.executable, "-m", "fundusfm", *words], check=True)


def learn(recipe: str) -> Learnt:
    """Train a tiny recipe from the beginning, then measure it."""
    folder = RUNS / f"{recipe}_tiny"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    run("pretrain", f"recipes/{recipe}_tiny.yaml", f"runs_dir={RUNS}")
    seconds = time.monotonic() - began
    run("evaluate", str(folder), "--shards", str(SHARDS), "--workers", "0")
    results = json.loads((folder / "evaluation-synth" / "results.json").read_text())
    return Learnt(recipe, seconds, terms_of(folder / "metrics.jsonl"), *probes_of(results))


def terms_of(metrics: Path) -> dict[str, tuple[float, float]]:
    """Mean of each training loss over the first and over the last logged steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    series: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("train/"):
                series.setdefault(name.removeprefix("train/"), []).append(value)
    return {name: (fmean(all_[:NUM_ENDS]), fmean(all_[-NUM_ENDS:])) for name, all_ in series.items()}


def probes_of(results: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Macro AUROC of the probe by tower, and the gain over the untrained tower, both with intervals."""
    probes = {
        method["tower"]: method["scores"]["macro_auroc"]
        for method in results["methods"]
        if method["method"] == PROBE
    }
    gains = [d for d in results["differences"] if (d["method"], d["against"]) == (PROBE, UNTRAINED)]
    return probes, gains[0]["macro_auroc"]


def table_of(all_learnt: list[Learnt], minutes: float) -> Table:
    table = Table("recipe", "minutes", "loss terms, first -> last", PRETRAINED, UNTRAINED, "gain", "")
    for learnt in all_learnt:
        table.add_row(
            learnt.recipe,
            f"{learnt.seconds / 60:.2f}",
            "\n".join(f"{name} {first:.3g} -> {last:.3g}" for name, (first, last) in learnt.terms.items()),
            _told(learnt.probes[PRETRAINED]),
            _told(learnt.probes[UNTRAINED]),
            _told(learnt.gain),
            ", ".join(learnt.faults(minutes)) or "passes",
        )
    return table


def _told(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
