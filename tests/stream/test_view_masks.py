"""What is hidden belongs to the sample: no rank, worker, batch size or world size has a say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.hashing import uniforms
from fundusfm.stream.loader import EvalStream, TrainStream, World
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.tokens import NoTokens, load_tokens
from fundusfm.stream.view_image import ImageOnlyView
from fundusfm.stream.view_prompt import ImagePromptView, TextSource
from tests.conftest import Cohort

BATCH = 8


def _config(cohort: Cohort) -> DataConfig:
    return DataConfig(tokenizer=str(cohort.tokenizer), image_size=24, context_length=48)


def _view(cohort: Cohort, kind: str, **options: Any) -> Any:
    config = _config(cohort)
    if kind == "image":
        return ImageOnlyView(config)
    tokens = load_tokens(config.tokenizer, config.context_length)
    return ImagePromptView(config, tokens, {}, **options)


def _reader(cohort: Cohort, split: str, view: Any) -> ShardReader:
    return ShardReader(ShardIndex.load(cohort.shards), split, view, ShardCache(cohort.shards.parent / "c", 0))


def _train(cohort: Cohort, view: Any, world: World) -> TrainStream[Any, Any]:
    reader = _reader(cohort, "train", view)
    return TrainStream([(reader, 1.0)], view, seed=5, batch_size=BATCH, window=2, world=world)


@pytest.mark.parametrize("kind", ["image", "prompt"])
def test_training__drawn_for_the_place_in_the_stream(synth_cohort: Cohort, kind: str) -> None:
    view = _view(synth_cohort, kind)
    whole = _train(synth_cohort, view, World())
    shares = [_train(synth_cohort, view, World(rank, 4)) for rank in range(4)]
    seeds = [whole[number].mask_seed_B for number in (0, 3, 40)]
    for number, seed_B in zip((0, 3, 40), seeds, strict=True):
        assert torch.cat([share[number].mask_seed_B for share in shares]).equal(seed_B)
    # The same exams come again after some batches; what is hidden of them is drawn anew.
    assert len({int(seed) for seed_B in seeds for seed in seed_B}) == 3 * BATCH


@pytest.mark.parametrize("kind", ["image", "prompt"])
def test_evaluation__always_the_same_of_an_image(synth_cohort: Cohort, kind: str) -> None:
    def by_exam(size: int, ranks: int) -> dict[str, int]:
        view = _view(synth_cohort, kind)
        reader = _reader(synth_cohort, "val", view)
        streams = [
            EvalStream(reader, view, batch_size=size, world=World(rank, ranks)) for rank in range(ranks)
        ]
        batches = [stream[number] for stream in streams for number in range(len(stream))]
        return {k: int(s) for b in batches for k, s in zip(b.keys, b.mask_seed_B, strict=True)}

    found = by_exam(2, 1)
    assert found == by_exam(5, 2)
    assert len(set(found.values())) == len(found) > 3


def test_noise__uniform_and_of_each_seed_its_own() -> None:
    seed_N = torch.tensor([0, 1, 2**63 - 1, 77])
    noise_NP = uniforms(seed_N, 4096)
    assert uniforms(seed_N[1:], 100).equal(noise_NP[1:, :100])
    for row in noise_NP.numpy():
        share, _ = np.histogram(row, bins=8, range=(0, 1))
        assert (np.abs(share - 512) < 5 * np.sqrt(512)).all()
    correlation = np.corrcoef(noise_NP.numpy()) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


def test_no_sentences__no_tokenizer_is_asked(synth_cohort: Cohort) -> None:
    """As `text_weight: 0` wants it: a recipe without a tokenizer, and shards without labels or texts."""
    view = ImagePromptView(_config(synth_cohort), NoTokens(), {}, scale=2, source=None)
    reader = _reader(synth_cohort, "val", view)
    batch = EvalStream(reader, view, batch_size=3, world=World())[0]
    assert batch.token_BT.shape == batch.mask_BT.shape == batch.word_BT.shape == (3, 0)
    assert not batch.text_valid_B.any()
    assert batch.images.shape == (3, 3, 48, 48)
    assert [len(piece.keys) for piece in batch.pieces(2)] == [2, 1]


def test_padded__always_to_the_context_length(synth_cohort: Cohort) -> None:
    for padded in (False, True):
        view = _view(synth_cohort, "prompt", source=TextSource.labels, padded=padded)
        batch = EvalStream(_reader(synth_cohort, "val", view), view, batch_size=3, world=World())[0]
        assert (batch.token_BT.shape[1] == 48) is padded
        assert (batch.word_BT[~batch.mask_BT] == -1).all()
