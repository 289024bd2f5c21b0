"""Which web pages may speak to the proxy: browsers let any page send requests to any address, this machine's too.

May not know the HTTP framework. Programs that are no browsers send no `Origin`, and nothing is asked of them.
Source: Fetch standard, "Origin header"; RFC 6454; what Ollama does with OLLAMA_ORIGINS and the header Host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from errors import ForeignOrigin

ANY = "*"
FORM = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*A-Z]+")
PAGE_SCHEMES = frozenset({"http", "https"})
# Ends of names that no page of the internet can have. Source: RFC 6761, RFC 6762, RFC 8375, ICANN on .internal.
LOCAL_ENDS = (".localhost", ".local", ".internal", ".home.arpa")
SHOWN_CHARACTERS = 100
# How many names and addresses are remembered.
WELCOME = 100


class Origins:
    """Refuses web pages that nobody has named."""

    def __init__(self, named: tuple[str, ...]) -> None:
        self._named = frozenset(named)
        # A page below a name that is named here is the proxy's own, so its name is one of the proxy's.
        self._own_names = frozenset(_name(_place(origin)) for origin in named)
        # The names and addresses that programs used lately and may use: most requests are like one before.
        self._welcome: set[tuple[bytes, str]] = set()

    def check(self, headers: Mapping[bytes, bytes], listens_on: str) -> None:
        """`listens_on`: the address of this machine that the request came to. Raises: ForeignOrigin."""
        given, way = headers.get(b"origin"), (headers.get(b"host", b""), listens_on)
        if given is None and way in self._welcome:
            return
        host = way[0].decode("latin-1").lower()
        if given is not None and self._is_foreign(given.decode("latin-1").lower(), host):
            shown = given.decode("ascii", "replace")[:SHOWN_CHARACTERS]
            raise ForeignOrigin(f"Requests of web pages from {shown!r} are not allowed: see server.cors_origins.")
        if is_loopback(listens_on) and self._is_rebound(_name(host)):
            raise ForeignOrigin(
                f"{host[:SHOWN_CHARACTERS]!r} is not known as a name of this proxy: name its origin in "
                "server.cors_origins, or set auth.mode."
            )
        if len(self._welcome) < WELCOME:
            self._welcome.add(way)

    def _is_foreign(self, origin: str, host: str) -> bool:
        """A page of another site; programs of this machine have schemes of their own, or pages on its loopback."""
        is_page = origin == "null" or origin.partition("://")[0] in PAGE_SCHEMES
        place = _place(origin)
        return is_page and origin not in self._named and place != host and not is_loopback(_name(place))

    def _is_rebound(self, name: str) -> bool:
        """Whether a page may have let this name of its own point to this machine: one of the internet's, that is."""
        is_public = "." in name and not _is_address(name) and not name.endswith(LOCAL_ENDS)
        return is_public and name not in self._own_names


def origins_of(named: tuple[str, ...], auth_mode: str) -> Origins | None:
    """None where nothing is to be checked: every page is welcome, or none can do anything without a key."""
    return None if ANY in named or (auth_mode != "none" and not named) else Origins(named)


def refuse_malformed(named: tuple[str, ...]) -> None:
    """Raises: ValueError for what no browser would ever send."""
    for origin in named:
        if not FORM.fullmatch(origin):
            raise ValueError(f"cors_origins: expected 'https://host', 'http://host:port' or '*', got {origin!r}")


def is_loopback(name: str) -> bool:
    if name.startswith("127."):
        return _is_address(name)
    return name in ("localhost", "::1", "[::1]") or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    return name.startswith("[") or name.replace(".", "").isdecimal()


def _place(origin: str) -> str:
    """The host and port of an origin."""
    return origin.partition("://")[2]


def _name(place: str) -> str:
    """A host without its port."""
    return place.partition("]")[0] + "]" if place.startswith("[") else place.partition(":")[0].rstrip(".")
