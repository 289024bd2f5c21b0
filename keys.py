"""The keys that seal, and the file beside the store that keeps them: read, and made by whoever comes first.

May not know what is sealed with them, nor how. A file has one key a line, in base64: the first seals, all open.
"""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 32


@dataclass(frozen=True)
class SealingSettings:
    """The section `[sealing]`: keys in base64, of which the first seals and all open."""

    keys: tuple[str, ...] = ()


def load_keys(settings: SealingSettings, key_file: Path | None) -> tuple[bytes, ...]:
    """The keys of the settings, or else of the file, which is made when missing; without a file, one for this process.

    Raises: ValueError for a malformed key, OSError for a file that cannot be read or made.
    """
    if settings.keys:
        return _parse_keys(settings.keys, "sealing.keys")
    if key_file is None:
        return (os.urandom(KEY_BYTES),)
    if not key_file.exists():
        _make(key_file)
    return _parse_keys(key_file.read_text("latin-1").split(), str(key_file))


def _make(key_file: Path) -> None:
    """Of processes that start at once, the first to link its file makes the key, and nobody sees half a file."""
    handle, name = tempfile.mkstemp(dir=key_file.parent, prefix=f".{key_file.name}.")  # has mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, key_file)
    finally:
        os.unlink(name)


def _parse_keys(texts: Sequence[str], where: str) -> tuple[bytes, ...]:
    """The message names the place and never the key."""
    keys = tuple(map(_key_bytes, texts))
    wrong = [n for n, key in enumerate(keys, 1) if len(key) != KEY_BYTES]
    if wrong or not keys:
        raise ValueError(f"Invalid key {(wrong or [1])[0]} in {where}: expected base64 of {KEY_BYTES} bytes.")
    return keys


def _key_bytes(text: str) -> bytes:
    standard = text.strip().replace("-", "+").replace("_", "/").rstrip("=") + "="
    try:
        return base64.b64decode(standard, validate=True)
    except ValueError:
        return b""
