"""`trainer.compile`: every block of every tower, whole, under every strategy, with the losses of none."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch._dynamo.utils import counters

from fundusfm.objectives import config_of
from fundusfm.recipe.load import load_recipe, recipe_to_yaml
from fundusfm.training import fit
from fundusfm.training.strategies.portable import blocks_of
from tests.conftest import Cohort
from tests.distributed.ranks import run_ranks
from tests.objectives.parts import COLOUR
from tests.training.launch import losses, write_recipe
from tests.training.ranked import train
from tests.training.test_strategies import MICRO, STRATEGIES, close, of
from tests.training.test_tiny_recipes import RECIPES, TINY, tiny_overrides

COMPILER_LIMIT_S = 600
COMPILE = "trainer.compile=true"
COMPOSITE = (
    "objective.name=composite",
    f"objective.parts={json.dumps({'ret_clip': {'temperature_init': 14.3}, COLOUR: {}})}",
)
FROZEN_STEM = ("objective.name=tests.training.own:FrozenStem",)
CAPTION = (
    *("objective.name=caption", "objective.layers=1", "objective.width=32", "objective.heads=2"),
    *("objective.mlp_width=32", "objective.dropout=0", "objective.patch_dropout=0", MICRO),
)
Function = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> Iterator[None]:
    """The forked ranks find DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced as a whole, and then runs as it is: that spares the compiler's minutes.

    In forked processes only, since a process that has compiled cannot be forked any more.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", TINY)
def test_every_objective__every_block_and_none_for_ever(
    name: str, synth_cohort: Cohort, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(name, synth_cohort, tmp_path), COMPILE, "trainer.max_steps=10"]
    [(calls, graphs)] = run_ranks(1, _calls_of_blocks, RECIPES / f"{name}.yaml", overrides)
    assert calls and all(calls), calls
    assert graphs[len(graphs) * 2 // 3] == graphs[-1], "still compiling what it has seen before"


def _calls_of_blocks(rank: int, recipe: Path, overrides: list[str]) -> tuple[list[int], list[int]]:
    """How often each block was called as compiled, and after each call how many graphs there were."""
    calls: list[int] = []
    graphs: list[int] = []
    compile_whole: Function = torch.compile

    def compiled(forward: Function) -> Function:
        traced_forward, number = compile_whole(forward), len(calls)
        calls.append(0)

        @torch.compiler.disable(recursive=False)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[number] += 1
            answer = traced_forward(*args, **kwargs)
            graphs.append(counters["stats"]["unique_graphs"])
            return answer

        return counted

    torch.compile = compiled
    fit.pretrain(recipe, overrides)
    return calls, graphs


@pytest.mark.faults
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", TINY)
def test_every_objective_in_pieces__the_losses_of_the_whole(
    name: str, synth_cohort: Cohort, tmp_path: Path
) -> None:
    """With validation and pictures, whose towers run outside of a step."""
    found = []
    for strategy, options in ("ddp", []), ("fsdp", [COMPILE, MICRO]), ("zero3", [COMPILE, MICRO]):
        (tmp_path / strategy).mkdir()
        chosen = [*tiny_overrides(name, synth_cohort, tmp_path / strategy), *of(strategy), *options]
        chosen += ["data.global_batch_size=9", "trainer.max_steps=4", "telemetry.log_every_steps=1"]
        recipe = with_transformer(RECIPES / f"{name}.yaml", chosen, tmp_path / strategy / "recipe.yaml")
        run_ranks(1, _pretrain, recipe, [])
        lines = losses(tmp_path / strategy / name / "metrics.jsonl").values()
        found.append([loss for line in lines for key, loss in line.items() if key.endswith("/loss")])
    assert len(found[0]) == 4 + 2
    for other in found[1:]:
        close(other, found[0])


def with_transformer(recipe: Path, overrides: list[str], changed: Path) -> Path:
    """No ResNet: micro-batches split what it normalises, and at its kinks the last bit of a sum decides.

    No dropout, whose masks belong to micro-batches.
    """
    resolved = load_recipe(recipe, overrides, objective_config=config_of).recipe
    resolved.model.text.dropout = 0.0
    for rate in (key for key in vars(resolved.objective) if key.endswith("dropout")):
        setattr(resolved.objective, rate, 0.0)
    if resolved.model.vision.name.startswith("resnet"):
        resolved.model.vision.name = "vit_base_patch16_clip_quickgelu_224"
        resolved.model.vision.options = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    changed.write_text(recipe_to_yaml(resolved))
    return changed


def _pretrain(rank: int, recipe: Path, overrides: list[str]) -> None:
    fit.pretrain(recipe, overrides)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("objective", [COMPOSITE, FROZEN_STEM, CAPTION], ids=["twice", "frozen", "caption"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_blocks_that_fetch__called_twice_or_first_to_be_trained(
    strategy: str, objective: tuple[str, ...], synth_cohort: Cohort, tmp_path: Path
) -> None:
    """Gradients of a block are reduced once, and not before they are there."""
    found = []
    for name, ranks, options in ("one", 1, of("ddp")), ("two", 2, (*of(strategy), COMPILE)):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name / "recipe.yaml", synth_cohort)
        train(ranks, recipe, *options, *objective, "trainer.max_steps=8")
        metrics = losses(recipe.parent / "run" / "metrics.jsonl")
        found.append([line["train/loss"] for line in metrics.values()])
    assert len(found[0]) == 8
    close(found[1], found[0])


@pytest.mark.usefixtures("traced")
def test_header__says_what_is_compiled(synth_cohort: Cohort, tmp_path: Path) -> None:
    said = train(
        1,
        write_recipe(tmp_path / "recipe.yaml", synth_cohort),
        "optim.warmup_steps=1",
        "trainer.max_steps=2",
        COMPILE,
    )
    assert "compiled 2 Block, 1 BertLayer" in " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_blocks__each_runs_once(name: str, again: bool) -> None:
    """A block that is gone through without being called is neither compiled nor fetches its parameters."""
    trunk = timm.create_model(name, num_classes=0, **({"img_size": 32} if "vit" in name else {}))
    trunk.set_grad_checkpointing(again)
    called = Counter[torch.nn.Module]()
    blocks = list(blocks_of(trunk))
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: called.update([module]))
    trunk(torch.zeros(2, 3, 32, 32))
    assert len(blocks) > 3 and called == Counter(blocks)


@pytest.fixture(scope="module")
def uncompiled(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _losses("ddp", 1, (), synth_cohort, tmp_path_factory.mktemp("uncompiled"))


@pytest.fixture(scope="module")
def nothing_compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the compiler keeps what it made: it begins with nothing, as it does on a new machine."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"  # for all workers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.faults
@pytest.mark.timeout(2 * COMPILER_LIMIT_S)
@pytest.mark.skipif(not shutil.which("g++"), reason="has no C++ compiler")
@pytest.mark.parametrize(
    ("strategy", "options"),
    [*((strategy, ()) for strategy in STRATEGIES), ("fsdp", (MICRO,)), ("zero3", (MICRO,))],
)
def test_by_the_real_compiler__the_same_losses(
    strategy: str,
    options: tuple[str, ...],
    uncompiled: list[float],
    nothing_compiled: Path,
    synth_cohort: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole blocks: a hook that fetches weights within one would be an error here."""
    compile_whole = functools.partial(torch.compile, fullgraph=True)
    noted = tmp_path / "blocks"

    def compiled(forward: Function) -> Function:
        # DeepSpeed compiles functions of its own.
        if isinstance(getattr(forward, "__self__", None), torch.nn.Module):
            with noted.open("a") as file:
                file.write(".")
        return compile_whole(forward)

    monkeypatch.setattr(torch, "compile", compiled)
    close(_losses(strategy, 2, (*options, COMPILE), synth_cohort, tmp_path), uncompiled)
    assert len(noted.read_text()) == 2 * (2 + 1), "of each rank two blocks that see, one that reads"
    assert any(nothing_compiled.rglob("*.so"))


def _losses(strategy: str, ranks: int, options: tuple[str, ...], cohort: Cohort, folder: Path) -> list[float]:
    recipe = write_recipe(folder / "recipe.yaml", cohort)
    train(ranks, recipe, *of(strategy), *options, limit_s=COMPILER_LIMIT_S)
    return [line["train/loss"] for line in losses(folder / "run" / "metrics.jsonl").values()]
