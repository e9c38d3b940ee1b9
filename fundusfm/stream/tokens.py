"""Texts to tokens: by any tokenizer of transformers, or by one of `vocabulary.py`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fundusfm.errors import UserError
from fundusfm.stream.vocabulary import MASK, SPECIAL, clean

_CHINESE = "[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]"  # characters and their punctuation
_GAP_IN_CHINESE = re.compile(rf"(?<={_CHINESE}) +| +(?={_CHINESE})")


class Tokens:
    """Texts -> token_BT, mask_BT: a start token, the text cut to `context_length`, padding to the longest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self._tokenizer, self._context_length = tokenizer, context_length
        self.vocab_size = len(tokenizer)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Word -> number."""
        return dict(self._tokenizer.get_vocab())

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self._encode(texts)
        return encoded["input_ids"].to(torch.long), encoded["attention_mask"].to(torch.bool)

    def with_words(self, texts: list[str], *, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """token_BT, mask_BT and word_BT: of which word, counted from 0, a token is a piece; -1 of none.

        `padded`: always to `context_length`, whatever the longest text.
        """
        encoded = self._encode(texts, "max_length" if padded else "longest")
        words = [[-1 if word is None else word for word in encoded.word_ids(b)] for b in range(len(texts))]
        return (
            encoded["input_ids"].to(torch.long),
            encoded["attention_mask"].to(torch.bool),
            torch.tensor(words),
        )

    @property
    def mask_id(self) -> int:
        """The token that takes the place of a hidden one; UserError if there is none."""
        found: int | None = self._tokenizer.mask_token_id
        if found is None:
            raise UserError("the tokenizer has no [MASK] token to hide words with", where="data.tokenizer")
        return found

    @property
    def ends(self) -> tuple[int, int]:
        """The tokens before and after every text; UserError if there is none after it."""
        begin, end = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        if end is None:
            raise UserError("the tokenizer has no [SEP] token to end a report with", where="data.tokenizer")
        return begin, end

    def text_of(self, tokens: list[int]) -> str:
        """Tokens as a person reads them, special ones left out; Chinese without gaps."""
        return _GAP_IN_CHINESE.sub("", str(self._tokenizer.decode(tokens, skip_special_tokens=True)))

    def _encode(self, texts: list[str], padding: str = "longest") -> Any:
        return self._tokenizer(
            [clean(text) for text in texts],
            padding=padding,
            split_special_tokens=True,  # "[SEP]" in a report is text like any other
            truncation=True,
            max_length=self._context_length,
            return_tensors="pt",
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer as a transformers folder; OSError if it cannot be written."""
        try:
            self._tokenizer.save_pretrained(str(folder))
        except Exception as error:
            if type(error) is Exception:  # all that the tokenizers library says of a full disk
                raise OSError(str(error)) from error
            raise


class NoTokens(Tokens):
    """What an objective that reads no text has in place of a tokenizer."""

    def __init__(self) -> None:
        self.vocab_size = 0

    @property
    def vocabulary(self) -> dict[str, int]:
        return {}

    def save(self, folder: Path) -> None:
        """There is nothing to save."""


def load_tokens(name: str | None, context_length: int) -> Tokens:
    """A tokenizer by file (of `tokens train`), folder or transformers name; UserError if it cannot load.

    None, which only a recipe without text has, gives one that nobody may call.
    """
    if name is None:
        return NoTokens()
    # Forked loader workers and the tokenizer's own threads do not mix.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = _from_file(name) if name.endswith(".json") else _from_transformers(name)
    except UserError:
        raise
    except Exception as error:  # the libraries raise a plain Exception for a malformed file
        raise UserError(
            f"the tokenizer cannot be loaded: {error}",
            where=f"data.tokenizer: {name}",
            fix="train one with `fundusfm tokens train`, or name a transformers folder",
        ) from error
    _check_special(tokenizer, name)
    return Tokens(tokenizer, context_length)


def _check_special(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Towers read out the first or the last token of a text, so it must begin and end with one of its own."""
    where = f"data.tokenizer: {name}"
    has_start = tokenizer.cls_token is not None or tokenizer.bos_token is not None  # of BERT, of CLIP
    if not has_start or tokenizer.pad_token is None:
        raise UserError("the tokenizer has no [CLS] or no [PAD] token", where=where)
    framed: Any = tokenizer("")
    if len(framed["input_ids"]) < 2:
        raise UserError("the tokenizer puts no start and end token around a text", where=where)


def _from_transformers(name: str) -> PreTrainedTokenizerBase:
    # A path that exists is no name on the hub, where looking it up takes a minute without a network.
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, local_files_only=Path(name).exists()
    )
    return tokenizer


def _from_file(name: str) -> PreTrainedTokenizerFast:
    if not Path(name).is_file():
        raise UserError(
            "there is no such tokenizer file",
            where=f"data.tokenizer: {name}",
            fix="make it with `fundusfm tokens train`",
        )
    tokens: Any = {**SPECIAL, "mask_token": MASK}
    return PreTrainedTokenizerFast(tokenizer_file=name, **tokens)  # type: ignore[no-untyped-call]
