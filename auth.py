"""Who is asking: one owner for everybody, named client keys, or the client's own bearer token passed on.

May not know the HTTP framework: the `Authorization` header is handed in as text. No message contains a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import msgspec

from errors import Unauthorized

KEY_PREFIX = "rp-"
KEY_BYTES = 32
HASH_PREFIX = "sha256:"
HASH_FORM = re.compile(HASH_PREFIX + "[0-9a-fA-F]{64}")
OWNER_DIGITS = 32
NOTHING_TRACED: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class AuthSettings:
    """The section `[auth]`; `keys` maps a client's name to the `sha256:<hex>` of its key."""

    mode: Literal["none", "keys", "passthrough"] = "none"
    keys: Mapping[str, str] = field(default_factory=dict)


class Caller(msgspec.Struct, frozen=True):
    """Who asks, the token that goes upstream in its name, and the headers of the trace that its request is part of."""

    owner: str
    bearer: str | None = None
    trace: Mapping[str, str] = NOTHING_TRACED

    @property
    def passed(self) -> Mapping[str, str]:
        """The headers for the backend that the caller speaks to; any other one gets no more than `trace`."""
        return self.trace if self.bearer is None else {**self.trace, "Authorization": f"Bearer {self.bearer}"}


class Owners:
    """Knows callers by their `Authorization` header. Raises: ValueError for keys that are malformed or out of place."""

    def __init__(self, settings: AuthSettings, secret: bytes) -> None:
        _refuse_misplaced(settings)
        self._mode = settings.mode
        self._hashes = {name: _parse_hash(name, text) for name, text in settings.keys.items()}
        self._secret = secret

    def caller(self, authorization: str | None, trace: Mapping[str, str] = NOTHING_TRACED) -> Caller:
        """Raises: Unauthorized for a key that is missing or unknown."""
        if self._mode == "none":
            return Caller("", None, trace)
        token = _token(authorization)
        if self._mode == "keys":
            return Caller(self._name_of(token), None, trace)
        owner = hmac.new(self._secret, _bytes(token), hashlib.sha256).hexdigest()[:OWNER_DIGITS]
        return Caller(owner, token, trace)

    def _name_of(self, token: str) -> str:
        """Compares with every key, so that the time taken tells nothing of which it was."""
        given = hashlib.sha256(_bytes(token)).digest()
        names = [name for name, known in self._hashes.items() if hmac.compare_digest(given, known)]
        if not names:
            raise Unauthorized("Incorrect API key provided.")
        return names[0]


def new_key() -> tuple[str, str]:
    """A fresh client key, and the form of it that the settings hold."""
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


def _refuse_misplaced(settings: AuthSettings) -> None:
    if settings.mode == "keys" and not settings.keys:
        raise ValueError("auth.mode is 'keys', but auth.keys names no key: 'responses-proxy key' makes one.")
    if settings.mode != "keys" and settings.keys:
        raise ValueError(f"auth.keys are given, but auth.mode is '{settings.mode}', which does not look at them.")


def _parse_hash(name: str, text: str) -> bytes:
    """The message names the client and never the value, which may be a key by mistake."""
    if not name:
        raise ValueError("Invalid auth.keys: a key has an empty name.")
    if not HASH_FORM.fullmatch(text):
        raise ValueError(f"Invalid auth.keys.{name}: expected '{HASH_PREFIX}' and 64 hexadecimal digits.")
    return bytes.fromhex(text.removeprefix(HASH_PREFIX))


def _token(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("Missing API key: send it in the header 'Authorization: Bearer <key>'.")
    return token.strip()


def _bytes(token: str) -> bytes:
    """Any string, half a surrogate pair too."""
    return token.encode(errors="surrogatepass")
