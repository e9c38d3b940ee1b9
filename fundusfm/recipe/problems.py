"""Everything wrong with a recipe, gathered first and told in one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fundusfm.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted `key`, what is wrong, and `where` it was written (`recipes/x.yaml:12`)."""

    key: str
    text: str
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.text}"


def refusal(problems: Sequence[Problem], where: str) -> UserError:
    """The one error that lists all problems of the recipe `where`."""
    told = dict.fromkeys(problems)
    count = "a problem" if len(told) == 1 else f"{len(told)} problems"
    lines = "".join(f"\n  - {problem}" for problem in told)
    fix = "correct these keys; recipes/base.yaml explains every key there is"
    return UserError(f"the recipe has {count}:{lines}", where=where, fix=fix)


def nearest(name: str, siblings: Iterable[str], everywhere: Iterable[str] = ()) -> str:
    """` (did you mean ...?)` for a name that does not exist, or nothing where none is near.

    A near sibling comes first; then a key of the same or a near name in another section, given in full.
    """
    close = difflib.get_close_matches(name, list(siblings), n=1)
    if not close:
        by_last_word: dict[str, str] = {}
        for key in everywhere:
            by_last_word.setdefault(key.rpartition(".")[2], key)
        close = [
            by_last_word[word] for word in difflib.get_close_matches(name, by_last_word, n=1, cutoff=0.8)
        ]
    return f" (did you mean {close[0]}?)" if close else ""
