from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.recipe.check import BOUNDS
from fundusfm.recipe.merge import leaf_keys
from fundusfm.recipe.schema import Recipe
from tests.recipe.stub import resolve


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    """The lines of the refusal of a whole recipe with these overrides; none if it is accepted."""
    try:
        resolve(tmp_path, overrides=overrides)
    except UserError as error:
        return [line[4:] for line in error.what.splitlines()[1:]]
    return []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.max_steps=null", "trainer: give max_steps or max_exams"),
        ("trainer.max_exams=5000", "both given"),
        ("trainer.devices=3", "255 or 258 can"),
        ("data.augment.mirror=per_eye", "per_eye makes a left eye look like a right one"),
        ("data.sources=[]", "needs at least one source"),
        ("data.sources=[{shards: a, weight: 0}]", "data.sources[0].weight: 0.0 must be above 0"),
        ("data.sources=[{shards: a, weight: .nan}]", "data.sources[0].weight: nan must be above 0"),
        ("data.sources=[{shards: a}, {shards: a}]", "data.sources[1].shards: 'a' is named twice"),
        ("data.sources=[{shards: a, expert: true}]", "data.sources[0].expert: has no effect"),
        ("data.sources=[{shards: ''}]", "data.sources[0].shards: is empty"),
        ("data.augment.crop_scale=[0.9, 0.5]", "must rise within (0, 1]"),
        ("data.augment.crop_scale=[0, 1]", "must rise within (0, 1]"),
        ("data.augment.crop_scale=[0.5, 1.5]", "must rise within (0, 1]"),
        ("data.augment.crop_ratio=[2, 1]", "data.augment.crop_ratio"),
        ("data.augment_by_modality.CFP.contrast=2", "CFP.contrast: 2.0 must be at least 0 and at most 1"),
        ("data.augment_by_modality.CFP.brigtness=0.1", "no such key (did you mean brightness?)"),
        ("data.augment_by_modality.CFP=3", "data.augment_by_modality.CFP: is a section with the keys"),
        ("data.augment_by_modality.OCT.contrast=0.1", "data.augment_by_modality.OCT: is not read"),
        ("data.std=[0, 1, 1]", "data.std"),
        ("data.mean=[.inf, 1, 1]", "data.mean"),
        ("optim.betas=[0.9, 1]", "optim.betas"),
        ("optim.warmup_steps=100", "100 steps of warm-up do not fit into 100 steps"),
        ("optim.hold_fraction=1", "optim.hold_fraction: 1"),
        ("data.micro_batch_size=48", "256 exams a rank cannot be cut into micro-batches of 48; 32 can"),
        ("data.micro_batch_size=0", "data.micro_batch_size: 0"),
        ("objective.negatives=micro", "micro needs micro-batches: set data.micro_batch_size"),
        ("objective.negatives=whole", "objective.negatives"),
        ("optim.warmup_steps=-1", "optim.warmup_steps: -1 must be at least 0"),
        ("optim.lr=0", "optim.lr: 0.0 must be above 0"),
        ("optim.layer_decay=0", "optim.layer_decay: 0.0 must be above 0 and at most 1"),
        ("optim.min_lr=-1", "optim.min_lr: -1.0 must be at least 0"),
        ("optim.min_lr=1", "optim.min_lr: 1 is above optim.lr"),
        ("optim.lr=.nan", "optim.lr: nan must be above 0"),
        ("data.context_length=513", "do not fit into model.text.max_positions = 512"),
        ("model.text.heads=7", "768 is not divisible by 7 heads"),
        ("model.text.dropout=1", "model.text.dropout"),
        ("trainer.offload=true", "trainer.offload: has no effect under ddp; use zero1, zero2 or zero3"),
        ("name=a/b", "cannot be the name of a run folder"),
        ("name=..", "cannot be the name of a run folder"),
        (r"name='a\b'", "cannot be the name of a run folder"),
        ("name=", "name"),
        ("evaluation.templates={de: '{eye}'}", "evaluation.templates.de"),
        ("evaluation.templates={de: '{finding} {x}'}", "evaluation.templates.de"),
        ("data.global_batch_size=1", "leaves one exam to ret_clip"),
        ("objective.temperature=0", "objective.temperature: must be above 0"),
        ("data.error_budget=1.5", "at least 0 and at most 1"),
        ("seed=-1", "seed"),
    ],
)
def test_refused(tmp_path: Path, override: str, told: str) -> None:
    found = problems(tmp_path, override)
    assert len(found) == 1, found
    assert told in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_steps=null", "trainer.max_exams=25600"],
        ["trainer.devices=4", "trainer.nodes=2"],
        ["data.augment.mirror=per_eye", "objective.fidelity=released"],
        ["data.augment.crop_scale=[1, 1]"],
        ["optim.warmup_steps=99", "optim.hold_fraction=0.9"],
        ["data.context_length=512"],
        ["data.micro_batch_size=64", "objective.negatives=micro", "trainer.devices=2"],
        ["data.micro_batch_size=256", "objective.negatives=global"],
        ["model.text.weights=folder", "model.text.heads=7", "data.context_length=600"],
        ["checkpoint.every_minutes=null"],
        ["data.global_batch_size=2", "trainer.devices=2"],
        ["data.global_batch_size=1", "objective.name=beta"],
        ["data.global_batch_size=4", "data.micro_batch_size=1"],
        ["data.global_batch_size=2", "objective.fidelity=released"],
        ["evaluation.templates={fr: '{finding}'}"],
        ["optim.clip_norm=null", "data.error_budget=0", "trainer.val_exams=0", "data.workers=0"],
    ],
)
def test_accepted(tmp_path: Path, overrides: list[str]) -> None:
    assert problems(tmp_path, *overrides) == []


def test_checkpoint__one_cadence_is_needed(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "checkpoint.every_minutes=null", "checkpoint.every_steps=null")
    assert "checkpoint: give every_steps, every_minutes or both" in found


def test_warmup__counts_steps_of_max_exams(tmp_path: Path) -> None:
    length = ["trainer.max_steps=null", "trainer.max_exams=257"]  # two steps of 256
    assert "do not fit into 2 steps" in problems(tmp_path, *length, "optim.warmup_steps=2")[0]
    assert problems(tmp_path, *length, "optim.warmup_steps=1") == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (
            ["data.global_batch_size=2", "trainer.devices=2", "objective.fidelity=released"],
            "data.global_batch",
        ),
        (["data.micro_batch_size=1", "objective.negatives=micro"], "data.micro_batch_size"),
    ],
)
def test_contrast__needs_two_exams_that_meet(tmp_path: Path, overrides: list[str], key: str) -> None:
    (found,) = problems(tmp_path, *overrides)
    assert key in found and "leaves one exam to ret_clip" in found


def test_what_hangs_on_a_mistake_is_not_told_twice(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "trainer.max_steps=ten")) == 1
    assert len(problems(tmp_path, "trainer.max_steps=-5")) == 1
    assert len(problems(tmp_path, "model.text.heads=0")) == 1
    assert len(problems(tmp_path, "data.sources=4")) == 1
    assert len(problems(tmp_path, "trainer.devices=0", "data.augment.mirror=never")) == 1


def test_a_missing_value_hides_no_other_problem(tmp_path: Path) -> None:
    found = problems(
        tmp_path, "name=???", "data.sources=[{weight: 1}, {shards: b, weight: -1}]", "optim.lr=-1"
    )
    assert [line.split(": ")[-2] for line in found] == [
        "name", "data.sources[0].shards", "optim.lr", "data.sources[1].weight",
    ]  # fmt: skip


@pytest.mark.parametrize("key", BOUNDS)
def test_every_number_has_its_bounds(tmp_path: Path, key: str) -> None:
    assert key in leaf_keys(Recipe)
    assert any(key in line for line in problems(tmp_path, f"{key}=-1"))


def test_no_number_is_left_out() -> None:
    numbers = {
        key for key in leaf_keys(Recipe) if isinstance(_default(key), (int, float)) and not _is_bool(key)
    }
    assert numbers - set(BOUNDS) == set()


def _default(key: str) -> object:
    value: object = Recipe(name="x")
    for word in key.split("."):
        value = getattr(value, word)
    return value


def _is_bool(key: str) -> bool:
    return isinstance(_default(key), bool)
