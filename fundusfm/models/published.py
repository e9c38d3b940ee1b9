"""Weights in from the files that papers published: names and shapes translated, every key accounted for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.models.layout_rules import CLIP_VIT, Rule, leading_axes
from fundusfm.models.layouts_eyeclip import EYECLIP
from fundusfm.models.layouts_flair import FLAIR, KEEPFIT
from fundusfm.models.layouts_masked import IGNORED, RETFOUND, URFOUND
from fundusfm.models.weights import read_weights

_RET_CLIP = [
    Rule(r"logit_scale", "log_scales.patient", leading_axes(1)),
    Rule(r"logit_scale_(left|right)", r"log_scales.\1", leading_axes(1)),
    *CLIP_VIT,
    Rule(r"bert\.(.+)", r"text.trunk.\1"),
    Rule(r"text_projection\.([02])\.(weight|bias)", r"text_heads.patient.\1.\2"),
    Rule(r"text_projection_(left|right)\.([02])\.(weight|bias)", r"text_heads.\1.\2.\3"),
    Rule(r"global_feature_mapping\.weight", "image_heads.patient.weight"),
    Rule(r"(left|right)_feature_mapping\.weight", r"image_heads.\1.weight"),
]
LAYOUTS: Mapping[str, list[Rule]] = {
    "ret_clip": _RET_CLIP,
    "flair": FLAIR,
    "keepfit": KEEPFIT,
    "retfound": RETFOUND,
    "urfound": URFOUND,
    "eyeclip": EYECLIP,
}
# Parts of a published file that the method does not use.
_IGNORED = re.compile(r"bert\.pooler\..+|bert\.embeddings\.position_ids|" + IGNORED)


@dataclass(frozen=True)
class Audit:
    """What became of each key of a published file: `matched` (theirs -> ours), `ignored`, `unexplained`.

    `absent`: parts of the method that the file holds nothing of.
    """

    matched: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def translate(system: str, published: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Audit]:
    """Published tensors under our names and shapes, and the account of every key; `module.` is dropped."""
    ours: dict[str, Tensor] = {}
    audit = Audit()
    for full_name, tensor in published.items():
        name = full_name.removeprefix("module.")
        rule = next((r for r in LAYOUTS[system] if re.fullmatch(r.pattern, name)), None)
        if _IGNORED.fullmatch(name) or (rule and not rule.ours):
            audit.ignored.append(full_name)
        elif rule is None:
            audit.unexplained.append(full_name)
        else:
            own_names = [re.sub(rule.pattern, one, name) for one in rule.names]
            ours_in_one = rule.reshape(tensor)
            parts = [ours_in_one] if len(own_names) == 1 else ours_in_one.chunk(len(own_names))
            ours.update({own: part.contiguous() for own, part in zip(own_names, parts, strict=True)})
            audit.matched[full_name] = ", ".join(own_names)
    modules = {name.partition(".")[0] for rule in LAYOUTS[system] for name in rule.names}
    audit.absent.extend(sorted(modules - {name.partition(".")[0] for name in ours}))
    return ours, audit


def import_weights(system: str, file: Path, out: Path) -> Audit:
    """Read a published weight file of `system`, write it in our layout (safetensors) and return the account.

    Both published forms are accepted: a flat mapping of tensors, and the training checkpoint that wraps it
    (see `read_weights`). UserError for an unknown system, or for any key that nothing explains.
    """
    if system not in LAYOUTS:
        raise UserError(
            f"no published layout is called {system!r}", fix=f"choose one of: {', '.join(LAYOUTS)}"
        )
    ours, audit = translate(system, read_weights(file))
    if audit.unexplained or not ours:
        shown = ", ".join(audit.unexplained[:10]) or "no key at all"
        raise UserError(
            f"{len(audit.unexplained)} keys are not those of {system}: {shown}",
            where=str(file),
            fix="check that the file belongs to this system; nothing was written",
        )
    # The digest ties what is trained from this file to the exact file.
    metadata = {"system": system, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    _write(out, save(ours, metadata))
    return audit


def _write(out: Path, content: bytes) -> None:
    out = out.absolute()  # `.` has no name
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"the weights cannot be written: {error.strerror or error}", where=str(out)
        ) from error
