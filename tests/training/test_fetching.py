"""Parameters that are spread over ranks: all ranks fetch them together, and lose nothing by it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fundusfm.objectives import build_objective
from fundusfm.objectives.base import Objective
from fundusfm.objectives.cached import Features
from fundusfm.recipe.schema import Recipe
from fundusfm.training import fit
from fundusfm.training.checkpoint import OPTIMISER, load_weights, pieces_of
from fundusfm.training.strategies.portable import blocks_of
from tests.conftest import Cohort
from tests.training.ranked import train
from tests.training.test_compiled import with_transformer
from tests.training.test_tiny_recipes import RECIPES, TINY, tiny_overrides

PAIRS = "data.micro_batch_size=2"
QUIET = (
    "trainer.val_every_steps=null",
    "telemetry.tensorboard=false",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> Iterator[None]:
    """The forked ranks find DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    yield


@pytest.mark.parametrize("name", TINY)
def test_encode__the_same_calls_whatever_is_in_a_batch(
    name: str, synth_cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that one rank calls once more than another waits there for the other's next one."""
    calls: list[Counter[nn.Module]] = []

    def watched(recipe: Recipe, vocab_size: int) -> Objective:
        objective = build_objective(recipe, vocab_size)
        encode = objective.encode
        made = Counter[nn.Module]()
        for block in blocks_of(objective):
            block.register_forward_hook(lambda module, args, output: made.update([module]))

        def counted(batch: Any) -> Features:
            made.clear()
            features = encode(batch)
            calls.append(made.copy())
            return features

        objective.encode = counted  # type: ignore[method-assign]
        return objective

    monkeypatch.setattr(fit, "build_objective", watched)
    options = [*tiny_overrides(name, synth_cohort, tmp_path), *QUIET, PAIRS]
    fit.pretrain(with_transformer(RECIPES / f"{name}.yaml", options, tmp_path / "recipe.yaml"), [])
    # Of four steps: three of four pairs without a graph, the last with one, and the three again.
    assert len(calls) == 4 * 7
    assert calls[0] and all(one == calls[0] for one in calls)


@pytest.mark.faults
@pytest.mark.parametrize("fidelity", ["corrected", "released"])
def test_keepfit__ranks_whose_pairs_hold_experts_or_none(
    fidelity: str, synth_cohort: Cohort, tmp_path: Path
) -> None:
    """The released form pads by piece, so that its whole batch is something else."""
    reference = () if fidelity == "corrected" else (PAIRS,)
    runs = ("ddp", reference), ("fsdp", (PAIRS,)), ("zero3", (PAIRS,))
    options = (f"objective.fidelity={fidelity}", "data.global_batch_size=16")
    wanted, *found = (_moments("keepfit_tiny", run, options, synth_cohort, tmp_path) for run in runs)
    assert "exp_avg/revision.v.weight" in wanted
    for moments in found:
        _close(moments, wanted)


@pytest.mark.faults
# Released RET-CLIP refuses exams that lack an eye or a report, and this cohort has some.
@pytest.mark.parametrize("name", [name for name in TINY if name != "ret_clip_tiny"])
def test_released__the_steps_of_ddp(name: str, synth_cohort: Cohort, tmp_path: Path) -> None:
    """Each rank contrasts its own, some spare no parameter from decay, some cut gradients."""
    options = (
        "objective.fidelity=released",
        *(["objective.loss_over=all"] if name == "urfound_tiny" else []),
    )
    others: tuple[str, ...] = ("fsdp",) if name == "caption_tiny" else ("fsdp", "zero1", "zero3")
    wanted = _moments(name, ("ddp", ()), options, synth_cohort, tmp_path)
    for strategy in others:
        _close(_moments(name, (strategy, ()), options, synth_cohort, tmp_path), wanted)


def _moments(
    name: str, run: tuple[str, tuple[str, ...]], options: tuple[str, ...], cohort: Cohort, folder: Path
) -> dict[str, Tensor]:
    """After four steps on two ranks: Adam hides the size of gradients from losses, and these do not."""
    strategy, own = run
    place = folder / strategy
    place.mkdir()
    overrides = [*tiny_overrides(name, cohort, place), *QUIET, f"trainer.strategy={strategy}", *options, *own]
    overrides += ["trainer.devices=2", "optim.clip_norm=null"]
    train(2, with_transformer(RECIPES / f"{name}.yaml", overrides, place / "recipe.yaml"), same=())
    return _first_moments(place / name / "checkpoints" / "step-00000004")


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for name, moment in wanted.items():
        assert (found[name] - moment).norm() <= 1e-3 * moment.norm() + 1e-6, name


def _first_moments(checkpoint: Path) -> dict[str, Tensor]:
    reader = pieces_of(checkpoint, OPTIMISER)
    return {name: reader.whole(name) for name in reader.names if name.startswith("exp_avg/")}


def test_pictures_under_zero3__clamps_of_the_step_stay(synth_cohort: Cohort, tmp_path: Path) -> None:
    """The temperature wants to fall, and begins where it may not."""
    options = [*tiny_overrides("flair_tiny", synth_cohort, tmp_path), *QUIET, "trainer.strategy=zero3"]
    options += ["telemetry.tensorboard=true", "telemetry.images_every_steps=1"]
    options += ["objective.temperature_init=1", "optim.lr=0.01", "trainer.max_steps=3"]
    train(1, with_transformer(RECIPES / "flair_tiny.yaml", options, tmp_path / "recipe.yaml"), same=())
    saved = sorted((tmp_path / "flair_tiny" / "checkpoints").glob("step-*"))
    assert len(saved) == 3
    assert [load_weights(one)["log_scale"].item() for one in saved] == [0.0] * 3
    assert all(_first_moments(one)["exp_avg/log_scale"].item() > 0 for one in saved), "it would rise"
