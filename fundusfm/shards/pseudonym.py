"""Pseudonyms: keyed hashes of patient and exam ids; only who has the key file can link them back."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fundusfm.errors import UserError

_KEY_BYTES = 32
_PSEUDONYM_CHARS = 16


def pseudonym(key: bytes, identifier: str) -> str:
    """First 16 hex digits of HMAC-SHA256: the same id gives the same pseudonym under the same key."""
    return hmac.new(key, identifier.encode(), hashlib.sha256).hexdigest()[:_PSEUDONYM_CHARS]


def key_path(out: Path) -> Path:
    """Where the key of a set lies: beside its folder, so that the folder can be handed on without it."""
    return out.with_name(f"{out.name}.key")


def read_key(path: Path) -> bytes:
    """The key in a file; UserError if there is none."""
    try:
        text = path.read_text("ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise UserError(f"the key file cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise UserError("the key file does not hold a key", where=str(path)) from error
    if len(key) < _KEY_BYTES:
        raise UserError(f"the key is shorter than {_KEY_BYTES} bytes", where=str(path))
    return key


def read_or_make_key(path: Path) -> bytes:
    """The key in a file, made on first use and readable by its owner alone."""
    if path.exists():
        return read_key(path)
    key = secrets.token_bytes(_KEY_BYTES)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(key.hex() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        _name_first(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return read_key(path)


def _name_first(partial: Path, path: Path) -> None:
    """Give the key its name, unless one is there by now: parts of a build begin at the same time."""
    try:
        os.link(partial, path)
    except OSError:
        if not path.exists():  # storage without hard links
            partial.replace(path)
