"""Text towers: a BERT-family encoder whose first token speaks for the report, or CLIP's, whose last one does.

Padding is not computed: several texts share a row (`packed.py`) where that needs fewer rows. The states are
those of padded texts up to rounding. Dropout draws other numbers than over padded rows, of the same
distribution; the same seed and batch give the same ones.

Legend: B texts, T tokens, R L rows and places of packed texts, W encoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
)

from fundusfm.errors import UserError
from fundusfm.models.packed import Packed, pack
from fundusfm.recipe.schema import TextConfig, TextKind

# Known to read position ids and a mask of any shape as they are given.
_PACKABLE = ("bert", "roberta", "xlm-roberta", "camembert")
_CLIP_MODELS = ("clip", "clip_text_model")


class TextTower(nn.Module):
    """token_BT, mask_BT -> state_BW of the first token ([CLS]).

    `trunk` is the encoder of transformers itself, which computes padding too.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = int(trunk.config.hidden_size)

    @property
    def max_tokens(self) -> int | None:
        """The longest text it has positions for; None where positions come from no table."""
        table = self._position_table
        if not isinstance(table, nn.Embedding):
            return None
        return table.num_embeddings - self._first_position

    @property
    def _first_position(self) -> int:
        """The row of the position table for a first token: RoBERTa begins after that of the padding."""
        padding = getattr(self._position_table, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    @property
    def _position_table(self) -> Any:
        return getattr(getattr(self.trunk, "embeddings", None), "position_embeddings", None)

    def forward(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        packed = self._packed(token_BT, mask_BT)
        if packed is None:
            state_BTW: Tensor = self.trunk(input_ids=token_BT, attention_mask=mask_BT).last_hidden_state
            return state_BTW[:, 0]
        return packed.first(self._read(packed).last_hidden_state)

    def states(self, token_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
        """state_BTW after the embeddings and after each layer, 0 at padding."""
        packed = self._packed(token_BT, mask_BT)
        if packed is not None:
            return tuple(map(packed.padded, self._read(packed, output_hidden_states=True).hidden_states))
        read = self.trunk(input_ids=token_BT, attention_mask=mask_BT, output_hidden_states=True)
        return tuple(state_BTW.masked_fill(~mask_BT[:, :, None], 0) for state_BTW in read.hidden_states)

    def _packed(self, token_BT: Tensor, mask_BT: Tensor) -> Packed | None:
        """The texts in shared rows; None for encoders that take no mask of who attends to whom."""
        config = self.trunk.config
        takes_any_mask = config.model_type in _PACKABLE and config._attn_implementation == "sdpa"
        return pack(token_BT, mask_BT) if takes_any_mask else None

    def _read(self, packed: Packed, **options: Any) -> Any:
        return self.trunk(
            input_ids=packed.token_RL,
            position_ids=packed.position_RL + self._first_position,
            attention_mask=packed.mask_R1LL,
            **options,
        )


class ClipTextTower(TextTower):
    """token_BT, mask_BT -> state_BW of the last token but padding: it alone has read the whole text."""

    def forward(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        state_BTW: Tensor = self.trunk(input_ids=token_BT, attention_mask=mask_BT).last_hidden_state
        place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = (place_T * mask_BT).amax(dim=1)
        return state_BTW[torch.arange(len(last_B), device=last_B.device), last_B]

    @property
    def _position_table(self) -> Any:
        return getattr(getattr(self.trunk, "embeddings", None), "position_embedding", None)


def refuse_longer_texts(module: nn.Module, context_length: int) -> None:
    """UserError if a text tower within `module` has no positions for so many tokens."""
    for tower in module.modules():
        longest = tower.max_tokens if isinstance(tower, TextTower) else None
        if longest is not None and longest < context_length:
            raise UserError(
                f"texts of {context_length} tokens do not fit into a text tower of {longest} positions",
                where="data.context_length, model.text.weights",
                fix=f"set data.context_length to {longest} or less, or use a tower with more positions",
            )


def build_text(config: TextConfig, vocab_size: int) -> TextTower:
    """A random tower of this kind and size, or that at `config.weights` (a transformers folder or name)."""
    is_clip = config.kind is TextKind.clip
    if config.weights:
        trunk = _from_weights(config.weights, config.kind, vocab_size)
    else:
        trunk = _random_clip(config, vocab_size) if is_clip else _random_bert(config, vocab_size)
    if config.gradient_checkpointing:
        # Renamed in the course of transformers 5.
        enable: Any = getattr(trunk, "activation_checkpointing_enable", trunk.gradient_checkpointing_enable)
        enable()
    if is_clip:
        # At the beginning of transformers 5 the text model was wrapped once more.
        return ClipTextTower(getattr(trunk, "text_model", trunk))
    return TextTower(trunk)


def _random_bert(config: TextConfig, vocab_size: int) -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_positions,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        ),
        add_pooling_layer=False,
    )


def _random_clip(config: TextConfig, vocab_size: int) -> PreTrainedModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_positions,
            attention_dropout=config.dropout,
            hidden_act="quick_gelu",
            # Only their own pooling asks for these, which is not ours; theirs belong to CLIP's vocabulary.
            bos_token_id=0,
            eos_token_id=vocab_size - 1,
        )
    )


def _from_weights(name: str, kind: TextKind, vocab_size: int) -> PreTrainedModel:
    try:
        is_clip = AutoConfig.from_pretrained(name).model_type in _CLIP_MODELS
        if is_clip is not (kind is TextKind.clip):
            raise UserError(
                f"the weights are {'' if is_clip else 'not '}those of a CLIP text tower",
                where=f"model.text.weights: {name}",
                fix=f"set model.text.kind to {'clip' if is_clip else 'bert'}, or name other weights",
            )
        read = _read_clip if is_clip else _read_other
        trunk: PreTrainedModel = read(name)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"transformers cannot load the text tower: {error}",
            where="model.text.weights",
            fix="name a folder with config.json and weights of a BERT-family encoder or of a CLIP text tower",
        ) from error
    if trunk.config.vocab_size < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the text tower only {trunk.config.vocab_size}",
            where="data.tokenizer, model.text.weights",
            fix="use the tokenizer that came with the weights",
        )
    trunk.train()  # transformers hands it over without dropout
    return trunk


def _read_other(name: str) -> Any:
    return AutoModel.from_pretrained(name, add_pooling_layer=False)


def _read_clip(name: str) -> Any:
    loaded: Any = CLIPTextModel.from_pretrained(name, output_loading_info=True)
    trunk, told = loaded
    if missing := sorted(told["missing_keys"]):  # else they would start from random values without a word
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return trunk
