from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.shards.pseudonym import key_path, pseudonym, read_key, read_or_make_key


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = key_path(tmp_path / "out")
    key = read_or_make_key(path)
    assert (path.name, len(key), stat.S_IMODE(path.stat().st_mode)) == ("out.key", 32, 0o600)
    assert read_or_make_key(path) == read_key(path) == key
    assert list(tmp_path.iterdir()) == [path]


def test_pseudonyms() -> None:
    # RFC 4231, test case 2
    assert pseudonym(b"Jefe", "what do ya want for nothing?") == "5bdcc146bf60754e"
    names = {pseudonym(b"k" * 32, f"patient {number}") for number in range(5000)}
    assert len(names) == 5000
    assert pseudonym(b"k" * 32, "张三") != pseudonym(b"j" * 32, "张三")


@pytest.mark.parametrize("content", [None, "", "not hex", "abcd"])
def test_bad_key_files(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "k.key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="key"):
        read_key(path)
