"""A database that tests may lose, and the way to it."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

from postgres_program import Server
from relay import Relay

KEY = base64.b64encode(bytes(32)).decode()
SECRET = "a-word-that-passes"
# A second of patience where the default has ten.
LIMIT_S = 3.0
QUICK = {"statement_timeout_s": LIMIT_S, "busy_timeout_s": 1.0, "connect_timeout_s": 2.0, "pool_size": 4}


class Site(NamedTuple):
    """A database, and the way to it."""

    server: Server
    relay: Relay
    url: str

    def store(self, **more: Any) -> dict[str, Any]:
        return {"store": {"path": self.url, **QUICK, **more}, "sealing": {"keys": (KEY,)}}
