"""Random numbers as a function of what they are for: no generator state; no rank, worker or library counts.

The mixer is splitmix64 (Steele, Lea and Flood, 2014). A permutation is the stable argsort of hashed counters,
so it stays the same for ever, where a library's own shuffle may change between releases.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def hash_words(*words: int) -> int:
    """One 64-bit number out of several integers; changing any of them, or their order, changes it."""
    state = 0
    for word in words:
        state = _mix((state + _GAMMA + (word & _MASK)) & _MASK)
    return state


def permutation(length: int, *key: int) -> Indices:
    """A permutation of `range(length)` that depends on `key` alone."""
    words = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(hash_words(*key))
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return np.argsort(words, kind="stable").astype(np.int64)


def generator(*key: int) -> np.random.Generator:
    """A numpy generator for the draws of one sample, keyed by what the sample is."""
    return np.random.Generator(np.random.Philox(key=[hash_words(*key), hash_words(*key, 1)]))


def hash_text(text: str) -> int:
    """A number from 0 to 2^63 - 1 for a text, the same on every machine: an id that fits into a tensor."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seed_N: Tensor, count: int) -> Tensor:
    """(N, count) numbers in [0, 1) of each seed, on its device; their order is that of `permutation`.

    So a batch carries one number an image, whatever the grid of patches that is drawn over it.
    """
    step_C = torch.arange(1, count + 1, device=seed_N.device) * _signed(_GAMMA)
    word_NC = seed_N[:, None] + step_C
    word_NC = (word_NC ^ _shifted(word_NC, 30)) * _signed(0xBF58476D1CE4E5B9)
    word_NC = (word_NC ^ _shifted(word_NC, 27)) * _signed(0x94D049BB133111EB)
    word_NC = word_NC ^ _shifted(word_NC, 31)
    return _shifted(word_NC, 11).to(torch.float64) * 2.0**-53


def _signed(word: int) -> int:
    """The same 64 bits as a signed number, which is all that tensors know; products wrap around alike."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros coming in, where a signed number would bring its sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
