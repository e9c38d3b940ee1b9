"""The order is a function: every exam once an epoch, another order each epoch, the same after any seek."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fundusfm.errors import UserError
from fundusfm.stream.hashing import generator, hash_words, permutation
from fundusfm.stream.order import EpochOrder, Mixture

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**63), window=st.integers(1, 12), epoch=st.integers(0, 10**9))
def test_epoch__every_exam_exactly_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = EpochOrder(sizes, seed, window)
    slots = [order(epoch * order.num_exams + i) for i in range(order.num_exams)]
    wanted = {(shard, exam) for shard, size in enumerate(sizes) for exam in range(size)}
    assert len(slots) == len(wanted)
    assert {(s.shard, s.exam) for s in slots} == wanted


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, position=st.integers(0, 10**15))
def test_seek__equals_walking_there(sizes: list[int], position: int) -> None:
    walked = EpochOrder(sizes, 7, 3)
    for near in range(max(0, position - 20), position):
        walked(near)
    assert walked(position) == EpochOrder(sizes, 7, 3)(position)


def test_epochs_and_seeds__differ() -> None:
    epochs = set()
    for seed in range(3):
        order = EpochOrder([20, 30, 25], seed, 2)
        epochs |= {tuple(order(e * 75 + i) for i in range(75)) for e in range(20)}
    assert len(epochs) == 60


def test_window__reads_stay_local() -> None:
    order = EpochOrder([10] * 12, seed=1, window=3)
    for start in range(0, 120, 30):
        assert len({order(p).shard for p in range(start, start + 30)}) == 3


def test_order__spreads_evenly() -> None:
    order = EpochOrder([8], seed=0, window=1)
    first = np.bincount([order(8 * e).exam for e in range(4000)], minlength=8)
    assert abs(first - 500).max() < 100  # four and a half standard deviations


def test_replacement__uniform_and_fixed() -> None:
    order = EpochOrder([3, 5], seed=0, window=1)
    drawn = [order.replacement(p, 1) for p in range(400)]
    assert drawn == [order.replacement(p, 1) for p in range(400)]
    assert len(set(drawn)) == 8
    assert drawn != [order.replacement(p, 2) for p in range(400)]


def test_nothing_usable__refused() -> None:
    with pytest.raises(UserError, match="no exam"):
        EpochOrder([0, 0], seed=0, window=1)


def test_hashes__frozen_for_ever() -> None:
    """A change of these numbers would change the sample order of every run that resumes after an upgrade."""
    assert hash_words(0, 1, 2) == 0xF4F373571B7FEB84
    assert permutation(8, 1, 2).tolist() == [2, 7, 3, 1, 5, 6, 0, 4]
    assert generator(1, 2).random(2).tolist() == [0.7697010724358002, 0.33851806760060144]


def test_order__the_same_in_another_process() -> None:
    program = "from fundusfm.stream.order import EpochOrder; o = EpochOrder([9, 4], 5, 2)"
    program += "; print([o(p) for p in range(30)])"
    order = EpochOrder([9, 4], 5, 2)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str([order(p) for p in range(30)])


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5),
    batch_size=st.integers(20, 64),
    batch=st.integers(0, 10**6),
)
@example(weights=[8.0, 2.0, 8.0], batch_size=6, batch=103)
def test_mixture__shares_hold_in_every_batch(weights: list[float], batch_size: int, batch: int) -> None:
    mixture = Mixture(weights, batch_size, seed=0)
    draws = [mixture(batch * batch_size + i) for i in range(batch_size)]
    counts = np.bincount([d.source for d in draws], minlength=len(weights))
    shares = np.asarray(weights) / sum(weights) * batch_size
    allowed = np.ones(len(weights))
    allowed[int(np.argmax(weights))] = len(weights)
    assert (abs(counts - shares) < allowed + 1e-6).all()
    assert (abs(mixture.counts(batch) - batch * shares) < allowed).all()
    for source, before in enumerate(mixture.counts(batch)):
        positions = sorted(d.position for d in draws if d.source == source)
        assert positions == list(range(int(before), int(before) + int(counts[source])))


def test_mixture__more_sources_than_a_batch_holds() -> None:
    with pytest.raises(UserError, match="too small to mix 4 sources"):
        Mixture([1.0] * 4, 11, seed=0)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 9.0], [3.0, 3.0, 4.0]])
def test_mixture__whole_shares_are_exact(weights: list[float]) -> None:
    mixture = Mixture(weights, 10, seed=0)
    shares = [round(10 * w / sum(weights)) for w in weights]
    for batch in range(500):
        counts = np.bincount([mixture(batch * 10 + i).source for i in range(10)], minlength=len(weights))
        assert counts.tolist() == shares
