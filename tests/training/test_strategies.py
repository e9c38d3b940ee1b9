"""Every strategy gives the losses of one process, and goes on with what any other has saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import find_checkpoint, load_weights, verify
from tests.conftest import Cohort
from tests.training.launch import losses, write_recipe
from tests.training.ranked import train

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS = 20
MICRO = "data.micro_batch_size=3"
BF16 = ("trainer.precision=bf16", "optim.lr=2e-5")


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> Iterator[None]:
    """The forked ranks find DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    yield


def close(found: list[float], wanted: list[float]) -> None:
    """Equal but for the order of sums, whose differences grow from step to step."""
    assert found[:8] == pytest.approx(wanted[:8], rel=2e-5)
    assert found == pytest.approx(wanted, rel=3e-4)


class Runs:
    """Undisturbed runs, each made once."""

    def __init__(self, folder: Path, cohort: Cohort) -> None:
        self._folder, self._cohort = folder, cohort
        self._done: dict[str, Path] = {}

    def __call__(self, strategy: str, world_size: int, *overrides: str) -> Path:
        """The metrics of a run."""
        name = "-".join([strategy, str(world_size), *(one.replace("=", "-") for one in overrides)])
        if name not in self._done:
            place = self._folder / name
            place.mkdir()
            recipe = write_recipe(place / "recipe.yaml", self._cohort)
            train(world_size, recipe, *of(strategy), *overrides)
            self._done[name] = place / "run" / "metrics.jsonl"
        return self._done[name]


def of(strategy: str) -> tuple[str, ...]:
    # A rate at which the loss falls: where it runs away, a last bit of a gradient grows with it.
    return (f"trainer.strategy={strategy}", f"trainer.max_steps={STEPS}", "optim.lr=2e-4")


def trained(metrics: Path) -> list[float]:
    return [line["train/loss"] for line in losses(metrics).values()]


@pytest.fixture(scope="module")
def runs(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), synth_cohort)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses__those_of_one_process(runs: Runs, strategy: str, world_size: int) -> None:
    wanted = trained(runs("ddp", 1))
    assert len(wanted) == STEPS
    close(trained(runs(strategy, world_size)), wanted)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_four_ranks__the_losses_of_one_process(runs: Runs, strategy: str) -> None:
    close(trained(runs(strategy, 4)), trained(runs("ddp", 1)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches__the_losses_of_the_big_batch(runs: Runs, strategy: str) -> None:
    """Gradients of pieces are summed, averaged once: divided by their number, they would be clipped less."""
    close(trained(runs(strategy, 2, MICRO)), trained(runs("ddp", 1)))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16__one_arithmetic(runs: Runs, strategy: str) -> None:
    """Weights, norms, sums stay fp32 under all. Later a last bit of a gradient turns roundings of weights."""
    wanted, found = trained(runs("ddp", 2, *BF16)), trained(runs(strategy, 2, *BF16))
    assert wanted[0] != pytest.approx(trained(runs("ddp", 1))[0], rel=1e-4), "this is fp32"
    assert found[:2] == pytest.approx(wanted[:2], rel=1e-5)
    assert found == pytest.approx(wanted, rel=1e-2)


# Under each: who goes on with it, on how many ranks.
CHAIN = [
    *[("ddp", 1), ("fsdp", 2), ("zero3", 2), ("zero1", 4), ("zero2", 1)],
    *[("fsdp", 4), ("ddp", 3), ("zero3", 4), ("fsdp", 1), ("ddp", 2)],
]


def test_resume__any_strategy_on_any_number_of_ranks(
    runs: Runs, synth_cohort: Cohort, tmp_path: Path
) -> None:
    """Two groups, a frozen block, a buffer, other initial weights, two steps each: nothing may be lost."""
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    for number, (strategy, world_size) in enumerate(CHAIN):
        stop = 2 * (number + 1)
        said = train(world_size, recipe, *of(strategy), resume=number > 0, stop_after=stop)
        newest = find_checkpoint(tmp_path / "run")
        manifest = verify(newest)
        assert (manifest.step, manifest.strategy, manifest.world_size) == (stop, strategy, world_size), said
    undisturbed = runs("ddp", 1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    close(trained(metrics), trained(undisturbed))
    weights, wanted = (load_weights(find_checkpoint(one.parent)) for one in (metrics, undisturbed))
    assert weights.keys() == wanted.keys()
    for name in ("seen", "vision.trunk.blocks.0.mlp.fc1.weight"):
        assert weights[name].equal(wanted[name]), name


@pytest.mark.faults
@pytest.mark.parametrize("options", [(), (MICRO,)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume__same_ranks_bit_equal(
    runs: Runs, synth_cohort: Cohort, tmp_path: Path, strategy: str, options: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    train(2, recipe, *of(strategy), *options, stop_after=4)
    train(2, recipe, *of(strategy), *options, resume=True)
    assert trained(tmp_path / "run" / "metrics.jsonl") == trained(runs(strategy, 2, *options))


@pytest.mark.parametrize("options", [(), (MICRO,)])
def test_resume__four_ranks_bit_equal(
    runs: Runs, synth_cohort: Cohort, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Gradients of more than two ranks are added in an order that depends on how they lie in buckets."""
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    train(4, recipe, *of("ddp"), *options, stop_after=4)
    train(4, recipe, *of("ddp"), *options, resume=True)
    assert trained(tmp_path / "run" / "metrics.jsonl") == trained(runs("ddp", 4, *options))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_offload__the_same_losses(runs: Runs, strategy: str) -> None:
    close(trained(runs(strategy, 2, "trainer.offload=true")), trained(runs("ddp", 1)))


@pytest.mark.faults
def test_gradient_checkpointing__the_same_losses(runs: Runs) -> None:
    """Blocks run again in the backward pass: their parameters have to be fetched once more."""
    again = ("model.vision.gradient_checkpointing=true", "model.text.gradient_checkpointing=true", MICRO)
    for strategy in ("fsdp", "zero3"):
        close(trained(runs(strategy, 2, *again)), trained(runs("ddp", 1)))
