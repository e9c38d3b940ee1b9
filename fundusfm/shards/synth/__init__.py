"""The embedded default cohort: procedural eyes with known truth, so that nothing needs a download."""

from __future__ import annotations

from pathlib import Path

from fundusfm.shards.index import ShardIndex
from fundusfm.shards.synth.source import SynthSource
from fundusfm.shards.writer import EXAMS_PER_SHARD, write_shards

__all__ = ["SynthSource", "synthesise"]


def synthesise(
    out: Path,
    *,
    patients: int,
    seed: int,
    size: int = 224,
    workers: int = 2,
    exams_per_shard: int = EXAMS_PER_SHARD,
) -> ShardIndex:
    """Write the cohort's shards to `out`; the same arguments but `workers` give the same bytes."""
    source = SynthSource(patients=patients, seed=seed, size=size)
    return write_shards(source, out, workers=workers, max_rejects=0.0, exams_per_shard=exams_per_shard)
