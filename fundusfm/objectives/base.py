"""What every objective shares: weighted loss terms, logging, optimiser groups, schedule, seeded randomness.

An objective builds its towers, names its view and returns loss terms. It never sees ranks, shards or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fundusfm.objectives.cached import Features, cached_loss, differentiate
from fundusfm.objectives.rates import rate_scales
from fundusfm.recipe.schema import Negatives, ObjectiveConfig, OptimConfig, Recipe
from fundusfm.stream.hashing import hash_words

Eye = Literal["left", "right", ""]
_DROPOUT, _VALIDATION = 11, 12  # what a seed is for; part of the hash


class Objective(pl.LightningModule):
    """Base of all objectives; subclasses set `Config` and `view`, and write `encode` and `terms_of`.

    `aligns_text`: whether images and texts share a space, so that `embed_images`, `embed_texts` and
    `embed_exams` can be asked. `unit_prototypes`: whether the mean of a label's prompts is made a unit row.
    `writes_reports`: whether `write_reports` can be asked. `aligned_positions`: how position tables of weight
    files are moved to another grid, see `resize_positions`. `fresh`: what `model.weights` had nothing for.
    `unused`: names of the parameters that no term needs. `cuts_gradients`: whether `cut_gradients` does
    anything; not under ZeRO, where parameters do not hold their gradients.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    view: ClassVar[str]
    aligns_text: bool = True
    unit_prototypes: bool = True
    writes_reports: bool = False
    aligned_positions: bool = True
    cuts_gradients: bool = False

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.total_steps = recipe.trainer.max_steps or 1
        self.last_loss: Tensor | None = None
        self.fresh: list[str] = []
        self.unused: frozenset[str] = frozenset()
        self.differentiate: Callable[[Tensor], None] = differentiate  # strategies put theirs here

    def leave_out(self, parts: Iterable[nn.Module | nn.Parameter | None]) -> None:
        """Do not train what no term needs: data parallelism wants a gradient of every trained parameter."""
        left_out: set[int] = set()
        for part in parts:
            if part is not None:
                left_out |= {id(p) for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())}
                part.requires_grad_(False)
        self.unused |= {name for name, p in self.named_parameters() if id(p) in left_out}

    def may_be_fresh(self, name: str) -> bool:
        """Whether a weight file to start from may lack a parameter, which then starts at random."""
        return False

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a weight file to start from holds, brought to this model's sizes where that is allowed."""
        return dict(state)

    def encode(self, batch: Any) -> Features:
        """Everything that `terms_of` needs, as named tensors of one row an exam. No collective of its own.

        Calls each part of a tower equally often whatever is in the batch: where parameters are spread over
        ranks, all fetch them together, in these calls.
        """
        raise NotImplementedError

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        """Named scalar losses over the global batch, the same on every rank. Collective.

        Sees features only, never the batch: so any objective can be trained in micro-batches.
        """
        raise NotImplementedError

    def loss_terms(self, batch: Any) -> dict[str, Tensor]:
        """Named scalar losses of a batch. Collective."""
        return self.terms_of(self.encode(batch))

    def term_weights(self) -> Mapping[str, float]:
        """Weight of each term in the sum that is minimised."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimiser step: the place for clamps."""

    def cut_gradients(self) -> None:
        """Called before the norm of all gradients is clipped, if `cuts_gradients`."""

    def gauges(self) -> dict[str, float]:
        """Numbers worth watching besides the losses, such as temperatures."""
        return {}

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """What to look at, by name: pictures (3, H, W) in [0, 1] of a few exams. No collective."""
        return {}

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """Features (N, F) of single images for probes."""
        raise NotImplementedError

    def embed_images(self, image_NCHW: Tensor, eye: Eye) -> Tensor:
        """Unit rows (N, D) of single images, comparable with `embed_texts` of the same eye."""
        raise NotImplementedError

    def contrast_scale(self, eye: Eye) -> float:
        """What cosines of `embed_images` and `embed_texts` are multiplied by; unless told, CLIP's limit."""
        return 100.0

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: Eye) -> Tensor:
        """Unit rows (B, D) of texts."""
        raise NotImplementedError

    def embed_exams(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Unit rows of a batch's images and of its reports, both (B, D). No collective."""
        raise NotImplementedError

    def write_reports(self, image_NCHW: Tensor, begin: int, end: int) -> list[list[int]]:
        """The tokens of a report about each image, without the tokenizer's `begin` and `end`."""
        raise NotImplementedError

    def total_loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the terms."""
        weights = self.term_weights()
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        size = self.recipe.data.micro_batch_size
        pieces = [batch] if size is None else batch.pieces(size)
        if size is not None:
            self.zero_grad(set_to_none=True)  # the loop would do so after this, when most gradients are there
        if len(pieces) == 1:
            self._reseed(0)
            terms = self.loss_terms(batch)
            loss = remainder = self.total_loss(terms)
        else:
            terms, loss, remainder = self._step_in_pieces(pieces)
        self.last_loss = loss.detach()
        self.log_dict({"train/loss": loss.detach(), **{f"train/{k}": v.detach() for k, v in terms.items()}})
        return remainder

    def _step_in_pieces(self, pieces: list[Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Terms, loss, and what is still to be differentiated; all pieces but the last have been."""
        if self.recipe.objective.negatives is Negatives["micro"]:
            return self._step_piece_by_piece(pieces)
        terms: dict[str, Tensor] = {}

        def loss_of(features: Features) -> Tensor:
            terms.update(self.terms_of(features))
            return self.total_loss(terms)

        return terms, *cached_loss(
            pieces, self.encode, loss_of, self._reseed, self.parameters(), self.differentiate
        )

    def _step_piece_by_piece(self, pieces: list[Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Means over pieces, each contrasted within itself."""
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces):
            self._reseed(number)
            terms = self.loss_terms(piece)
            share = self.total_loss(terms) / len(pieces)
            sums = {name: sums.get(name, 0) + term.detach() / len(pieces) for name, term in terms.items()}
            if number < len(pieces) - 1:
                self.differentiate(share)
        return sums, self.total_loss(sums), share

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The gradients of a step in pieces are there before Lightning clears them; `training_step` did."""
        if self.recipe.data.micro_batch_size is None:
            super().optimizer_zero_grad(*args, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Batches are dealt to ranks in turn, so this number is the batch's on any number of ranks.
        number = batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(hash_words(self.recipe.seed, _VALIDATION, number) >> 1)
        terms = self.loss_terms(batch)
        named = {"val/loss": self.total_loss(terms), **{f"val/{k}": v for k, v in terms.items()}}
        counted = 0 if batch.padding else len(batch.keys)
        self.log_dict(named, batch_size=counted, sync_dist=True)

    def _reseed(self, piece: int) -> None:
        """Random state as a function of seed, step, rank and piece: nothing of it needs to be saved."""
        words = (self.recipe.seed, _DROPOUT, self.global_step, self.global_rank, piece)
        torch.manual_seed(hash_words(*words) >> 1)

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay spares a parameter: vectors (norms, biases, temperatures), position tables."""
        return parameter.ndim <= 1 or name.rpartition(".")[2] in ("pos_embed", "cls_token", "mask_token")

    def optimiser_groups(self) -> list[dict[str, Any]]:
        """The trained parameters by rate, the highest first, and each rate's with and without weight decay.

        There is one rate unless `optim.layer_decay` is below 1. No group is empty: ZeRO would drop it.
        """
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        optim = self.recipe.optim
        scales = rate_scales(trained, optim.layer_decay) if optim.layer_decay < 1 else {}
        groups = []
        for scale in sorted({scales.get(name, 1.0) for name in trained}, reverse=True):
            own = {n: p for n, p in trained.items() if scales.get(n, 1.0) == scale}
            spared = {n for n, p in own.items() if self.no_decay(n, p)}
            for is_spared in (False, True):
                params = [p for n, p in own.items() if (n in spared) is is_spared]
                decay = 0.0 if is_spared else optim.weight_decay
                if params:
                    groups.append({"params": params, "weight_decay": decay, "lr": scale * optim.lr})
        return groups

    def configure_optimizers(self) -> Any:
        config = self.recipe.optim
        optimiser = torch.optim.AdamW(
            self.optimiser_groups(), lr=config.lr, betas=config.betas, eps=config.eps
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate_factor())
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate_factor(self) -> Callable[[int], float]:
        """Step -> factor of the learning rate."""
        return warmup_cosine(self.recipe.optim, self.total_steps)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.cuts_gradients:
            self.cut_gradients()
        super().configure_gradient_clipping(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.after_step()


def warmup_cosine(config: OptimConfig, total_steps: int, *, first: float = 1) -> Callable[[float], float]:
    """Step -> factor of the learning rate: linear warm-up, a hold, a cosine to `min_lr` at `total_steps`.

    `first`: the stair of the warm-up that step 0 stands on; with 0 it learns nothing.
    """
    warmup = config.warmup_steps
    floor = config.min_lr / config.lr
    hold = warmup + round(config.hold_fraction * (total_steps - warmup))

    def factor(step: float) -> float:
        if step < warmup:
            return (step + first) / warmup
        share = 0.5 * (1 + math.cos(math.pi * max(0, step - hold) / max(1, total_steps - hold)))
        return floor + (1 - floor) * share

    return factor
