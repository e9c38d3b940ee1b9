"""The reject list: what of the input could not be used, where it stands, and why."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.shards.draft import Reject
from fundusfm.shards.index import write_atomically

REJECTS_NAME = "rejects.csv"
_NUM_REASONS = 5


def write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    """`rejects.csv` with row, item and reason; written even if empty, so that an old one does not mislead."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(("row", "item", "reason"))
    table.writerows((reject.row, reject.item, reject.reason) for reject in rejects)
    write_atomically(
        out / REJECTS_NAME, stream.getvalue().encode("utf-8-sig")
    )  # so that Excel reads Chinese names


def check_budget(rejects: Sequence[Reject], num_items: int, max_rejects: float, out: Path) -> None:
    """UserError naming the worst reasons if more than a share `max_rejects` of the input is unusable."""
    if len(rejects) <= max_rejects * num_items:
        return
    reasons = Counter(reject.reason for reject in rejects).most_common(_NUM_REASONS)
    first = {reason: next(r for r in rejects if r.reason == reason) for reason, _ in reasons}
    lines = [
        f"{count} x {reason} (first: row {first[reason].row}, {first[reason].item})"
        for reason, count in reasons
    ]
    raise UserError(
        f"{len(rejects)} of {num_items} rows cannot be used, more than --max-rejects {max_rejects:g} allows: "
        + "; ".join(lines),
        where=str(out / REJECTS_NAME),
        fix="mend the rows listed there, or allow more with --max-rejects; nothing was published",
    )
