"""What masked models share: an encoder of visible patches, a decoder of hidden ones, and what is compared.

Legend: B images, P patches, S W tokens of the encoder and their width, X numbers in a patch, C H channels and
pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.losses import global_mean, patch_errors
from fundusfm.losses.ranks import Group
from fundusfm.models.decoder import PatchDecoder, initialise
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
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Objective, warmup_cosine
from fundusfm.objectives.cached import Features
from fundusfm.objectives.pictures import reconstruction_picture
from fundusfm.recipe.schema import Fidelity, Negatives, ObjectiveConfig, Recipe
from fundusfm.stream.hashing import uniforms
from fundusfm.stream.view_image import SingleImageBatch

_SHOWN_IMAGES = 6


@dataclass
class MaskedConfig(ObjectiveConfig):
    """What masked models share.

    `mask_ratio`: share of patches hidden, `mask_ratio_by_modality`: modality -> another one;
    `normalise_target`: redraw each patch at mean 0 and deviation 1 instead of its pixels; `decoder_*`: sizes
    of the decoder, which is thrown away after training.
    """

    mask_ratio: float = 0.75
    mask_ratio_by_modality: dict[str, float] = field(default_factory=dict)
    normalise_target: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def impossible(self) -> dict[str, str]:
        ratios = {"mask_ratio": self.mask_ratio}
        ratios |= {f"mask_ratio_by_modality.{name}": r for name, r in self.mask_ratio_by_modality.items()}
        wrong = {key: f"{r} must be above 0 and below 1" for key, r in ratios.items() if not 0 < r < 1}
        if self.negatives is Negatives["micro"]:
            wrong["negatives"] = "micro has no effect: nothing is contrasted; leave it global"
        sizes = {k: getattr(self, k) for k in ("decoder_width", "decoder_depth", "decoder_heads")}
        wrong |= {key: f"{size} must be at least 1" for key, size in sizes.items() if size < 1}
        if not wrong and (self.decoder_width % 4 or self.decoder_width % self.decoder_heads):
            wrong["decoder_width"] = (
                f"{self.decoder_width} must be divisible by 4 and by decoder_heads = {self.decoder_heads}"
            )
        return wrong

    def ratios(self, modalities: list[str]) -> list[float]:
        """The mask ratio of each modality; UserError for one that is not read."""
        own = {name.lower(): ratio for name, ratio in self.mask_ratio_by_modality.items()}
        if unread := own.keys() - {name.lower() for name in modalities}:
            raise UserError(
                f"data.modalities does not name {', '.join(sorted(unread))}",
                where="objective.mask_ratio_by_modality",
                fix="name it there, or take it out here",
            )
        return [own.get(name.lower(), self.mask_ratio) for name in modalities]


class MaskedObjective(Objective):
    """Base of objectives that redraw hidden patches. A subclass may add terms of its own.

    `target_scale`: how many times larger the pictures that are redrawn are than those that the encoder sees;
    `compressed`: which table of positions, see `sincos_table`; `draws`: whether there is a decoder at all.
    """

    aligns_text = False
    aligned_positions = False

    def __init__(
        self, recipe: Recipe, *, target_scale: int = 1, compressed: bool = False, draws: bool = True
    ) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, MaskedConfig)
        self.masked: MaskedConfig = recipe.objective
        self.released = self.masked.fidelity is Fidelity.released
        self.vision = build_vision(recipe.model.vision, recipe.data.image_size, None)
        trunk = masked_trunk(self.vision.trunk, "model.vision.name")
        self.side = trunk.patch_embed.grid_size[0]
        self.patch_px = target_scale * trunk.patch_embed.patch_size[0]
        self.kept = _kept(self.masked.ratios(recipe.data.modalities), self.side**2)
        _fix_positions(trunk, fresh=recipe.model.vision.weights is None, compressed=compressed)
        if draws:
            table_LV = sincos_table(self.masked.decoder_width, self.side, compressed=compressed).float()
            self.decoder = PatchDecoder(
                trunk.embed_dim,
                table_LV,
                3 * self.patch_px**2,
                depth=self.masked.decoder_depth,
                heads=self.masked.decoder_heads,
            )
        self.draws = draws

    @property
    def trunk(self) -> VisionTransformer:
        return cast(VisionTransformer, self.vision.trunk)

    def may_be_fresh(self, name: str) -> bool:
        """An encoder without its decoder is a start: the published files for downstream use hold no more."""
        return name.startswith("decoder.")

    def small(self, image_BCHW: Tensor) -> Tensor:
        """What the encoder sees of the images that are to be redrawn."""
        return image_BCHW

    def masking(self, batch: SingleImageBatch) -> Masking:
        """Which patches are hidden: a matter of each sample, whatever batch it is in."""
        return hide_patches(uniforms(batch.mask_seed_B, self.side**2), self.kept, batch.modality_B)

    def target(self, image_BCHW: Tensor) -> Tensor:
        """What the decoder should draw (B, P, X)."""
        patch_BPX = patchify(image_BCHW, self.patch_px)
        return normalised(patch_BPX) if self.masked.normalise_target else patch_BPX

    def patch_features(self, token_BSW: Tensor, masking: Masking, image_BCHW: Tensor) -> Features:
        """By row: the errors of its hidden patches, and how many these are."""
        drawn_BPX = self.decoder(token_BSW, masking)
        error_B, count_B = patch_errors(drawn_BPX, self.target(image_BCHW), masking.hidden_BP)
        return {"patch_error": error_B, "patch_count": count_B}

    def patch_term(self, features: Features) -> Tensor:
        """Mean over the hidden patches of all ranks. Collective."""
        return global_mean(features["patch_error"], features["patch_count"], self.group)

    @property
    def group(self) -> Group:
        """A validation batch belongs to one rank; a training batch is spread over all of them."""
        return None if self.training else "rank"

    def pictures(self, batch: SingleImageBatch) -> dict[str, Tensor]:
        if not self.draws:
            return {}
        few = batch.pieces(_SHOWN_IMAGES)[0]
        masking = self.masking(few)
        drawn_BPX = self.decoder(visible_tokens(self.trunk, self.small(few.images), masking), masking)
        data = self.recipe.data
        picture = reconstruction_picture(
            few.images,
            drawn_BPX,
            masking.hidden_BP,
            data.mean,
            data.std,
            normalised_target=self.masked.normalise_target,
        )
        return {"reconstruction": picture}

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """Mean of the patch tokens of the whole image, as the authors' classifiers pool them."""
        token_NSF: Tensor = self.trunk.forward_features(image_NCHW)
        return token_NSF[:, self.trunk.num_prefix_tokens :].mean(dim=1)

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        # The published rule spares vectors only.
        return parameter.ndim <= 1 if self.released else super().no_decay(name, parameter)

    def rate_factor(self) -> Callable[[float], float]:
        first = 0 if self.released else 1
        return warmup_cosine(self.recipe.optim, self.total_steps, first=first)


def _kept(ratios: Sequence[float], num_patches: int) -> list[int]:
    kept = [num_kept(num_patches, ratio) for ratio in ratios]
    if min(kept) < 1 or max(kept) >= num_patches:
        raise UserError(
            f"of {num_patches} patches a mask ratio leaves {min(kept)} to {max(kept)} visible: some must be, "
            "and some hidden",
            where="objective.mask_ratio",
            fix="change the ratio, or choose smaller patches (model.vision) or larger images",
        )
    return kept


def _fix_positions(trunk: VisionTransformer, *, fresh: bool, compressed: bool) -> None:
    """Positions become a fixed table: of sines in a `fresh` trunk, which starts as MAE does; else its own."""
    if fresh:
        if trunk.embed_dim % 4:
            raise UserError(
                f"a fixed table of positions needs a width divisible by 4, not {trunk.embed_dim}",
                where="model.vision.options: embed_dim",
            )
        initialise(trunk)
        nn.init.normal_(trunk.cls_token, std=0.02)
        side = trunk.patch_embed.grid_size[0]
        table_PD = sincos_table(trunk.embed_dim, side, compressed=compressed).float()
        with torch.no_grad():
            trunk.pos_embed.copy_(table_PD[-trunk.pos_embed.shape[1] :])
    trunk.pos_embed.requires_grad_(False)
