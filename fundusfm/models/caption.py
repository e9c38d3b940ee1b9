"""A transformer that reads the patches of an image and writes a report about it, token by token.

The encoder-decoder of KeepFIT-FFA (that of R2Gen without its memory): norms before attention, one more at the
end of each side, patches through a linear layer, words as embeddings times the root of the width, sines and
cosines for places.

Legend: B images, P patches, F their width, T tokens, W width, H heads, K width of a head, V vocabulary, R
rows of a search (beams of all images).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
_LONGEST_WAVE = 10000.0


@dataclass(frozen=True)
class CaptionSizes:
    """`unbiased_norm`: norms divide by the unbiased deviation, with epsilon outside the root.

    `place_patches`: the encoder is told where a patch lies in the grid, row by row.
    """

    layers: int = 3
    width: int = 512
    heads: int = 8
    mlp_width: int = 512
    dropout: float = 0.1
    patch_dropout: float = 0.5
    unbiased_norm: bool = False
    place_patches: bool = True


class UnbiasedNorm(nn.Module):
    """(x - mean) / (deviation + epsilon), where the deviation divides by one less than the width."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        return self.weight * (x - mean) / (deviation + self._eps) + self.bias


class Attention(nn.Module):
    """Attention with several heads; keys and values are made apart, so that a search can keep them."""

    def __init__(self, sizes: CaptionSizes) -> None:
        super().__init__()
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(sizes.width, sizes.width) for _ in range(4))

    def remember(self, source_BTW: Tensor) -> KeyValue:
        """Keys and values (B, H, T, K) of what is attended to."""
        return self._split(self.key(source_BTW)), self._split(self.value(source_BTW))

    def forward(self, x_BTW: Tensor, remembered: KeyValue, *, causal: bool = False) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        query_BHTK = self._split(self.query(x_BTW))
        mixed_BHTK = F.scaled_dot_product_attention(
            query_BHTK, *remembered, dropout_p=dropout, is_causal=causal
        )
        out_BTW: Tensor = self.out(rearrange(mixed_BHTK, "b h t k -> b t (h k)"))
        return out_BTW

    def _split(self, x_BTW: Tensor) -> Tensor:
        return rearrange(x_BTW, "b t (h k) -> b h t k", h=self.heads)


class EncoderLayer(nn.Module):
    """Patches look at each other, then each is changed by itself."""

    def __init__(self, sizes: CaptionSizes) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(sizes), _mlp(sizes)
        self.norms = nn.ModuleList(_norm(sizes) for _ in range(2))
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x_BPW: Tensor) -> Tensor:
        normal_BPW = self.norms[0](x_BPW)
        x_BPW = x_BPW + self.drop(self.attention(normal_BPW, self.attention.remember(normal_BPW)))
        out_BPW: Tensor = x_BPW + self.drop(self.mlp(self.norms[1](x_BPW)))
        return out_BPW


class DecoderLayer(nn.Module):
    """Words look at earlier words, then at the patches, then each is changed by itself."""

    def __init__(self, sizes: CaptionSizes) -> None:
        super().__init__()
        self.words, self.patches, self.mlp = Attention(sizes), Attention(sizes), _mlp(sizes)
        self.norms = nn.ModuleList(_norm(sizes) for _ in range(3))
        self.drop = nn.Dropout(sizes.dropout)

    def forward(
        self, x_BTW: Tensor, patches: Tensor | KeyValue, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """With `past`, keys and values of earlier words: x is the one word after them. Returns them grown.

        `patches`: as encoded (B, P, W), or a search's keys and values of them. In training these are made
        here, since a strategy that spreads a layer's parameters fetches them for this call alone.
        """
        if isinstance(patches, Tensor):
            patches = self.patches.remember(patches)
        normal_BTW = self.norms[0](x_BTW)
        words = self.words.remember(normal_BTW)
        if past is not None:
            words = (torch.cat([past[0], words[0]], dim=2), torch.cat([past[1], words[1]], dim=2))
        x_BTW = x_BTW + self.drop(self.words(normal_BTW, words, causal=past is None))
        x_BTW = x_BTW + self.drop(self.patches(self.norms[1](x_BTW), patches))
        return x_BTW + self.drop(self.mlp(self.norms[2](x_BTW))), words


@dataclass(frozen=True)
class WritingState:
    """Kept between two words of a search: by layer, keys and values of patches and of earlier words."""

    patches: tuple[KeyValue, ...]
    past: tuple[KeyValue | None, ...]
    place: int

    def rows(self, row_R: Tensor) -> WritingState:
        """The words of other rows; these must be of the same images, whose patches stay."""
        moved = [None if past is None else (past[0][row_R], past[1][row_R]) for past in self.past]
        return replace(self, past=tuple(moved))


class Captioner(nn.Module):
    """patch_BPF and token_BT -> logits of the token after each."""

    def __init__(self, feature_width: int, vocab_size: int, sizes: CaptionSizes) -> None:
        super().__init__()
        self._sizes = sizes
        self.embed = nn.Embedding(vocab_size, sizes.width)
        self.encoder = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.layers))
        self.decoder = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.layers))
        self.encoder_norm, self.decoder_norm = _norm(sizes), _norm(sizes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.read = nn.Sequential(
            nn.Linear(feature_width, sizes.width), nn.ReLU(), nn.Dropout(sizes.patch_dropout)
        )
        self.output = nn.Linear(sizes.width, vocab_size)
        self.drop = nn.Dropout(sizes.dropout)

    def encode(self, patch_BPF: Tensor) -> Tensor:
        """memory_BPW, the patches as the decoder sees them."""
        x_BPW = self.read(patch_BPF)
        if self._sizes.place_patches:
            x_BPW = x_BPW + waves(x_BPW, 0)
        for layer in self.encoder:
            x_BPW = layer(x_BPW)
        memory_BPW: Tensor = self.encoder_norm(x_BPW)
        return memory_BPW

    def states(self, token_BT: Tensor, memory_BPW: Tensor) -> Tensor:
        """state_BTW, from which `output` reads the token after each; no state knows a later token."""
        num_layers = len(self.decoder)
        return self._decode(token_BT, [memory_BPW] * num_layers, [None] * num_layers, 0)[0]

    def begin(self, patch_BPF: Tensor, rows_per_image: int) -> WritingState:
        """The start of a search with so many rows an image."""
        memory_BPW = self.encode(patch_BPF)
        remembered = [layer.patches.remember(memory_BPW) for layer in self.decoder]  # type: ignore[union-attr, operator]
        repeated = tuple(
            (k.repeat_interleave(rows_per_image, 0), v.repeat_interleave(rows_per_image, 0))
            for k, v in remembered
        )
        return WritingState(repeated, (None,) * len(repeated), 0)

    def step(self, token_R: Tensor, state: WritingState) -> tuple[Tensor, WritingState]:
        """Log-probabilities (R, V) of the token after `token_R`, and the state that has seen it."""
        state_R1W, past = self._decode(token_R[:, None], state.patches, state.past, state.place)
        log_RV = self.output(state_R1W[:, 0]).float().log_softmax(dim=-1)
        return log_RV, replace(state, past=tuple(past), place=state.place + 1)

    def _decode(
        self,
        token_BT: Tensor,
        patches: Sequence[Tensor | KeyValue],
        past: Sequence[KeyValue | None],
        place: int,
    ) -> tuple[Tensor, list[KeyValue]]:
        x_BTW = self.embed(token_BT) * math.sqrt(self._sizes.width)
        x_BTW, words = self.drop(x_BTW + waves(x_BTW, place)), []
        for layer, patch, earlier in zip(self.decoder, patches, past, strict=True):
            x_BTW, seen = layer(x_BTW, patch, earlier)
            words.append(seen)
        return self.decoder_norm(x_BTW), words


def waves(x_BTW: Tensor, first: int) -> Tensor:
    """Sines and cosines in turn (T, W) of the places from `first` on, of the type and device of `x_BTW`."""
    num_places, width = x_BTW.shape[1:]
    place_T = torch.arange(first, first + num_places, device=x_BTW.device, dtype=torch.float64)
    even_w = torch.arange(0, width, 2, device=x_BTW.device, dtype=torch.float64)
    angle_Tw = place_T[:, None] * _LONGEST_WAVE ** (-even_w / width)
    return torch.stack([angle_Tw.sin(), angle_Tw.cos()], dim=-1).flatten(1)[:, :width].to(x_BTW.dtype)


def _norm(sizes: CaptionSizes) -> nn.Module:
    return UnbiasedNorm(sizes.width) if sizes.unbiased_norm else nn.LayerNorm(sizes.width, eps=1e-6)


def _mlp(sizes: CaptionSizes) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(sizes.width, sizes.mlp_width),
        nn.ReLU(),
        nn.Dropout(sizes.dropout),
        nn.Linear(sizes.mlp_width, sizes.width),
    )
