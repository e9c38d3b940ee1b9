"""Several objectives over shared towers: their keys, their terms, what they share, what a batch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fundusfm.errors import UserError
from fundusfm.objectives import build_objective, config_of
from fundusfm.objectives.composite import Composite, CompositeConfig, share_trunks
from fundusfm.recipe.load import load_recipe
from fundusfm.recipe.schema import Fidelity, Recipe
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.loader import World
from fundusfm.stream.tokens import load_tokens
from fundusfm.stream.view_composite import CompositeBatch
from fundusfm.stream.view_image import SingleImageBatch
from tests.conftest import Cohort
from tests.objectives.parts import COLOUR, Colour, ColourConfig
from tests.objectives.tiny import VOCAB_SIZE, random_batch, tiny_recipe
from tests.objectives.tiny_caption import CONVNEXT, tiny_caption
from tests.training.launch import write_recipe

PARTS: dict[str, Any] = {"ret_clip": {"temperature_init": 14.3}, COLOUR: {"scale": 3}}
WEIGHTS = {COLOUR: 0.5}


def composite_recipe(**changes: Any) -> Recipe:
    recipe = tiny_recipe()
    recipe.objective = CompositeConfig(name="composite", **{"parts": PARTS, "weights": WEIGHTS, **changes})
    return recipe


def composite_batch(num_patients: int, seed: int = 0, *, lacking: bool = True) -> CompositeBatch:
    """The patients of `random_batch`, and a picture of each for the second part."""
    pairs = random_batch(num_patients, seed, lacking=lacking)
    generator = torch.Generator().manual_seed(seed + 100)
    images = torch.randn(num_patients, 3, 32, 32, generator=generator)
    row_B = torch.arange(num_patients)
    single = SingleImageBatch(
        images=images, modality_B=torch.zeros_like(row_B), mask_seed_B=row_B, color_N34=None, erase_N4=None,
        keys=pairs.keys, faults=[],
    )  # fmt: skip
    return CompositeBatch({"ret_clip": pairs, COLOUR: single}, pairs.keys, [])


def tiny_composite(**changes: Any) -> Composite:
    objective = build_objective(composite_recipe(**changes), VOCAB_SIZE)
    assert isinstance(objective, Composite)
    return objective


def test_terms__those_of_the_parts_under_their_names() -> None:
    model, batch = tiny_composite().train(), composite_batch(6)
    terms = model.loss_terms(batch)
    parts = model.part_objectives()
    assert terms.keys() == model.term_weights().keys()
    assert [*terms] == [
        *(f"ret_clip/loss_{t}" for t in ("patient", "left", "right")),
        f"{COLOUR}/loss_colour",
    ]
    for name, part in parts.items():
        own = part.loss_terms(batch.parts[name])
        torch.testing.assert_close({key: terms[f"{name}/{key}"] for key in own}, own)
    wanted = sum(
        part.total_loss(part.loss_terms(batch.parts[n])) * WEIGHTS.get(n, 1) for n, part in parts.items()
    )
    torch.testing.assert_close(model.total_loss(terms), wanted)
    scales = {f"ret_clip/scale_{term}" for term in ("patient", "left", "right")}
    assert model.gauges().keys() == {*scales, f"{COLOUR}/scale"}


def test_towers__one_trunk_that_every_part_moves() -> None:
    model = tiny_composite().train()
    first, second = model.part_objectives().values()
    assert first.vision.trunk is second.vision.trunk and first.vision.proj is not second.vision.proj
    names = [name for name, _ in model.named_parameters()]
    assert sum("vision.trunk.cls_token" in name for name in names) == 1
    groups = model.optimiser_groups()
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)
    batch, weight = composite_batch(6), first.vision.trunk.patch_embed.proj.weight
    grads = {}
    for name, term in model.loss_terms(batch).items():
        grads[name] = torch.autograd.grad(term, weight, retain_graph=True)[0]
    assert all(grad.any() for grad in grads.values())
    model.total_loss(model.loss_terms(batch)).backward()
    weights = model.term_weights()
    torch.testing.assert_close(
        weight.grad, sum(weights[n] * g for n, g in grads.items()), rtol=1e-4, atol=1e-6
    )


def test_share_trunks__refuses_what_cannot_be_one() -> None:
    recipe = composite_recipe()
    recipe.objective = ColourConfig(name=COLOUR)
    same = {name: Colour(recipe, VOCAB_SIZE) for name in "ab"}
    share_trunks({**same, "none": nn.Linear(1, 1)})
    assert same["a"].vision.trunk is same["b"].vision.trunk
    recipe.model.vision.options = {**recipe.model.vision.options, "depth": 1}
    with pytest.raises(UserError, match=r"a and c build vision towers that cannot be one: blocks\.1\."):
        share_trunks({**same, "c": Colour(recipe, VOCAB_SIZE)})
    recipe.model.vision.name, recipe.model.vision.options = "convnext_atto", {}
    with pytest.raises(UserError, match="VisionTransformer, ConvNeXt"):
        share_trunks({**same, "c": Colour(recipe, VOCAB_SIZE)})


def test_gradients__cut_in_the_part_that_does() -> None:
    sizes = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 24}
    model = tiny_composite(parts={COLOUR: {}, "caption": sizes}, fidelity=Fidelity.released)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    assert model.cuts_gradients and not tiny_composite().cuts_gradients
    model.cut_gradients()
    cut = {id(p) for p in model.part_objectives()["caption"].parameters()}
    cuts = {id(p) in cut: p.grad.unique().tolist() for p in model.parameters() if p.grad is not None}
    assert cuts == {True: [pytest.approx(-0.1)], False: [-3.0]}


def test_decay__as_each_part_says() -> None:
    model = tiny_composite(parts={COLOUR: {}, "ret_clip": {}}, fidelity=Fidelity.released)
    spared = {id(p) for p in model.optimiser_groups()[1]["params"]}
    by_name = dict(model.named_parameters())
    # RET-CLIP's published rule decays BERT's norm gains; the other part's spares all vectors.
    bert = next(p for n, p in by_name.items() if n.endswith("embeddings.LayerNorm.weight"))
    norm = next(p for n, p in by_name.items() if n.endswith("vision.trunk.norm.weight"))
    assert id(bert) not in spared and id(norm) in spared


def test_evaluation__asks_the_first_part_that_can() -> None:
    model = tiny_composite(parts={COLOUR: {}, "ret_clip": {}}).eval()
    colour, ret_clip = model.part_objectives().values()
    batch = composite_batch(4, lacking=False)
    images, pairs = batch.images, batch.parts["ret_clip"]
    assert model.aligns_text and model.probe_features(images).equal(colour.probe_features(images))
    assert model.embed_images(images, "left").equal(ret_clip.embed_images(images, "left"))
    texts = (pairs.token_BT, pairs.mask_BT)
    assert model.embed_texts(*texts, "").equal(ret_clip.embed_texts(*texts, ""))
    torch.testing.assert_close(model.embed_exams(batch), ret_clip.embed_exams(pairs))
    assert not tiny_composite(parts={COLOUR: {}}, weights={}).aligns_text


@pytest.mark.parametrize(
    ("objective", "key", "told"),
    [
        ({"parts": {}}, "parts", "names no objective"),
        ({"parts": {"ret_klip": {}}}, "parts.ret_klip", "did you mean ret_clip"),
        ({"parts": {"composite": {}}}, "parts.composite", "cannot be a part of another"),
        ({"parts": {"ret_clip": None}}, "parts.ret_clip", "is a section"),
        ({"parts": {"ret_clip": {"left_wait": 1}}}, "parts.ret_clip.left_wait", "did you mean left_weight"),
        ({"parts": {"ret_clip": {"left_weight": "x"}}}, "parts.ret_clip.left_weight", "is not a number"),
        ({"parts": {"ret_clip": {"fidelity": "released"}}}, "parts.ret_clip.fidelity", "set objective."),
        ({"parts": {"ret_clip": {"temperature_init": 0}}}, "parts.ret_clip.temperature_init", "between 1"),
        ({"parts": {COLOUR: {"scale": -1}}, "weights": {}}, f"parts.{COLOUR}.scale", "above 0"),
        ({"weights": {"mae": 1}}, "weights.mae", "is no part"),
        ({"weights": {COLOUR: 0}}, f"weights.{COLOUR}", "take the part out"),
    ],
)  # fmt: skip
def test_impossible(objective: dict[str, Any], key: str, told: str) -> None:
    excuses = CompositeConfig(**{"parts": PARTS, "weights": {}, **objective}).impossible()
    assert [*excuses] == [key] and told in excuses[key]


def test_config__asks_its_parts() -> None:
    both, alone = CompositeConfig(parts=PARTS), CompositeConfig(parts={COLOUR: {}})
    assert both.impossible() == alone.impossible() == {}
    assert both.reads_text and not alone.reads_text
    assert (both.num_contrasted(1, 1), alone.num_contrasted(1, 1)) == (1, None)
    assert both.configs()[COLOUR] == ColourConfig(name=COLOUR, scale=3.0)
    released = CompositeConfig(parts=PARTS, fidelity=Fidelity.released)
    assert all(config.fidelity is Fidelity.released for config in released.configs().values())


def _file(tmp_path: Path, cohort: Cohort) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", cohort)


def _given(*more: str) -> list[str]:
    return ["objective.name=composite", "objective.parts={ret_clip: {}}", *more]


def test_recipe__keys_of_parts_are_told_with_their_place(tmp_path: Path, synth_cohort: Cohort) -> None:
    file = _file(tmp_path, synth_cohort)
    loaded = load_recipe(file, _given("objective.parts.ret_clip.left_weight=2"), objective_config=config_of)
    assert isinstance(loaded.recipe.objective, CompositeConfig)
    assert loaded.recipe.objective.parts == {"ret_clip": {"left_weight": 2}}
    with pytest.raises(
        UserError, match=r"command line: objective.parts.ret_clip.left_wait: there is no such key"
    ):
        load_recipe(file, _given("objective.parts.ret_clip.left_wait=2"), objective_config=config_of)


def _stream(tmp_path: Path, cohort: Cohort, *overrides: str) -> Stream:
    recipe = load_recipe(_file(tmp_path, cohort), overrides, objective_config=config_of).recipe
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    return Stream(recipe, build_objective(recipe, 400).view, tokens)


def test_batches__each_part_has_its_own_of_the_same_exams(tmp_path: Path, synth_cohort: Cohort) -> None:
    parts = f"objective.parts={{ret_clip: {{}}, '{COLOUR}': {{}}}}"
    stream = _stream(tmp_path, synth_cohort, *_given()[:1], parts)
    batch = stream.train_stream(World())[2]
    alone = _stream(tmp_path, synth_cohort).train_stream(World())[2]
    assert batch.keys == alone.keys and len(batch.keys) == len(batch.parts[COLOUR].images) == 12
    assert batch.images.equal(alone.images), "the first part sees what it would see alone"
    ready = stream.on_after_batch_transfer(batch.to(torch.device("cpu")), 0)
    assert all(part.images.dtype == torch.float32 for part in ready.parts.values())
    assert ready.images.equal(stream.on_after_batch_transfer(alone, 0).images)
    pieces = ready.pieces(5)
    assert [len(piece.keys) for piece in pieces] == [5, 5, 2]
    for name in ready.parts:
        assert (
            torch.cat([piece.parts[name].images for piece in pieces]).shape == ready.parts[name].images.shape
        )
    halves = [stream.train_stream(World(rank, 2))[2] for rank in (0, 1)]
    assert [key for half in halves for key in half.keys] == batch.keys


def test_exams__that_every_part_can_use(tmp_path: Path, synth_cohort: Cohort) -> None:
    name = "tests.objectives.parts:Colour"
    assert name == COLOUR
    parts = "objective.parts={{ret_clip: {{patient_weight: {}, left_weight: {}}}, '{}': {{}}}}"
    counts = [
        _stream(tmp_path, synth_cohort, _given()[0], parts.format(*weights, COLOUR)).num_exams
        for weights in ((1, 1), (0, 0))
    ]
    alone = _stream(tmp_path, synth_cohort).num_exams
    assert counts[0] == alone > counts[1] > 0, "without other terms only right eyes count"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_share_trunks__what_one_part_leaves_out_another_trains(order: tuple[int, int]) -> None:
    """What the part that needs it has frozen by design stays frozen."""
    recipe = composite_recipe()
    recipe.objective = ColourConfig(name=COLOUR)
    one, other = Colour(recipe, VOCAB_SIZE), Colour(recipe, VOCAB_SIZE)
    one.leave_out([one.vision.trunk])
    other.vision.trunk.pos_embed.requires_grad_(False)
    parts = [("idle", one), ("busy", other)]
    share_trunks(dict(parts[n] for n in order))
    trained = {name for name, p in one.vision.trunk.named_parameters() if p.requires_grad}
    assert one.vision.trunk is other.vision.trunk
    assert {name for name, _ in one.vision.trunk.named_parameters()} - trained == {"pos_embed"}


def test_share_trunks__what_no_part_needs_is_not_trained() -> None:
    recipe = composite_recipe()
    recipe.objective = ColourConfig(name=COLOUR)
    parts = {name: Colour(recipe, VOCAB_SIZE) for name in "ab"}
    for part in parts.values():
        part.leave_out([part.vision.trunk])
    share_trunks(parts)
    assert not any(p.requires_grad for p in parts["a"].vision.trunk.parameters())


def test_share_trunks__the_head_that_captions_do_not_read() -> None:
    """A convolutional trunk normalises in its head what other parts pool."""
    captions, other = tiny_caption(vision=CONVNEXT), tiny_caption(vision=CONVNEXT)
    other.unused = frozenset()
    other.vision.trunk.requires_grad_(True)
    assert captions.unused == {"vision.trunk.head.norm.weight", "vision.trunk.head.norm.bias"}
    assert {name for name, p in captions.named_parameters() if not p.requires_grad} >= captions.unused
    share_trunks({"caption": captions, "other": other})
    assert all(p.requires_grad for p in captions.vision.trunk.parameters())
