"""EyeCLIP (npj Digital Medicine 2025): images of a patient redrawn, contrasted with each other and with text.

Legend: B exams, K places for the images of an exam, N images of a batch (only those that exist), D shared
width, P patches of an image, W trunk width, R rows that are contrasted, T tokens.

One vision tower reads every modality. Three terms, in every step: hidden patches of each image are redrawn;
two images of one exam find each other; an image finds the text of its exam and the text the image. The two
contrastive terms share one learned temperature. An exam that lacks a modality or a text has no row in the
term that needs it; a term without any row is 0, and `gauges` tells how many rows each one had. A term of
weight 0 is not computed; what only it needs stays as it starts: a file of weights fits every ablation.

`corrected` against `released` (the code that made the published weights):

======================  =========================================  ===========================================
switch                  corrected                                  released
======================  =========================================  ===========================================
reconstruction          hidden patches are never encoded; class    all patches encoded, without class token or
                        token and positions; each hidden patch     positions, hidden afterwards; each kept one
                        is redrawn in its place                    put where the one before it belongs; no
                                                                   positions in the decoder: one and the same
                                                                   patch is drawn everywhere
images of an exam       up to `data.max_images_per_exam`, all      two files, drawn; the first is redrawn and
                        redrawn and contrasted with the text       contrasted with the text
pairs of images         all by `pairs` and `pair_eyes`             these two files, whatever they show
texts                   one of the exam's, drawn                   the first
same patient, text      no candidates of each other                negatives
images without text     negatives of the texts of others           absent
negatives               all ranks                                  this rank's own rows
temperature cap         `temperature_max`                          none
weight decay            none on vectors, position tables           on everything
======================  =========================================  ===========================================

The published script also runs three loaders of unequal length side by side and lets a term fall to 0 for the
rest of an epoch once its loader is exhausted. That is not reproduced: every step draws exams from all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.losses import SameId, contrastive_loss, global_mean, patch_errors
from fundusfm.losses.ranks import Group, Ranks
from fundusfm.models.decoder import PatchDecoder
from fundusfm.models.masked import (
    Masking,
    hide_patches,
    masked_trunk,
    normalised,
    num_kept,
    patchify,
    visible_tokens,
)
from fundusfm.models.positions import sincos_table
from fundusfm.models.published_eyeclip import draw_as_published
from fundusfm.models.text import build_text
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Eye, Objective
from fundusfm.objectives.cached import Features
from fundusfm.objectives.pictures import reconstruction_picture
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig, Recipe
from fundusfm.stream.hashing import uniforms
from fundusfm.stream.view import UNKNOWN
from fundusfm.stream.view_multi import ExamBatch, EyeRule, PairRule

TERMS = RECONSTRUCTION, IMAGE_IMAGE, IMAGE_TEXT = "reconstruction", "image_image", "image_text"
_DECODER_EPS = 1e-5
_SHOWN_EXAMS = 2


@dataclass
class EyeClipConfig(ObjectiveConfig):
    """Weights belong to the three terms, 0 leaves one out.

    `temperature_init`, `temperature_max`: multipliers of the cosine. `mask_ratio`: share of an image's
    patches that is hidden; `normalise_target`: whether each is redrawn at mean 0 and deviation 1. `pairs`:
    which images of an exam belong together, those of two modalities or any two; `pair_eyes`: whether they
    must show the same eye.
    """

    temperature_init: float = 14.3
    temperature_max: float = 100.0
    mask_ratio: float = 0.8
    normalise_target: bool = False
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    pairs: PairRule = PairRule.cross_modality
    pair_eyes: EyeRule = EyeRule.same
    reconstruction_weight: float = 1.0
    image_image_weight: float = 1.0
    image_text_weight: float = 1.0

    @property
    def weights(self) -> dict[str, float]:
        return {term: getattr(self, f"{term}_weight") for term in TERMS}

    def view_options(self) -> dict[str, Any]:
        released = self.fidelity is Fidelity.released
        pairs, eyes = (PairRule.any, EyeRule.any) if released else (self.pairs, self.pair_eyes)
        return {
            "pairs": pairs if self.image_image_weight else None,
            "eyes": eyes,
            "texts": bool(self.image_text_weight),
            "published": released,
        }

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int | None:
        if not self.image_image_weight and not self.image_text_weight:
            return None
        return of_rank if self.fidelity is Fidelity.released else of_rank * num_ranks

    def impossible(self) -> dict[str, str]:
        found = {
            f"{term}_weight": f"{weight} must be finite and at least 0"
            for term, weight in self.weights.items()
            if not 0 <= weight < math.inf
        }
        if not any(self.weights.values()):
            found["reconstruction_weight"] = "all three weights are 0: nothing would be learned"
        if not 0 < self.mask_ratio < 1:
            found["mask_ratio"] = (
                f"{self.mask_ratio} must lie between 0 and 1: something hidden, something seen"
            )
        for key in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, key) < 1:
                found[key] = f"{getattr(self, key)} must be at least 1"
        if "decoder_heads" not in found and self.decoder_width % self.decoder_heads:
            found["decoder_width"] = f"{self.decoder_width} is not divisible by {self.decoder_heads} heads"
        elif self.decoder_width % 4:
            found["decoder_width"] = f"{self.decoder_width} is not divisible by 4, as its positions need"
        if not 1 <= self.temperature_init <= self.temperature_max < math.inf:
            text = f"{self.temperature_init} must lie between 1 and temperature_max = {self.temperature_max}"
            found["temperature_init"] = text
        return found


class EyeClip(Objective):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = EyeClipConfig
    view: ClassVar[str] = "multi_modal"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, EyeClipConfig)
        self.config: EyeClipConfig = recipe.objective
        self.released = self.config.fidelity is Fidelity.released
        width = recipe.model.embed_dim
        self.vision = build_vision(recipe.model.vision, recipe.data.image_size, width)
        self.text = build_text(recipe.model.text, vocab_size)
        self.text_head = nn.Linear(self.text.width, width, bias=False)
        nn.init.normal_(self.text_head.weight, std=self.text.width**-0.5)
        trunk = masked_trunk(self.vision.trunk, "model.vision.name")
        self.patch_px: int = trunk.patch_embed.patch_size[0]
        self.num_patches: int = trunk.patch_embed.num_patches
        self.num_kept = num_kept(self.num_patches, self.config.mask_ratio)
        if not self.num_kept:
            raise UserError(
                f"a share of {self.config.mask_ratio} leaves none of {self.num_patches} patches to be seen",
                where="objective.mask_ratio",
                fix="lower it, or choose smaller patches or larger images",
            )
        self.decoder = PatchDecoder(
            self.vision.width,
            sincos_table(self.config.decoder_width, math.isqrt(self.num_patches)).float(),
            3 * self.patch_px**2,
            depth=self.config.decoder_depth,
            heads=self.config.decoder_heads,
            eps=_DECODER_EPS,
        )
        # Shape (1,): sharding strategies refuse parameters without an axis.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(self.config.temperature_init)))
        self.terms = tuple(term for term in TERMS if self.config.weights[term])
        self.contrasts = self.terms != (RECONSTRUCTION,)
        self.aligns_text = IMAGE_TEXT in self.terms
        self.leave_out(self._unused())
        self._num_rows: dict[str, Tensor] = {}

    def _unused(self) -> Iterator[nn.Module | nn.Parameter | None]:
        """What no term needs."""
        if RECONSTRUCTION not in self.terms:
            yield self.decoder
        if IMAGE_TEXT not in self.terms:
            yield from (self.text, self.text_head)
        if not self.contrasts:
            yield from (self.vision.proj, self.log_scale)
            if self.released:
                trunk = masked_trunk(self.vision.trunk, "model.vision.name")
                yield from (trunk.cls_token, trunk.pos_embed, trunk.norm)

    def term_weights(self) -> dict[str, float]:
        return {f"loss_{term}": self.config.weights[term] for term in self.terms}

    def may_be_fresh(self, name: str) -> bool:
        """CLIP's own weights are a start, as they were for the authors; they have no decoder."""
        return name.startswith("decoder.")

    def encode(self, batch: ExamBatch) -> Features:
        slots = (len(batch.keys), batch.num_slots)
        place_N = batch.exam_N * batch.num_slots + batch.slot_N

        def by_exam(value_NX: Tensor, empty: int = 0) -> Tensor:
            rows = value_NX.new_full((slots[0] * slots[1], *value_NX.shape[1:]), empty)
            return rows.index_copy(0, place_N, value_NX).view(*slots, *value_NX.shape[1:])

        features = {
            "image_valid": by_exam(torch.ones_like(batch.exam_N, dtype=torch.bool)),
            "modality": by_exam(batch.modality_N),
            "eye": by_exam(batch.eye_N),
            "text_valid": batch.text_valid_B,
            "text_id": batch.text_B,
            "patient": batch.patient_B,
        }
        if self.contrasts:
            features["image"] = by_exam(F.normalize(self.vision(batch.images), dim=-1))
        if RECONSTRUCTION in self.terms:
            error_N, hidden_N = self._errors(batch)
            features |= {"error": by_exam(error_N).sum(dim=1), "hidden": by_exam(hidden_N).sum(dim=1)}
        if IMAGE_TEXT in self.terms:
            features["text"] = self._text_rows(batch.token_BT, batch.mask_BT)
        return features

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        # A validation batch belongs to one rank; a training batch is spread over all of them.
        group: Group = "rank" if self.released or not self.training else None
        terms, num_rows = {}, {"images": features["image_valid"].sum()}
        if RECONSTRUCTION in self.terms:
            terms[f"loss_{RECONSTRUCTION}"] = global_mean(features["error"], features["hidden"], group)
        if IMAGE_IMAGE in self.terms:
            pairs = self._pair_rows(features)
            terms[f"loss_{IMAGE_IMAGE}"] = self._contrast(pairs, group)
            num_rows["pairs"] = pairs.num_complete
        if IMAGE_TEXT in self.terms:
            captions = self._caption_rows(features)
            terms[f"loss_{IMAGE_TEXT}"] = self._contrast(captions, group)
            num_rows["captions"] = captions.num_complete
        if self.training:
            counted = Ranks.of(group).reduce(torch.stack(list(num_rows.values())), "sum")
            self._num_rows = dict(zip(num_rows, counted, strict=True))
        return terms

    def _contrast(self, rows: Rows, group: Group) -> Tensor:
        return contrastive_loss(
            rows.first_RD,
            rows.second_RD,
            self.log_scale.exp(),
            valid_a_B=rows.valid_first_R,
            valid_b_B=rows.valid_second_R,
            mask=None if self.released else [SameId(ids_R) for ids_R in rows.alike],
            group=group,
        )

    def _pair_rows(self, features: Features) -> Rows:
        """A row for each two places of an exam, complete where their images belong together."""
        num_slots = features["image"].shape[1]
        one_Q, other_Q = torch.triu_indices(num_slots, num_slots, 1, device=features["image"].device)
        valid_BK, modality_BK, eye_BK = (features[key] for key in ("image_valid", "modality", "eye"))
        valid_BQ = valid_BK[:, one_Q] & valid_BK[:, other_Q]
        if not self.released and self.config.pairs is PairRule.cross_modality:
            valid_BQ = valid_BQ & (modality_BK[:, one_Q] != modality_BK[:, other_Q])
        if not self.released and self.config.pair_eyes is EyeRule.same:
            eye_BQ = eye_BK[:, one_Q]
            valid_BQ = valid_BQ & (eye_BQ == eye_BK[:, other_Q]) & (eye_BQ != UNKNOWN)
        # Not by `[:, of_Q]`, whose gradient CPU threads add up in no fixed order where a place comes twice.
        first_RD, second_RD = (
            features["image"].index_select(1, of_Q).flatten(0, 1) for of_Q in (one_Q, other_Q)
        )
        valid_R, patient_R = valid_BQ.flatten(), features["patient"].repeat_interleave(len(one_Q))
        return Rows(first_RD, second_RD, valid_R, valid_R, [patient_R])

    def _caption_rows(self, features: Features) -> Rows:
        """A row for each image and the text of its exam."""
        num_slots = 1 if self.released else features["image"].shape[1]
        text_RD, text_valid_R, text_R, patient_R = (
            features[key].repeat_interleave(num_slots, dim=0)
            for key in ("text", "text_valid", "text_id", "patient")
        )
        image_valid_R = features["image_valid"][:, :num_slots].flatten()
        both_R = image_valid_R & text_valid_R
        return Rows(
            features["image"][:, :num_slots].flatten(0, 1),
            text_RD,
            both_R if self.released else image_valid_R,
            both_R,
            [patient_R, text_R],
        )

    def _text_rows(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return F.normalize(self.text_head(self.text(token_BT, mask_BT)), dim=-1)

    def _errors(self, batch: ExamBatch) -> tuple[Tensor, Tensor]:
        """Each image's sum of the errors of its hidden patches, and how many these are."""
        drawn_NPX, masking = self._draw(batch)
        target_NPX = self._target(batch.images)
        error_N, hidden_N = patch_errors(drawn_NPX, target_NPX, masking.hidden_BP)
        if self.released:
            is_first_N = batch.slot_N == 0
            error_N, hidden_N = error_N * is_first_N, hidden_N * is_first_N
        return error_N, hidden_N

    def _draw(self, batch: ExamBatch) -> tuple[Tensor, Masking]:
        noise_NP = uniforms(batch.mask_seed_N, self.num_patches)
        masking = hide_patches(noise_NP, [self.num_kept])
        trunk = masked_trunk(self.vision.trunk, "model.vision.name")
        if self.released:
            return draw_as_published(trunk, self.decoder, batch.images, masking), masking
        return self.decoder(visible_tokens(trunk, batch.images, masking), masking), masking

    def _target(self, image_NCHW: Tensor) -> Tensor:
        patch_NPX = patchify(image_NCHW, self.patch_px)
        return normalised(patch_NPX) if self.config.normalise_target and not self.released else patch_NPX

    def after_step(self) -> None:
        if not self.released:
            self.log_scale.clamp_(0, math.log(self.config.temperature_max))

    def gauges(self) -> dict[str, float]:
        counted = {f"num_{name}": float(number) for name, number in self._num_rows.items()}
        scale = {"scale": float(self.log_scale.detach().exp())} if self.contrasts else {}
        return {**scale, **counted}

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        return not self.released and super().no_decay(name, parameter)

    def pictures(self, batch: ExamBatch) -> dict[str, Tensor]:
        if RECONSTRUCTION not in self.terms:
            return {}
        few = batch.pieces(_SHOWN_EXAMS)[0]
        drawn_NPX, masking = self._draw(few)
        data = self.recipe.data
        is_normalised = self.config.normalise_target and not self.released
        picture = reconstruction_picture(
            few.images, drawn_NPX, masking.hidden_BP, data.mean, data.std, normalised_target=is_normalised
        )
        return {"reconstruction": picture}

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """What the authors' own classifiers stand on: the projected class token, not normalised."""
        feature_ND: Tensor = self.vision(image_NCHW)
        return feature_ND

    def contrast_scale(self, eye: Eye) -> float:
        return float(self.log_scale.detach().exp())

    def embed_images(self, image_NCHW: Tensor, eye: Eye) -> Tensor:
        """Unit rows of single images; one space for both eyes and all modalities."""
        return F.normalize(self.vision(image_NCHW), dim=-1)

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: Eye) -> Tensor:
        """Unit rows of texts in the space of `embed_images`."""
        return self._text_rows(token_BT, mask_BT)

    def embed_exams(self, batch: ExamBatch) -> tuple[Tensor, Tensor]:
        """Unit rows of exams, each the mean direction of its images, and of their texts."""
        feature_ND = F.normalize(self.vision(batch.images), dim=-1)
        sum_BD = feature_ND.new_zeros(len(batch.keys), feature_ND.shape[1])
        sum_BD = sum_BD.index_add(0, batch.exam_N, feature_ND)
        return F.normalize(sum_BD, dim=-1), self._text_rows(batch.token_BT, batch.mask_BT)


@dataclass(frozen=True)
class Rows:
    """Two sides of a contrast, row by row; a row is complete where both are valid.

    `alike`: ids (R,), by which rows that are no candidates of each other are known.
    """

    first_RD: Tensor
    second_RD: Tensor
    valid_first_R: Tensor
    valid_second_R: Tensor
    alike: list[Tensor]

    @property
    def num_complete(self) -> Tensor:
        return (self.valid_first_R & self.valid_second_R).sum()
