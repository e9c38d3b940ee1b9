from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fundusfm.recipe.load import ResolvedRecipe
from fundusfm.recipe.show import show_diff, show_recipe, spelt
from fundusfm.recipe.types import MISSING
from fundusfm.recipe.values import flatten
from tests.recipe.stub import WHOLE, load, resolve


def test_one_line_a_key_and_each_can_be_given_back(tmp_path: Path) -> None:
    overrides = ["data.languages=[en, zh]", "trainer.precision=bf16", f"runs_dir={'long' * 40}"]
    resolved = resolve(tmp_path, overrides=overrides)
    stream = io.StringIO()
    show_recipe(resolved, Console(file=stream, width=60))
    lines = [line for line in stream.getvalue().splitlines() if line]
    assert [line.split()[0] for line in lines] == list(flatten(resolved.recipe))
    assert any(line.startswith("data.languages ") and line.endswith("  command line") for line in lines)
    assert any(line.startswith("optim.lr ") and line.endswith("  default") for line in lines)
    assert any(line.startswith("name ") and line.endswith("recipe.yaml:1") for line in lines)

    file = tmp_path / "empty.yaml"
    file.write_text("data: {sources: [{shards: x}]}")
    given_back = [
        f"{key}={spelt(value)}"
        for key, value in flatten(resolved.recipe).items()
        if value not in ({}, MISSING)
    ]
    assert load(file, *given_back).recipe == resolved.recipe


def diff(a: ResolvedRecipe, b: ResolvedRecipe) -> list[str]:
    stream = io.StringIO()
    show_diff(a, b, ("a[1].yaml", "b.yaml"), Console(file=stream, width=20))
    return stream.getvalue().splitlines()


def test_diff__both_values_as_overrides_spell_them(tmp_path: Path) -> None:
    a = resolve(tmp_path, overrides=["name='[red]x'", "data.languages=[en, zh]"])
    b = resolve(tmp_path, overrides=["trainer.precision=bf16", "optim.clip_norm=1", "name='[red]x'"])
    lines = diff(a, b)
    assert lines[0].split() == ["a[1].yaml", "b.yaml"]
    assert [line.split(maxsplit=1)[0] for line in lines[1:]] == [
        "data.languages", "optim.clip_norm", "trainer.precision",
    ]  # fmt: skip
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == ["[]", "1.0", "bf16"]
    assert "[en, zh]" in lines[1] and "null" in lines[2] and "fp32" in lines[3]


def test_diff__another_objective_has_other_keys(tmp_path: Path) -> None:
    a, b = resolve(tmp_path), resolve(tmp_path, WHOLE + "objective: {name: beta}\n")
    found = {line.split()[0]: line.split()[1:] for line in diff(a, b)[1:]}
    assert found == {
        "objective.name": ["ret_clip", "beta"],
        "objective.temperature": ["90.0", "–"],
        "objective.margin": ["null", "–"],
        "objective.ratio": ["–", "0.5"],
        "objective.cap": ["–", "null"],
    }


def test_diff__nothing_to_tell(tmp_path: Path) -> None:
    assert diff(resolve(tmp_path), resolve(tmp_path)) == ["a[1].yaml and b.yaml do not differ"]
