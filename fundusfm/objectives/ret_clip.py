"""RET-CLIP (arXiv 2405.14137): left eye, right eye and patient, each contrasted with the patient's report.

Legend: B patients, N images (only the eyes that exist are encoded), D shared width, T tokens.

One vision tower reads both eyes, one text tower reads the report once. The patient head maps the concatenated
eye features; a left and a right head map each eye. Three text heads give three views of the same report. The
loss is the sum of three symmetric contrastive terms over the global batch, each with its own learned
temperature. A term of weight 0 is not computed; its heads and its temperature stay as they start, so that a
file of weights fits every ablation.

`corrected` against `released` (the code that made the published weights):

======================  =========================================  ===========================================
switch                  corrected                                  released
======================  =========================================  ===========================================
negatives               all ranks                                  this rank's own rows
missing eye or report   masked: no term, no computation            refused: the published code has none
weight decay            none on vectors, position tables           by substrings, which miss BERT's norm gains
temperature cap         `temperature_max`                          a logarithm of 4.6052
start values            float32                                    rounded to float16 once
======================  =========================================  ===========================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.losses import contrastive_loss
from fundusfm.losses.ranks import Group
from fundusfm.models.text import build_text
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Eye, Objective
from fundusfm.objectives.cached import Features
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig, Recipe
from fundusfm.stream.views import LEFT, RIGHT, UNKNOWN, PatientPairBatch

TERMS = ("patient", "left", "right")
_RELEASED_LOG_CAP = 4.6052


@dataclass
class RetClipConfig(ObjectiveConfig):
    """Temperatures are multipliers of the cosine; weights belong to the three terms, 0 leaves one out."""

    temperature_init: float = 90.0
    temperature_max: float = 100.0
    patient_weight: float = 1.0
    left_weight: float = 1.0
    right_weight: float = 1.0

    def weights(self) -> dict[str, float]:
        """Term -> weight."""
        return dict(zip(TERMS, (self.patient_weight, self.left_weight, self.right_weight), strict=True))

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int:
        return of_rank if self.fidelity is Fidelity.released else of_rank * num_ranks

    def view_options(self) -> dict[str, Any]:
        # An eye of unknown side speaks in the patient term only.
        sides = [eye for eye, term in ((LEFT, "left"), (RIGHT, "right")) if self.weights()[term]]
        return {} if self.patient_weight else {"eyes": tuple(sides)}

    def impossible(self) -> dict[str, str]:
        excuses = {f"{term}_weight": _weight_excuse(weight) for term, weight in self.weights().items()}
        if not any(self.weights().values()):
            excuses["patient_weight"] = "is 0 like left_weight and right_weight: nothing would be learned"
        if not 1 <= self.temperature_max < math.inf:
            excuses["temperature_max"] = f"{self.temperature_max} must be at least 1"
        elif not 1 <= self.temperature_init <= self.temperature_max:
            held = f"1 and temperature_max = {self.temperature_max:g}, where each step holds it"
            excuses["temperature_init"] = f"{self.temperature_init} must lie between {held}"
        return {key: text for key, text in excuses.items() if text}


def _weight_excuse(weight: float) -> str:
    return "" if 0 <= weight < math.inf else f"{weight} must be at least 0; 0 leaves the term out"


@dataclass(frozen=True)
class PatientFeatures:
    """Unit rows of each term, `image[term]` and `text[term]` of shape (B, D), and which of them exist."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    image_valid: dict[str, Tensor]
    text_valid_B: Tensor


class RetClip(Objective):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = RetClipConfig
    view: ClassVar[str] = "patient_pair"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, RetClipConfig)
        self.config: RetClipConfig = recipe.objective
        self.released = self.config.fidelity is Fidelity.released
        width = recipe.model.embed_dim
        self.vision = build_vision(recipe.model.vision, recipe.data.image_size, width)
        self.text = build_text(recipe.model.text, vocab_size)
        self.image_heads = nn.ModuleDict(
            {
                "patient": nn.Linear(2 * width, width, bias=False),
                "left": nn.Linear(width, width, bias=False),
                "right": nn.Linear(width, width, bias=False),
            }
        )
        self.text_heads = nn.ModuleDict({term: _text_head(self.text.width, width) for term in TERMS})
        # Shape (1,): sharding strategies refuse parameters without an axis.
        start = math.log(self.config.temperature_init)
        self.log_scales = nn.ParameterDict({t: nn.Parameter(torch.full((1,), start)) for t in TERMS})
        self.terms = tuple(term for term in TERMS if self.config.weights()[term])
        for term in set(TERMS) - {*self.terms}:
            self.leave_out([self.image_heads[term], self.text_heads[term], self.log_scales[term]])
        if self.released:
            self._round_to_half()

    def term_weights(self) -> dict[str, float]:
        weights = self.config.weights()
        return {f"loss_{term}": weights[term] for term in self.terms}

    def encode(self, batch: PatientPairBatch) -> Features:
        features = self.features(batch)
        return {
            "text_valid": features.text_valid_B,
            **{f"image_{term}": features.image[term] for term in self.terms},
            **{f"text_{term}": features.text[term] for term in self.terms},
            **{f"valid_{term}": features.image_valid[term] for term in self.terms},
        }

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        # A validation batch belongs to one rank; a training batch is spread over all of them.
        group: Group = "rank" if self.released or not self.training else None
        return {
            f"loss_{term}": contrastive_loss(
                features[f"image_{term}"],
                features[f"text_{term}"],
                self.log_scales[term].exp(),
                valid_a_B=features[f"valid_{term}"],
                valid_b_B=features["text_valid"],
                group=group,
            )
            for term in self.terms
        }

    def features(self, batch: PatientPairBatch) -> PatientFeatures:
        """Unit features of every term for a batch; rows without an eye are zero and marked invalid."""
        num_patients = len(batch.text_valid_B)
        if self.released and (len(batch.eye_N) != 2 * num_patients or not batch.text_valid_B.all()):
            raise UserError(
                "the released RET-CLIP needs both eyes and a report of every patient",
                where="objective.fidelity",
                fix="use fidelity: corrected, or a cohort without missing eyes and reports",
            )
        feature_ND = self.vision(batch.images)
        eyes = {eye: _rows_of_eye(feature_ND, batch, eye, num_patients) for eye in (LEFT, RIGHT, UNKNOWN)}
        (left_BD, left_B), (right_BD, right_B), (unknown_BD, unknown_B) = (
            eyes[LEFT],
            eyes[RIGHT],
            eyes[UNKNOWN],
        )
        # An eye of unknown side speaks through both halves of the patient head, and through neither eye head.
        # A missing eye adds nothing: the head has no bias and its output is normalised.
        both_BE = torch.cat([left_BD + unknown_BD, right_BD + unknown_BD], dim=1)
        image = {"patient": both_BE, "left": left_BD, "right": right_BD}
        valid = {"patient": left_B | right_B | unknown_B, "left": left_B, "right": right_B}
        state_BW = self.text(batch.token_BT, batch.mask_BT)
        return PatientFeatures(
            image={t: F.normalize(self.image_heads[t](image[t]), dim=-1) for t in self.terms},
            text={t: F.normalize(self.text_heads[t](state_BW), dim=-1) for t in self.terms},
            image_valid=valid,
            text_valid_B=batch.text_valid_B,
        )

    def after_step(self) -> None:
        cap = _RELEASED_LOG_CAP if self.released else math.log(self.config.temperature_max)
        for term in self.terms:
            self.log_scales[term].clamp_(0, cap)

    def gauges(self) -> dict[str, float]:
        return {f"scale_{term}": float(self.log_scales[term].detach().exp()) for term in self.terms}

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        if not self.released:
            return super().no_decay(name, parameter)
        # The published rule looks for "bn", "ln", "bias" and "logit_scale" in names: CLIP's norms are caught,
        # BERT's `LayerNorm.weight` is not.
        is_vision_norm = name.startswith("vision.trunk.") and "norm" in name
        return is_vision_norm or name.endswith("bias") or name.startswith("log_scales.")

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """The published linear-probe feature: the projected class token, without a head, not normalised."""
        feature_ND: Tensor = self.vision(image_NCHW)
        return feature_ND

    def contrast_scale(self, eye: Eye) -> float:
        """The mean over the heads that read this eye."""
        scales = [float(self.log_scales[term].detach().exp()) for term in self._heads(eye)]
        return sum(scales) / len(scales)

    def embed_images(self, image_NCHW: Tensor, eye: Eye) -> Tensor:
        """Unit rows of single images, comparable with `embed_texts` of the same `eye`.

        An unknown eye is read by the patient head as both eyes, as the authors' zero-shot protocol does.
        """
        feature_ND: Tensor = self.vision(image_NCHW)
        both_NE = torch.cat([feature_ND, feature_ND], dim=1)
        heads = self.image_heads
        return self._joined(
            {t: heads[t](both_NE if t == "patient" else feature_ND) for t in self._heads(eye)}
        )

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: Eye) -> Tensor:
        """Unit rows of texts in the space of `embed_images` with the same `eye`."""
        state_BW = self.text(token_BT, mask_BT)
        return self._joined({term: self.text_heads[term](state_BW) for term in self._heads(eye)})

    def _heads(self, eye: Eye) -> tuple[str, ...]:
        """The terms whose heads read an eye: its own, else the patient's, else all that are trained."""
        known = [term for term in (eye or "patient", "patient") if term in self.terms]
        return tuple(known[:1]) or self.terms

    def _joined(self, rows: dict[str, Tensor]) -> Tensor:
        """Unit rows of one head; without a patient term, both heads side by side, 0 where one does not read.

        So the cosine of two joined rows is the mean of those of their heads, and all eyes are as wide.
        """
        unit = {term: F.normalize(row, dim=-1) for term, row in rows.items()}
        first = next(iter(unit.values()))
        if "patient" in self.terms or len(self.terms) == 1:
            return first
        blocks = [unit.get(term, torch.zeros_like(first)) for term in self.terms]
        return F.normalize(torch.cat(blocks, dim=1), dim=-1)

    def embed_exams(self, batch: PatientPairBatch) -> tuple[Tensor, Tensor]:
        """Unit rows of patients' images and of their reports, for retrieval."""
        features = self.features(batch)
        if "patient" in self.terms:
            return features.image["patient"], features.text["patient"]
        return self._joined(features.image), self._joined(features.text)

    def _round_to_half(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.half())


def _text_head(width: int, embed_dim: int) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embed_dim))
    for layer in (head[0], head[2]):
        nn.init.normal_(layer.weight, std=width**-0.5)  # type: ignore[arg-type]
    return head


def _rows_of_eye(
    feature_ND: Tensor, batch: PatientPairBatch, eye: int, num_patients: int
) -> tuple[Tensor, Tensor]:
    """Features of one eye by patient, zero where the patient has none, and which patients have one."""
    chosen_N = batch.eye_N == eye
    patient_n = batch.patient_N[chosen_N]
    rows_BD = feature_ND.new_zeros(num_patients, feature_ND.shape[1]).index_copy(
        0, patient_n, feature_ND[chosen_N]
    )
    valid_B = torch.zeros(num_patients, dtype=torch.bool, device=feature_ND.device)
    return rows_BD, valid_B.index_fill(0, patient_n, True)
