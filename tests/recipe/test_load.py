from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundusfm.errors import UserError
from fundusfm.recipe.load import recipe_from_yaml_text, recipe_to_yaml
from fundusfm.recipe.merge import leaf_keys
from fundusfm.recipe.schema import Fidelity, Mirror, Precision, Recipe, SourceConfig
from fundusfm.recipe.types import keys_of
from tests.recipe.stub import WHOLE, AlphaConfig, BetaConfig, config_of, load, resolve


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def refusal(tmp_path: Path, text: str = WHOLE, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, text, overrides)
    return str(caught.value)


def test_types_are_plain(tmp_path: Path) -> None:
    text = WHOLE + "objective: {fidelity: released, temperature: 7}\noptim: {lr: 1, betas: [0, 0.5]}\n"
    recipe = resolve(tmp_path, text, ["trainer.precision=bf16", "data.augment.mirror=per_eye"]).recipe
    assert type(recipe) is Recipe and type(recipe.objective) is AlphaConfig
    assert recipe.objective.fidelity is Fidelity.released and recipe.objective.temperature == 7.0
    assert recipe.optim.betas == (0, 0.5) and isinstance(recipe.optim.betas, tuple)
    assert isinstance(recipe.optim.lr, float)
    assert recipe.trainer.precision is Precision.bf16 and recipe.data.augment.mirror is Mirror.per_eye
    assert recipe.data.sources[0].shards == "a" and recipe.data.sources[0].weight == 1.0


def test_extends__order_and_origin(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base=WHOLE + "seed: 1\nruns_dir: base\n", other="seed: 2\nmodel: {embed_dim: 8}\n")
    (tmp_path / "sub" / "top.yaml").write_text("extends: [../base.yaml, ../other.yaml]\nname: top\n")
    resolved = load(tmp_path / "sub" / "top.yaml", "model.text.layers=3")
    recipe, origin = resolved.recipe, resolved.origin
    assert (recipe.name, recipe.seed, recipe.runs_dir, recipe.model.embed_dim) == ("top", 2, "base", 8)
    assert origin["name"].endswith("top.yaml:2") and origin["seed"].endswith("other.yaml:1")
    assert origin["runs_dir"].endswith("base.yaml:7")
    assert origin["model.text.layers"] == "command line" and origin["optim.lr"] == "default"


def test_extends__circle_and_missing(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="extends: b.yaml\n",
        b="extends: a.yaml\n",
        c="extends: nowhere.yaml\n",
        d="extends: {x: 1}\n",
    )
    with pytest.raises(UserError, match=r"circle[\s\S]*a.yaml -> .*b.yaml -> .*a.yaml"):
        load(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"nowhere.yaml \(extended by .*c.yaml\)"):
        load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=r"extends takes a file name[\s\S]*d.yaml:1"):
        load(tmp_path / "d.yaml")


def test_extends__the_same_base_twice_is_no_circle(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=WHOLE + "seed: 1\n",
        a="extends: base.yaml\nseed: 3\n",
        b="extends: base.yaml\n",
        c="extends: [a.yaml, b.yaml]",
    )
    assert load(tmp_path / "c.yaml").recipe.seed == 3


def test_lists_replace_and_mappings_merge(tmp_path: Path) -> None:
    options = "model: {vision: {options: {depth: 2, b: [1]}}}\n"
    write(tmp_path, base=WHOLE.replace("[{shards: a}]", "[{shards: a}, {shards: b, weight: 3}]") + options)
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nmodel: {vision: {options: {depth: 4}}}\n")
    kept = load(tmp_path / "top.yaml", "data.sources[1].weight=5").recipe
    assert [(s.shards, s.weight) for s in kept.data.sources] == [("a", 1.0), ("b", 5.0)]
    assert kept.model.vision.options == {"depth": 4, "b": [1]}
    replaced = load(tmp_path / "top.yaml", "data.sources=[{shards: c}]", "data.languages=[en, zh]")
    assert [(s.shards, s.weight) for s in replaced.recipe.data.sources] == [("c", 1.0)]
    assert replaced.recipe.data.languages == ["en", "zh"]
    assert replaced.origin["data.sources[0].shards"] == "command line"
    assert replaced.origin["data.sources[0].weight"] == "default"


def test_free_mappings__merge_at_every_depth(tmp_path: Path) -> None:
    text = WHOLE + "model: {vision: {options: {a: {b: 1, c: [2]}, d: {e: 3}}}}\n"
    overrides = ["model.vision.options.a.b=5", "model.vision.options.d=7", "model.vision.options.f={g: {}}"]
    resolved = resolve(tmp_path, text, overrides)
    assert resolved.recipe.model.vision.options == {"a": {"b": 5, "c": [2]}, "d": 7, "f": {"g": {}}}
    origin = {key.removeprefix("model.vision.options."): one for key, one in resolved.origin.items()}
    assert origin["a.b"] == origin["d"] == origin["f.g"] == "command line" and origin["a.c"].endswith(
        "yaml:6"
    )
    assert "options.a[0]: the key 0 is not text" in refusal(tmp_path, text, "model.vision.options.a.0=3")


def test_overrides__text_stays_text(tmp_path: Path) -> None:
    recipe = resolve(tmp_path, overrides=["name=007", "runs_dir=1e3", "data.cache_dir=null"]).recipe
    assert (recipe.name, recipe.runs_dir, recipe.data.cache_dir) == ("007", "1e3", None)


def test_overrides__the_last_one_wins(tmp_path: Path) -> None:
    assert resolve(tmp_path, overrides=["seed=1", "seed=2"]).recipe.seed == 2


def test_objective__swapped_by_one_line(tmp_path: Path) -> None:
    text = WHOLE + "objective: {temperature: 5, fidelity: released}\n"
    objective = resolve(tmp_path, text, ["objective.ratio=0.25", "objective.name=beta"]).recipe.objective
    assert objective == BetaConfig("beta", Fidelity.released, ratio=0.25)
    assert "objective.temperature: there is no such key" in refusal(
        tmp_path, text, "objective.name=beta", "objective.temperature=3"
    )


def test_objective__unknown_name_is_one_problem(tmp_path: Path) -> None:
    message = refusal(tmp_path, WHOLE + "objective: {name: bta, any: 1}\n", "seed=x")
    assert "recipe.yaml:6: objective.name: there is no objective 'bta'; known: ret_clip, beta" in message
    assert "2 problems" in message and "objective.any" not in message


def test_all_problems_at_once_with_places(tmp_path: Path) -> None:
    text = (
        "data:\n  sources:\n    - shards: a\n      wait: 3\n  languages: [no]\n  global_batch_sise: 3\n"
        "  augment:\nobjective: {temperatures: 3}\noptim: {lr: fast}\ntrainer: 4\n"
    )
    message = refusal(tmp_path, text, "lr=1", "trainer.maxsteps=3", "data.sources[7].weight=2", "loose")
    for line in (
        "recipe.yaml:4: data.sources[0].wait: there is no such key (did you mean weight?)",
        "recipe.yaml:5: data.languages: [False] is not a list",
        "recipe.yaml:6: data.global_batch_sise: there is no such key (did you mean global_batch_size?)",
        "recipe.yaml:7: data.augment: is a section with the keys crop_scale",
        "recipe.yaml:8: objective.temperatures: there is no such key (did you mean temperature?)",
        "recipe.yaml:9: optim.lr: 'fast' is not a number",
        "recipe.yaml:10: trainer: is a section with the keys max_steps",
        "command line: lr: there is no such key (did you mean optim.lr?)",
        "command line: trainer.maxsteps: there is no such key (did you mean max_steps?)",
        "command line: data.sources[7]: there are 1 items",
        "command line: loose: an override is written key=value",
        "  - name: must be given",
        "  - data.tokenizer: must be given",
    ):
        assert line in message
    assert message.count("\n  - ") == 13  # these and no more: nothing that only follows from them


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [1", "not valid YAML"),
        ("name: a\nname: b\n", "duplicate"),
        ("- a\n- b\n", "no mapping"),
        ("just words", "no mapping"),
        ("a: &x {b: *x}\n", "not valid YAML"),
        ("name: ${oops\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
    ],
)
def test_not_yaml(tmp_path: Path, text: str, what: str) -> None:
    assert what in refusal(tmp_path, text) and "recipe.yaml" in refusal(tmp_path, text)


def test_odd_files(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("whole", "整").encode())
    assert load(file).recipe.name == "整"
    file.write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match="UTF-8"):
        load(file)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="name: must be given"):
        load(file)


def test_interpolation__resolved_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHORTS", "/data")
    text = (
        WHOLE.replace("shards: a", "shards: '${oc.env:COHORTS}/x'")
        + "model: {embed_dim: '${model.text.width}'}\n"
    )
    resolved = resolve(tmp_path, text)
    assert resolved.recipe.data.sources[0].shards == "/data/x" and resolved.recipe.model.embed_dim == 768
    assert recipe_from_yaml_text(resolved.to_yaml(), objective_config=config_of) == resolved.recipe
    message = refusal(tmp_path, WHOLE + "seed: ${nothing.here}\nmodel: {embed_dim: '${name}'}\n")
    assert "seed: " in message and "model.embed_dim: " in message


TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="${}", exclude_categories=["Cs", "Cc"]), min_size=1
)
VALUE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


@settings(max_examples=30, deadline=None)
@given(
    shards=TEXT,
    tokenizer=TEXT,
    languages=st.lists(TEXT),
    options=st.dictionaries(TEXT, VALUE | st.lists(VALUE) | st.dictionaries(TEXT, VALUE)),
    numbers=st.tuples(st.floats(1e-30, 1e30), st.floats(0, 0.99), st.floats(1e-9, 1e6)),
    margin=st.none() | st.integers(),
)
def test_saved_recipe_loads_to_an_equal_one(
    shards: str, tokenizer: str, languages: list[str],
    options: dict[str, object], numbers: tuple[float, float, float], margin: int | None,
) -> None:  # fmt: skip
    recipe = Recipe(name="saved", objective=AlphaConfig(margin=margin))
    recipe.data.sources, recipe.data.tokenizer, recipe.data.languages = (
        [SourceConfig(shards)],
        tokenizer,
        languages,
    )
    recipe.trainer.max_steps = 100
    recipe.model.vision.options = options
    recipe.optim.lr, recipe.optim.betas, recipe.data.cache_gib = numbers[0], (numbers[1], 0.5), numbers[2]
    assert recipe_from_yaml_text(recipe_to_yaml(recipe), objective_config=config_of) == recipe


def test_saved_text_has_no_extends() -> None:
    with pytest.raises(UserError, match="extends: there is no such key"):
        recipe_from_yaml_text("extends: base.yaml\n" + WHOLE, objective_config=config_of)


SECTIONS = [
    "",
    "objective",
    "model",
    "model.vision",
    "data",
    "data.augment",
    "data.sources[0]",
    "trainer",
    "nothing",
]
KEYS = st.sampled_from(
    [*leaf_keys(Recipe), *SECTIONS, "objective.margin", "data.sources[3].weight", "model.vision.options.a.b"]
)
ODD = st.recursive(
    VALUE | st.sampled_from(["???", "${name}", "${oops", ".nan", "-1", "1e400"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=5,
)


FILE_KEYS = st.sampled_from([key for key in keys_of(Recipe) if f"{key}:" not in WHOLE])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(KEYS, ODD), max_size=4), st.dictionaries(FILE_KEYS, ODD, max_size=2))
def test_anything_is_accepted_or_refused_without_a_traceback(
    overrides: list[tuple[str, object]], sections: dict[str, object]
) -> None:
    text = WHOLE + "".join(f"{key}: {json.dumps(value)}\n" for key, value in sections.items())
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        resolve(Path(folder), text, [f"{key}={json.dumps(value)}" for key, value in overrides])


def test_override__reaches_into_what_another_gives_as_a_whole(tmp_path: Path) -> None:
    """Else the first of the two would be forgotten without a word, and the run train on other shards."""
    told = refusal(tmp_path, WHOLE, "data.sources=[{shards: mine}]", "data.sources[0].weight=2")
    assert "data.sources[0].weight: an override before gives a part of it as a whole" in told
    later = resolve(tmp_path, WHOLE, ["data.sources[0].weight=2", "data.sources=[{shards: mine}]"]).recipe
    assert later.data.sources == [SourceConfig("mine", 1.0)]


def test_name__too_long_for_a_folder(tmp_path: Path) -> None:
    assert "longer than 200 bytes" in refusal(tmp_path, WHOLE, f"name={'眼' * 67}")
