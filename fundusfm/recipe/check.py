"""Combinations that have the right types and still cannot be; each refusal says why and what would do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fundusfm.recipe.problems import Problem
from fundusfm.recipe.schema import Fidelity, Mirror, Negatives, ObjectiveConfig, Recipe, Strategy


class Clash(NamedTuple):
    """A problem with the key to name it by, and the other keys that it depends on."""

    key: str
    text: str
    others: tuple[str, ...] = ()


class Bounds(NamedTuple):
    """The values a number may take; `open_low` leaves out the lower bound itself."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def excuse(self, value: float) -> str:
        """What is wrong with `value`; empty if nothing is."""
        above = value > self.low if self.open_low else value >= self.low
        if math.isfinite(value) and above and value <= self.high:
            return ""
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"{value} must be {low}" + (f" and at most {self.high:g}" if self.high < math.inf else "")


COUNT, ANY_COUNT, POSITIVE = Bounds(1), Bounds(0), Bounds(0, open_low=True)
SHARE, BELOW_ONE, ANY_SIZE = Bounds(0, 1), Bounds(0, 0.999999), Bounds(0)

_LONGEST_NAME_BYTES = 200  # file systems take 255, and temporary names are longer

BOUNDS = {
    "seed": Bounds(0, 2**63 - 1),
    "model.embed_dim": COUNT,
    **{f"model.text.{key}": COUNT for key in ("layers", "width", "heads", "mlp_width", "max_positions")},
    "model.text.dropout": BELOW_ONE,
    **{
        f"data.{key}": COUNT
        for key in (
            *("global_batch_size", "micro_batch_size", "max_images_per_exam"),
            *("image_size", "shuffle_window"),
        )
    },
    "data.context_length": Bounds(3),  # the start token, one word, the end token
    "data.workers": ANY_COUNT,
    "data.error_budget": SHARE,
    "data.cache_gib": POSITIVE,
    **{f"data.augment.{key}": SHARE for key in ("brightness", "contrast", "saturation", "erase_probability")},
    **{f"optim.{key}": POSITIVE for key in ("lr", "eps", "clip_norm")},
    **{f"optim.{key}": ANY_SIZE for key in ("weight_decay", "min_lr")},
    "optim.layer_decay": Bounds(0, 1, open_low=True),
    "optim.warmup_steps": ANY_COUNT,
    "optim.hold_fraction": BELOW_ONE,
    **{f"trainer.{key}": COUNT for key in ("max_steps", "max_exams", "devices", "nodes", "val_every_steps")},
    "trainer.val_exams": ANY_COUNT,
    **{f"trainer.{key}": POSITIVE for key in ("stall_minutes", "time_limit_minutes")},
    "trainer.val_batch_size": COUNT,
    "checkpoint.every_steps": COUNT,
    "checkpoint.every_minutes": POSITIVE,
    "checkpoint.keep": COUNT,
    **{f"evaluation.{key}": COUNT for key in ("batch_size", "num_resamples", "neighbours")},
    "evaluation.shots": ANY_COUNT,
    **{f"telemetry.{key}": COUNT for key in ("log_every_steps", "images_every_steps")},
}


def find_impossible(merged: DictConfig, broken: Collection[str]) -> list[Problem]:
    """The impossible values and combinations of a merged recipe; nothing that hangs on keys already `broken`.

    `merged` may still have values missing: a check that meets one has nothing to say.
    """
    recipe = cast(Recipe, merged)
    clashes = [clash for check in CHECKS for clash in _quietly(check, recipe)]
    clashes += _of_objective(merged)
    wrong = {*broken, *(clash.key for clash in clashes if not clash.others)}
    return [Problem(c.key, c.text) for c in clashes if not (wrong & {*c.others} or c.key in broken)]


def _quietly(check: Callable[[Recipe], Iterator[Clash]], recipe: Recipe) -> list[Clash]:
    found = []
    with contextlib.suppress(OmegaConfBaseException):
        for clash in check(recipe):
            found.append(clash)  # noqa: PERF402 - what was found before a missing value counts
    return found


def _of_objective(merged: DictConfig) -> list[Clash]:
    """What the objective says about its own keys."""
    try:
        objective = OmegaConf.to_object(merged.objective)
    except OmegaConfBaseException:
        return []
    assert isinstance(objective, ObjectiveConfig)
    clashes = []
    if objective.reads_text and OmegaConf.select(merged, "data.tokenizer") is None:
        text = f"must be given: {objective.name} reads texts"
        clashes.append(Clash("data.tokenizer", text, ("objective.name",)))
    if not objective.has_expert_set:
        clashes += [*_useless_experts(merged, objective.name)]
    clashes += _too_few_to_contrast(objective, cast(Recipe, merged))
    return clashes + [Clash(f"objective.{key}", text) for key, text in objective.impossible().items()]


def _too_few_to_contrast(objective: ObjectiveConfig, recipe: Recipe) -> Iterator[Clash]:
    """A batch without a second exam has no negatives: its loss is 0 whatever the towers do."""
    ranks, batch, micro = _sizes(recipe)
    if ranks < 1 or batch < ranks:
        return
    is_micro = objective.negatives is Negatives["micro"] and micro is not None
    found = objective.num_contrasted(micro if is_micro and micro else batch // ranks, ranks)
    if found is not None and found < 2:
        key = "data.micro_batch_size" if is_micro else "data.global_batch_size"
        others = ("trainer.devices", "trainer.nodes", "objective.fidelity", "objective.negatives")
        text = f"leaves one exam to {objective.name}, which tells exams apart and needs two or more"
        yield Clash(key, text, others)


def _sizes(recipe: Recipe) -> tuple[int, int, int | None]:
    """Ranks, global batch and micro-batch; no ranks where one of them is missing."""
    sizes: tuple[int, int, int | None] = (0, 0, None)
    with contextlib.suppress(OmegaConfBaseException):
        ranks = recipe.trainer.devices * recipe.trainer.nodes
        sizes = (ranks, recipe.data.global_batch_size, recipe.data.micro_batch_size)
    return sizes


def _useless_experts(merged: DictConfig, name: str) -> Iterator[Clash]:
    for number, source in enumerate(OmegaConf.select(merged, "data.sources") or ()):
        if source.expert:
            text = f"has no effect: {name}, as it is set, treats no source as an expert set"
            yield Clash(f"data.sources[{number}].expert", text, ("objective.name",))


def _numbers(recipe: Recipe) -> Iterator[Clash]:
    overrides = [f"data.augment_by_modality.{modality}" for modality in recipe.data.augment_by_modality]
    of_overrides = {
        key.replace("data.augment", one): bounds
        for one in overrides
        for key, bounds in BOUNDS.items()
        if key.startswith("data.augment.")
    }
    for key, bounds in {**BOUNDS, **of_overrides}.items():
        value: Any = OmegaConf.select(cast(DictConfig, recipe), key)
        if value is not None and (excuse := bounds.excuse(value)):
            yield Clash(key, excuse)


def _pairs(recipe: Recipe) -> Iterator[Clash]:
    """Tuples of numbers."""
    if not all(0 <= beta < 1 for beta in recipe.optim.betas):
        yield Clash("optim.betas", f"{[*recipe.optim.betas]} must lie in [0, 1)")
    if not all(0 < one < math.inf for one in recipe.data.std):
        yield Clash("data.std", f"{[*recipe.data.std]} must be above 0: images are divided by it")
    if not all(math.isfinite(one) for one in recipe.data.mean):
        yield Clash("data.mean", f"{[*recipe.data.mean]} must be finite")


def _rates(recipe: Recipe) -> Iterator[Clash]:
    if recipe.optim.min_lr > recipe.optim.lr:
        text = f"{recipe.optim.min_lr:g} is above optim.lr = {recipe.optim.lr:g}, the peak that it falls from"
        yield Clash("optim.min_lr", text, ("optim.lr",))


def _augmentation(recipe: Recipe) -> Iterator[Clash]:
    sections: dict[str, Any] = {"data.augment": recipe.data.augment}
    sections |= {f"data.augment_by_modality.{m}": a for m, a in recipe.data.augment_by_modality.items()}
    for section, augment in sections.items():
        low, high = augment.crop_scale or (1, 1)
        if not 0 < low <= high <= 1:
            text = f"[{low}, {high}] must rise within (0, 1]: shares of the area kept"
            yield Clash(f"{section}.crop_scale", text)
        low, high = augment.crop_ratio or (1, 1)
        if not 0 < low <= high < math.inf:
            yield Clash(f"{section}.crop_ratio", f"[{low}, {high}] must rise above 0: width over height")
        if augment.mirror is Mirror.per_eye and recipe.objective.fidelity is Fidelity.corrected:
            text = (
                "per_eye makes a left eye look like a right one; use never, or objective.fidelity: released"
            )
            yield Clash(f"{section}.mirror", text, ("objective.fidelity",))


def _modalities(recipe: Recipe) -> Iterator[Clash]:
    read = {modality.lower() for modality in recipe.data.modalities}
    for modality in recipe.data.augment_by_modality:
        if modality.lower() not in read:
            text = f"is not read: data.modalities names {', '.join(recipe.data.modalities)}"
            yield Clash(f"data.augment_by_modality.{modality}", text, ("data.modalities",))
    if len(read) < len(recipe.data.modalities):
        yield Clash("data.modalities", f"{[*recipe.data.modalities]} names one twice")


def _name(recipe: Recipe) -> Iterator[Clash]:
    name = recipe.name
    if not name.strip() or name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name.isprintable():
        yield Clash(
            "name", f"{name!r} cannot be the name of a run folder: no path, no leading dot, not empty"
        )
    elif len(name.encode()) > _LONGEST_NAME_BYTES:
        yield Clash("name", f"is longer than {_LONGEST_NAME_BYTES} bytes, too long for a folder")


def _sources(recipe: Recipe) -> Iterator[Clash]:
    if not recipe.data.sources:
        yield Clash("data.sources", "needs at least one source: `sources: [{shards: FOLDER}]`")
    for number, source in enumerate(recipe.data.sources):
        if not 0 < source.weight < math.inf:
            text = f"{source.weight} must be above 0; leave the source out instead"
            yield Clash(f"data.sources[{number}].weight", text)


def _shards(recipe: Recipe) -> Iterator[Clash]:
    seen: set[str] = set()
    for number, source in enumerate(recipe.data.sources):
        key = f"data.sources[{number}].shards"
        if not source.shards:
            yield Clash(key, "is empty; give a folder of shards")
        elif source.shards in seen:
            yield Clash(key, f"{source.shards!r} is named twice; raise its weight instead")
        seen.add(source.shards)


def _length(recipe: Recipe) -> Iterator[Clash]:
    steps, exams, batch = recipe.trainer.max_steps, recipe.trainer.max_exams, recipe.data.global_batch_size
    others = ("trainer.max_steps", "trainer.max_exams")
    if steps is None and exams is None:
        yield Clash("trainer", "give max_steps or max_exams: nothing says when to stop", others)
    elif steps is not None and exams is not None:
        text = "max_steps and max_exams are both given; set the other one to null (trainer.max_exams=null)"
        yield Clash("trainer", text, others)
    elif batch > 0:
        total = steps if steps is not None else -(-(exams or 0) // batch)
        if recipe.optim.warmup_steps >= total:
            text = f"{recipe.optim.warmup_steps} steps of warm-up do not fit into {total} steps of training"
            yield Clash("optim.warmup_steps", text, (*others, "data.global_batch_size"))


def _ranks(recipe: Recipe) -> Iterator[Clash]:
    ranks, batch = recipe.trainer.devices * recipe.trainer.nodes, recipe.data.global_batch_size
    if ranks > 0 and batch % ranks:
        below = batch - batch % ranks
        sizes = f"{below} or {below + ranks}" if below else f"{ranks}"
        text = f"{batch} exams cannot be shared evenly by {ranks} ranks (devices x nodes); {sizes} can"
        yield Clash("data.global_batch_size", text, ("trainer.devices", "trainer.nodes"))


def _strategy(recipe: Recipe) -> Iterator[Clash]:
    if recipe.trainer.offload and recipe.trainer.strategy in (Strategy.ddp, Strategy.fsdp):
        text = f"has no effect under {recipe.trainer.strategy.value}; use zero1, zero2 or zero3"
        yield Clash("trainer.offload", text, ("trainer.strategy",))


def _micro_batches(recipe: Recipe) -> Iterator[Clash]:
    micro, ranks = recipe.data.micro_batch_size, recipe.trainer.devices * recipe.trainer.nodes
    if recipe.objective.negatives is Negatives["micro"] and micro is None:
        text = "micro needs micro-batches: set data.micro_batch_size"
        yield Clash("objective.negatives", text, ("data.micro_batch_size",))
    if micro is None or micro < 1 or ranks < 1:
        return
    share = recipe.data.global_batch_size // ranks
    if share % micro:
        near = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
        text = f"{share} exams a rank cannot be cut into micro-batches of {micro}; {near} can"
        yield Clash(
            "data.micro_batch_size", text, ("data.global_batch_size", "trainer.devices", "trainer.nodes")
        )


def _text_tower(recipe: Recipe) -> Iterator[Clash]:
    """Sizes that do not fit together; a tower read from `weights` brings its own."""
    text, length = recipe.model.text, recipe.data.context_length
    if text.weights is not None:
        return
    if text.heads > 0 and text.width % text.heads:
        excuse = f"{text.width} is not divisible by {text.heads} heads"
        yield Clash("model.text.width", excuse, ("model.text.heads",))
    if length > text.max_positions:
        excuse = f"{length} tokens do not fit into model.text.max_positions = {text.max_positions}"
        yield Clash("data.context_length", excuse, ("model.text.max_positions",))


def _checkpoints(recipe: Recipe) -> Iterator[Clash]:
    if recipe.checkpoint.every_steps is None and recipe.checkpoint.every_minutes is None:
        keys = ("checkpoint.every_steps", "checkpoint.every_minutes")
        yield Clash(
            "checkpoint", "give every_steps, every_minutes or both: a killed run would lose everything", keys
        )


def _templates(recipe: Recipe) -> Iterator[Clash]:
    for section, templates in (("data", recipe.data.templates), ("evaluation", recipe.evaluation.templates)):
        for language, template in templates.items():
            try:
                filled = template.format(eye="<eye>", finding="<finding>")
            except (KeyError, IndexError, ValueError, AttributeError):
                filled = ""
            if "<finding>" not in filled:
                text = f"{template!r} must hold {{finding}}, may hold {{eye}}, and nothing else in braces"
                yield Clash(f"{section}.templates.{language}", text)


CHECKS = (
    _numbers,
    _pairs,
    _rates,
    _augmentation,
    _modalities,
    _name,
    _sources,
    _shards,
    _length,
    _ranks,
    _strategy,
    _micro_batches,
    _text_tower,
    _checkpoints,
    _templates,
)
