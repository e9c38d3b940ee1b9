"""A tokenizer of the cohort's own reports; imports no torch, which takes as long to load as this to train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fundusfm.errors import UserError, plain_write_errors
from fundusfm.shards.index import ShardIndex, write_atomically
from fundusfm.stream.texts import iterate_texts

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
MASK = "[MASK]"
_STRAIGHT_QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"'})


def clean(text: str) -> str:
    """Curly double quotes made straight, as RET-CLIP does; lower-casing belongs to the tokenizer."""
    return text.translate(_STRAIGHT_QUOTES)


def train_tokenizer(shards: list[str], out: Path, *, vocab_size: int = 8000) -> int:
    """Train a lower-casing WordPiece vocabulary on the train split's texts of `shards`; returns its size.

    Chinese is split by character, as BERT does. Special tokens come first, [PAD] is 0.
    """
    special = [*SPECIAL.values(), MASK]
    learner = _around({})
    # The trainer numbers inner letters in the order of a hash table, which differs from run to run, and
    # breaks ties between merges by number. Letters that are given to it beforehand keep their order.
    letters = sorted(_inner_letters(learner, _training_texts(shards)))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*special, *letters], show_progress=False
    )
    learner.train_from_iterator(_training_texts(shards), trainer)
    tokenizer = _around(learner.get_vocab())
    tokenizer.add_special_tokens(special)
    cls_sep = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=cls_sep)
    size = int(tokenizer.get_vocab_size())
    if size <= len(special):
        raise UserError(
            "no text to train a tokenizer on",
            where=", ".join(shards),
            fix="name a prompt dictionary in the dataset card, or give shards with reports",
        )
    with plain_write_errors("the tokenizer", out, "give another file with --out, or free some space"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, tokenizer.to_str(pretty=True).encode())
    return size


def _around(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _inner_letters(tokenizer: Tokenizer, texts: Iterable[str]) -> set[str]:
    """`##x` for each letter x that stands inside a word."""
    found: set[str] = set()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            found.update(word[1:])
    return {f"##{letter}" for letter in found}


def _training_texts(shards: list[str]) -> Iterator[str]:
    for root in shards:
        for text in iterate_texts(ShardIndex.load(root), "train"):
            yield clean(text)
