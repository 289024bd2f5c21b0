"""Log lines, and the request that each belongs to.

May not know what is logged.
"""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar

# The request that a log line belongs to.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")
# The server's log of WebSockets.
SOCKET_LOG = "uvicorn.sockets"


class _NamesRequest(logging.Filter):
    """Puts the request id on every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def one_line(names: tuple[str, ...]) -> str:
    """Names that a client may have chosen, safe for a log line and for a header."""
    return re.sub(r"[^ -~]", "?", ", ".join(name.encode("ascii", "replace").decode() for name in names))[:2000]


def start_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_NamesRequest())
    form = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler])
    logging.getLogger(SOCKET_LOG).setLevel("WARNING")  # below that are query strings, where clients may have put keys
