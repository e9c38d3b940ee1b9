"""Random numbers as a pure function of seed, patient, purpose and eye, whatever was drawn before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fundusfm.shards.exam import EYES


class Stream(IntEnum):
    """What the numbers are for. Dropping a lesion leaves the vessels of the same eye as they were."""

    TRUTH = 0
    SPLIT = 1
    ANATOMY = 2
    VESSELS = 3
    LESIONS = 4
    CAMERA = 5
    CFP = 6
    OCT = 7
    FFA = 8
    REPORT = 9
    TEXTURE = 10


def generator(seed: int, number: int, stream: Stream, eye: str = "", part: int = 0) -> np.random.Generator:
    """A Philox generator of its own for each purpose, eye (empty: shared by both) and part of the purpose."""
    key = np.array([seed, number], dtype=np.uint64)
    counter = np.array([0, part, EYES.index(eye), int(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
