"""The keys that seal, and the file beside the store that keeps them: read, made by whoever comes first, and rotated.

May not know what is sealed with them, nor how. A file has one key a line, in base64: the first seals, all open.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("responses_proxy.keys")

KEY_BYTES = 32


def load_keys(given: Sequence[str], key_file: Path | None) -> tuple[bytes, ...]:
    """The keys of the settings, or else of the file, which is made when missing; without a file, one for this process.

    Raises: ValueError for a malformed key, OSError for a file that cannot be read or made.
    """
    if given:
        return _parse_keys(given, "sealing.keys")
    if key_file is None:
        return (os.urandom(KEY_BYTES),)
    if not key_file.exists():
        _make(key_file)
    return _parse_keys(key_file.read_text("latin-1").split(), str(key_file))


class KeyFile:
    """A file of keys that another process may rotate while this one runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._told = ""

    def changed(self) -> tuple[bytes, ...]:
        """Its keys, when it is not as it was at the last look; else none, and none of what cannot be read.

        A look costs one stat where nothing changed; a failure is logged once.
        """
        try:
            found = self._path.stat()
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
            return () if stamp == self._seen else self._read(stamp)
        except (OSError, ValueError) as error:
            if str(error) != self._told:
                log.warning("the sealing keys stay as they were: %s", error)
            self._told = str(error)
            return ()

    def _read(self, stamp: tuple[int, ...]) -> tuple[bytes, ...]:
        """What could be read is parsed once, also when it is malformed; what could not is tried again."""
        text = self._path.read_text("latin-1")
        self._seen, self._told = stamp, ""
        return _parse_keys(text.split(), str(self._path))


# -- making and rotating -----------------------------------------------------------------------------------------------


def fresh_key() -> str:
    """As the settings have it."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


def rotate_keys(given: Sequence[str], key_file: Path | None) -> str:
    """Puts a fresh key before the others, and says what was done; the key is shown only where no file keeps it.

    Raises: ValueError where there is nothing to rotate, or a malformed key; OSError for a file that resists.
    """
    if given:
        return (
            f"sealing.keys is set, so no key file is used: put this key first there, before the others\n{fresh_key()}"
        )
    if key_file is None:
        raise ValueError("store.path: ':memory:' has no key file to rotate; name a file, or set sealing.keys")
    if not key_file.exists() and _make(key_file):
        return f"{key_file}: made, with 1 key"
    if sys.platform == "win32":
        raise ValueError("keys are rotated on POSIX systems only: a new line before the others does the same")
    count = _rotate(key_file.resolve())
    return f"{key_file}: a fresh key is first now, of {count} keys; running processes take it over by themselves"


def _rotate(key_file: Path) -> int:
    """How many keys the file has then; who reads it meanwhile, or after a crash, finds it as before or as after."""
    with _locked(key_file.parent):
        keys = (os.urandom(KEY_BYTES), *load_keys((), key_file))
        with _written_beside(key_file, keys) as name:
            os.chown(name, key_file.stat().st_uid, -1)  # root may rotate the keys of a service
            os.replace(name, key_file)
    return len(keys)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One rotation at a time; what was renamed in it survives a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _make(key_file: Path) -> bool:
    """Of processes that start at once, the first to link its file makes the key, and nobody sees half a file."""
    with _written_beside(key_file, (os.urandom(KEY_BYTES),)) as name, contextlib.suppress(FileExistsError):
        os.link(name, key_file)
        return True
    return False


@contextlib.contextmanager
def _written_beside(key_file: Path, keys: Sequence[bytes]) -> Iterator[str]:
    """The name of a file that is whole on the disk; in the end it is gone, unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=key_file.parent, prefix=f".{key_file.name}.")  # has mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(base64.b64encode(key) + b"\n" for key in keys)
            file.flush()
            os.fsync(file.fileno())
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


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
