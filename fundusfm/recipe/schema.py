"""The typed recipe: every key there is, its type, its default and what it counts.

Sizes say what they count: `global_batch_size` is in exams, over all ranks and micro-batches; steps are
optimiser steps. The keys of `objective` beyond these belong to the objective itself (its own `Config`, a
subclass).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class Fidelity(str, Enum):
    """`corrected`: the method done right. `released`: the published code, defect for defect."""

    corrected = "corrected"
    released = "released"


class Mirror(str, Enum):
    """Horizontal flips. `per_eye` draws a flip for each eye by itself, which destroys laterality."""

    never = "never"
    per_eye = "per_eye"


class Fit(str, Enum):
    """How an image becomes a square: `squeeze` fills it and gives up the aspect ratio; `pad` keeps the ratio,
    the image at the top left of a black canvas."""

    squeeze = "squeeze"
    pad = "pad"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class TextKind(str, Enum):
    """`bert`: reads both ways, its first token speaks. `clip`: reads forwards only, its last token speaks."""

    bert = "bert"
    clip = "clip"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


# Whom a row is contrasted with: the global batch, or the ranks' rows of one micro-batch. Made by a call,
# because `global` is what users write and no name in Python.
Negatives = Enum("Negatives", {"global": "global", "micro": "micro"}, type=str)


class Strategy(str, Enum):
    """`ddp`: whole copies. `fsdp`: blocks of towers are spread (FSDP2). `zero1` .. `zero3`: DeepSpeed."""

    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


@dataclass
class ObjectiveConfig:
    """What every objective has. `name`: a known objective, or an import path `package.module:Class`."""

    name: str = "ret_clip"
    fidelity: Fidelity = Fidelity.corrected
    negatives: Negatives = Negatives["global"]

    @property
    def reads_text(self) -> bool:
        """Whether it reads any text: then a tokenizer must be given."""
        return True

    @property
    def has_expert_set(self) -> bool:
        """Whether it treats sources marked `expert` apart."""
        return False

    def language_part(self, text: TextConfig) -> str:
        """What reads or writes its texts, in the words of a run's header."""
        tower = "CLIP text tower" if text.kind is TextKind.clip else "BERT"
        return text.weights or f"{tower} {text.layers} x {text.width}"

    def view_options(self) -> dict[str, Any]:
        """What its view is to do differently: keyword arguments of that view."""
        return {}

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int | None:
        """How many exams are told apart from each other if each rank encodes `of_rank`; None if none are.

        Fewer than two would be told apart from nothing.
        """
        return None

    def impossible(self) -> dict[str, str]:
        """What is wrong with the values of this objective's own keys: key -> sentence."""
        return {}


@dataclass
class VisionConfig:
    """A timm vision tower. `options` go to `timm.create_model`; `weights` is a file of its weights."""

    name: str = "vit_base_patch16_clip_quickgelu_224"
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False


@dataclass
class TextConfig:
    """A text tower: sizes for a random start, or `weights` (a transformers folder or name)."""

    kind: TextKind = TextKind.bert
    weights: str | None = None
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    gradient_checkpointing: bool = False


@dataclass
class ModelConfig:
    """The towers and their shared width. `weights`: a file of the whole objective's weights to start from."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    weights: str | None = None


@dataclass
class AugmentConfig:
    """Random changes to a training image; `crop_scale`: the area kept, jitters: half-ranges around 1."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    erase_probability: float = 0.1
    mirror: Mirror = Mirror.never


@dataclass
class AugmentOverride:
    """What images of one modality do otherwise than `AugmentConfig` says; None: as it says."""

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    erase_probability: float | None = None
    mirror: Mirror | None = None


@dataclass
class SourceConfig:
    """One shard set (a folder or any fsspec URL) and its share of every global batch.

    `expert`: few images with careful texts, for objectives that treat such a set apart (KeepFIT).
    """

    shards: str = "???"
    weight: float = 1.0
    expert: bool = False


@dataclass
class DataConfig:
    """`tokenizer`: a transformers name, a folder, a file of `fundusfm tokens train`; null without text.

    `micro_batch_size`: exams that a rank encodes at a time, null for all of its share of the global batch.
    `languages`: which texts to draw from, in no order of preference; empty for all. `shuffle_window` counts
    shards. `error_budget`: the share of unreadable exams above which training stops.
    `max_images_per_exam`: of an exam with more some are drawn, by views that take several.
    `augment_by_modality`: modality -> keys of `augment` that images of this modality have otherwise.
    `prompts`: dictionaries (YAML, label -> language -> phrases) for texts made from labels while training,
    `templates`: language -> sentence around a phrase, with `{finding}` and perhaps `{eye}`; empty: built-in.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    modalities: list[str] = field(default_factory=lambda: ["CFP"])
    max_images_per_exam: int = 4
    languages: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)
    global_batch_size: int = 256
    micro_batch_size: int | None = None
    image_size: int = 224
    fit: Fit = Fit.squeeze
    context_length: int = 100
    tokenizer: str | None = "???"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    augment_by_modality: dict[str, AugmentOverride] = field(default_factory=dict)
    workers: int = 2
    shuffle_window: int = 16
    error_budget: float = 0.001
    cache_dir: str | None = None
    cache_gib: float = 50.0

    def augment_for(self, modality: str) -> AugmentConfig:
        """How images of a modality are changed."""
        named = {name.lower(): override for name, override in self.augment_by_modality.items()}
        override = named.get(modality.lower(), AugmentOverride())
        return replace(self.augment, **{k: v for k, v in vars(override).items() if v is not None})


@dataclass
class OptimConfig:
    """AdamW with linear warm-up, a hold at the peak and a cosine to `min_lr`, per optimiser step.

    `hold_fraction` is a share of the steps after the warm-up. `layer_decay`: of two blocks of a tower the one
    nearer to the input learns at this share of the other's rate.
    """

    lr: float = 3.0e-5
    min_lr: float = 0.0
    layer_decay: float = 1.0
    weight_decay: float = 0.001
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1.0e-6
    warmup_steps: int = 50
    hold_fraction: float = 0.0
    clip_norm: float | None = None


@dataclass
class TrainerConfig:
    """How long and on what. Give `max_steps` or `max_exams`; a rank's share of the batch is derived.

    Validation reads at most `val_exams` exams in batches of `val_batch_size`, whatever the number of ranks.
    `offload`: ZeRO keeps the optimiser, and in stage 3 the parameters, in the host's memory. `compile`: the
    blocks of the towers run through `torch.compile`.
    `stall_minutes`: a rank whose step, save or validation batch takes longer says where it is, and ends.
    `time_limit_minutes`: stop in time for a save, counted from the start of the process; SLURM's own limit
    is known without it.
    """

    max_steps: int | None = None
    max_exams: int | None = None
    device: Device = Device.auto
    devices: int = 1
    nodes: int = 1
    strategy: Strategy = Strategy.ddp
    offload: bool = False
    compile: bool = False
    precision: Precision = Precision.fp32
    val_every_steps: int | None = None
    val_exams: int = 1024
    val_batch_size: int = 64
    stall_minutes: float = 30.0
    time_limit_minutes: float | None = None


@dataclass
class CheckpointConfig:
    """When to save (both may hold) and how many whole checkpoints to keep.

    `in_background`: training goes on while the disk is written; a step costs no more than a copy.
    """

    every_steps: int | None = 1000
    every_minutes: float | None = 30.0
    keep: int = 3
    in_background: bool = True


@dataclass
class EvaluationConfig:
    """`fundusfm evaluate`: batch size in images, bootstrap resamples over patients, neighbours of the k-NN.

    `shots`: training images of each label that few-shot methods learn from, 0 for no such methods.
    `templates`: language -> sentence around a finding, with `{eye}` and `{finding}`; empty: built-in ones.
    """

    batch_size: int = 128
    num_resamples: int = 1000
    neighbours: int = 20
    shots: int = 0
    templates: dict[str, str] = field(default_factory=dict)


@dataclass
class TelemetryConfig:
    """Scalars every `log_every_steps`; sample images and the similarity map every `images_every_steps`."""

    log_every_steps: int = 1
    images_every_steps: int = 200
    tensorboard: bool = True


@dataclass
class Recipe:
    """A whole run. `name` is the run folder under `runs_dir`."""

    name: str = "???"
    seed: int = 0
    runs_dir: str = "runs"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
