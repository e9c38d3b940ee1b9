"""Tokens against the published text path, and tokenizers trained on a cohort's own reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fundusfm.errors import UserError
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.texts import iterate_texts
from fundusfm.stream.tokens import Tokens, load_tokens
from fundusfm.stream.vocabulary import train_tokenizer
from tests import goldens
from tests.conftest import Cohort

VOCAB_SIZE = 21128


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden's vocabulary as a transformers folder; a placeholder for each word that it never names."""
    words = json.loads((goldens.FOLDER / "ret_clip/tokenizer_words.json").read_text(encoding="utf-8"))
    by_id = {number: word for word, number in words["tokens"].items()}
    folder = tmp_path_factory.mktemp("bert")
    lines = [by_id.get(number, f"[absent {number}]") for number in range(VOCAB_SIZE)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("context_length", [100, 52])
def test_golden__published_ids(published_folder: Path, context_length: int) -> None:
    """Word pieces are cut greedily, the longest known one first.

    A piece that the whole vocabulary chose is in the small one too, and no longer one is, so both cut alike.
    """
    arrays, description = goldens.load("ret_clip/tokenizer")
    tokens = load_tokens(str(published_folder), context_length)
    assert tokens.vocab_size == description["vocab_size"]
    token_BT, mask_BT = tokens(description["strings"])
    wanted = arrays[f"ids_ctx{context_length}"]
    room = context_length - token_BT.shape[1]
    found = np.pad(token_BT.numpy(), ((0, 0), (0, room)))
    for text, ours, theirs in zip(description["strings"], found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=text)
    np.testing.assert_array_equal(mask_BT, token_BT != 0)
    if context_length == 100:
        np.testing.assert_array_equal(mask_BT.sum(1), arrays["length_ctx100"])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vocabulary, which open_clip ships, as a transformers folder."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(theirs.encoder), encoding="utf-8")
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = (theirs.decoder[number] for number in (49406, 49407))
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_golden__clip_ids(clip_folder: Path) -> None:
    """All texts of the golden, one of them cut, one empty; what pads is another token there."""
    arrays, description = goldens.load("eyeclip/tokenizer")
    tokens = load_tokens(str(clip_folder), description["context_length"])
    token_BT, mask_BT = tokens(description["texts"])
    assert tokens.vocab_size == description["eot"] + 1
    for text, ours_T, mask_T, theirs_T in zip(
        description["texts"], token_BT, mask_BT, arrays["tokens"], strict=True
    ):
        num_tokens = int(theirs_T.argmax()) + 1
        assert int(mask_T.sum()) == num_tokens, text
        np.testing.assert_array_equal(ours_T[mask_T], theirs_T[:num_tokens], err_msg=text)


def _train(cohort: Cohort, out: Path, **options: int) -> Path:
    train_tokenizer([str(cohort.shards)], out, **options)
    return out


def test_trained__deterministic_and_special_words_first(synth_cohort: Cohort, tmp_path: Path) -> None:
    files = [_train(synth_cohort, tmp_path / f"{k}.json", vocab_size=300) for k in range(4)]
    assert len({file.read_bytes() for file in files}) == 1
    vocabulary = json.loads(files[0].read_text(encoding="utf-8"))["model"]["vocab"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [vocabulary[word] for word in special] == [0, 1, 2, 3, 4]
    assert len(vocabulary) <= 300


def test_trained__knows_every_report(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 96)
    texts = list(iterate_texts(ShardIndex.load(synth_cohort.shards), "train"))
    token_BT, mask_BT = tokens(texts)
    assert texts
    assert not (token_BT == 1).any(), "a train report has a word that its own tokenizer does not know"
    assert (token_BT[:, 0] == 2).all()
    assert ((token_BT == 3).sum(1) == 1).all()
    assert (token_BT[~mask_BT] == 0).all()


def test_trained__chinese_by_character(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 96)
    token_BT, _ = tokens(["左眼", "右眼", "左眼右眼"])
    left, right, both = token_BT.tolist()
    assert len({*left[1:3], *right[1:3]}) == 3
    assert both == [2, *left[1:3], *right[1:3], 3]


def test_long_text__cut_with_its_end_kept(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 7)
    token_BT, mask_BT = tokens(["left eye right eye " * 9, ""])
    assert token_BT.shape == (2, 7)
    assert token_BT[0, -1] == 3
    assert token_BT[1].tolist() == [2, 3, 0, 0, 0, 0, 0]
    assert mask_BT.sum(1).tolist() == [7, 2]


def test_special_words_in_a_report__are_ordinary_text(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 96)
    token_BT, _ = tokens(["left [SEP] eye [PAD] [CLS]"])
    assert token_BT[0, 0] == 2
    assert token_BT[0, -1] == 3
    assert not set(token_BT[0, 1:-1].tolist()) & {0, 2, 3}


def test_round_trip__save_and_load(synth_cohort: Cohort, tmp_path: Path) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 48)
    tokens.save(tmp_path / "tokenizer")
    again = load_tokens(str(tmp_path / "tokenizer"), 48)
    texts = list(iterate_texts(ShardIndex.load(synth_cohort.shards), "val"))
    assert again.vocab_size == tokens.vocab_size
    for ours, theirs in zip(again(texts), tokens(texts), strict=True):
        assert ours.equal(theirs)


def test_cohort_without_reports__refused(
    synth_cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundusfm.stream.vocabulary.iterate_texts", lambda index, split: iter(()))
    with pytest.raises(UserError, match="no text"):
        _train(synth_cohort, tmp_path / "tokens.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"model": {"type": "WordPiece"}}', "[]"])
def test_malformed_file__refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokens(str(file), 10)


def test_absent__refused(tmp_path: Path) -> None:
    for name in ("tokens.json", "folder"):
        with pytest.raises(UserError, match=name):
            load_tokens(str(tmp_path / name), 10)


def test_tokenizer_without_start_token__refused(tmp_path: Path, synth_cohort: Cohort) -> None:
    load_tokens(str(synth_cohort.tokenizer), 10).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["cls_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\[CLS\]"):
        load_tokens(str(tmp_path), 10)


def test_quotes__straightened(synth_cohort: Cohort) -> None:
    tokens: Tokens = load_tokens(str(synth_cohort.tokenizer), 48)
    assert tokens(["“left” eye"])[0].equal(tokens(['"left" EYE'])[0])


def test_text_of__back_to_what_a_person_wrote(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 200)
    texts = list(iterate_texts(synth_cohort.index, "train"))
    chinese = [text for text in texts if not text.isascii()]
    assert chinese and len(chinese) < len(texts)
    token_BT, mask_BT = tokens(texts)
    for text, token_T, mask_T in zip(texts, token_BT, mask_BT, strict=True):
        found = tokens.text_of(token_T[mask_T].tolist())
        assert found.replace(" ", "") == text.lower().replace(" ", "")
        assert text.isascii() or " " not in found
    assert " " in tokens.text_of(token_BT[texts.index(next(t for t in texts if t.isascii()))].tolist())


def test_ends__stand_around_every_text(synth_cohort: Cohort) -> None:
    tokens = load_tokens(str(synth_cohort.tokenizer), 200)
    token_BT, mask_BT = tokens(["right eye", "left eye: drusen"])
    begin, end = tokens.ends
    assert token_BT[:, 0].tolist() == [begin] * 2
    assert [int(t[m][-1]) for t, m in zip(token_BT, mask_BT, strict=True)] == [end] * 2
