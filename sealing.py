"""What clients carry for us and may not read: AES-GCM blobs bound to an owner and an item.

May not know what is sealed. A blob is `rp1_` and urlsafe base64 of: key id (4 bytes) | nonce (12) | ciphertext.
Source: NIST SP 800-38D, which allows 2**32 random nonces a key.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys import KEY_BYTES

PREFIX = "rp1_"
KEY_ID_BYTES = 4
NONCE_BYTES = 12
HEAD_BYTES = KEY_ID_BYTES + NONCE_BYTES
SIZE_BYTES = 4


@dataclass(frozen=True)
class SealingSettings:
    """The section `[sealing]`: keys in base64, of which the first seals and all open."""

    keys: tuple[str, ...] = ()


class Seals:
    """Seals with the first key and opens with all; `changed` tells the keys of now, or none where they are the same.

    Raises: ValueError for no key, or one of a wrong size.
    """

    def __init__(self, keys: tuple[bytes, ...], changed: Callable[[], tuple[bytes, ...]] = tuple) -> None:
        self._keys = _with_ids(keys)
        self._changed = changed

    @property
    def key_names(self) -> list[str]:
        """Tells keys apart; it is in every blob, and tells nothing of the key."""
        return [key_id.hex() for key_id, _ in self._keys]

    def seal(self, kind: str, owner: str, item_id: str, payload: bytes) -> str:
        """A blob that `open` takes for the same kind, owner and item only."""
        self._take_over()
        key_id, aead = self._keys[0]
        nonce = os.urandom(NONCE_BYTES)
        sealed = aead.encrypt(nonce, _named(item_id) + payload, _named(kind) + _named(owner))
        return _encoded(key_id + nonce + sealed)

    def open(self, kind: str, owner: str, item_id: str | None, blob: str) -> bytes | None:
        """The payload; None for whatever is not ours. Without an item id, as some clients send items, any will do."""
        found = self._opened(kind, owner, blob)
        return found[1] if found and item_id in (None, found[0]) else None

    def item_id(self, kind: str, owner: str, blob: str) -> str | None:
        """The item that a blob was sealed for; None for whatever is not ours."""
        found = self._opened(kind, owner, blob)
        return found and found[0]

    def _opened(self, kind: str, owner: str, blob: str) -> tuple[str, bytes] | None:
        """The item and the payload."""
        raw = _decoded(blob)
        for aead in self._of(raw[:KEY_ID_BYTES]):
            inner = _decrypted(aead, raw, _named(kind) + _named(owner))
            if inner is not None:
                end = SIZE_BYTES + int.from_bytes(inner[:SIZE_BYTES], "big")
                return inner[SIZE_BYTES:end].decode(errors="surrogatepass"), inner[end:]
        return None

    def _of(self, key_id: bytes) -> list[AESGCM]:
        """The keys of an id, which may be one that another process made since."""
        if key_id and all(key_id != known for known, _ in self._keys):
            self._take_over()
        return [aead for known, aead in self._keys if known == key_id]

    def _take_over(self) -> None:
        if keys := self._changed():
            self._keys = _with_ids(keys)


def _with_ids(keys: tuple[bytes, ...]) -> list[tuple[bytes, AESGCM]]:
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"Sealing needs at least one key, each of {KEY_BYTES} bytes.")
    return [(hashlib.sha256(key).digest()[:KEY_ID_BYTES], AESGCM(key)) for key in keys]


def _named(text: str) -> bytes:
    """With its length in front, so that no two names run into each other; any string, half a surrogate pair too."""
    name = text.encode(errors="surrogatepass")
    return len(name).to_bytes(SIZE_BYTES, "big") + name


def _encoded(raw: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decoded(blob: str) -> bytes:
    """The bytes of a blob that is written as we write them; nothing for any other string."""
    try:
        raw = base64.urlsafe_b64decode(blob[len(PREFIX) :] + "==")
    except ValueError:
        return b""
    # base64 skips what it does not know, and the last bits of a blob mean nothing.
    return raw if len(raw) >= HEAD_BYTES and _encoded(raw) == blob else b""


def _decrypted(aead: AESGCM, raw: bytes, bound_to: bytes) -> bytes | None:
    try:
        return aead.decrypt(raw[KEY_ID_BYTES:HEAD_BYTES], raw[HEAD_BYTES:], bound_to)
    except (InvalidTag, OverflowError):  # OverflowError: more than 2**31 bytes
        return None
