"""Log lines, and the request that each belongs to: for people, or as one JSON object a line.

May not know what is logged.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

# The request that a log line belongs to, or the response that is made in background.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")
# The server's log of WebSockets.
SOCKET_LOG = "uvicorn.sockets"
# The log of connections to a database: one that cannot be made is a traceback there, and a line of the store's anyway.
POOL_LOG = "asyncpg.pool"
# What becomes of the connections to a database.
STORE_LOG = "responses_proxy.store"

Form = Literal["console", "json"]
LINE = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
# Loggers of the server, which may have brought handlers of its own.
SERVER_LOGGERS = ("uvicorn", "uvicorn.access", "uvicorn.error")


class _NamesRequest(logging.Filter):
    """Puts the request id on every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def one_line(names: tuple[str, ...]) -> str:
    """Names that a client may have chosen, safe for a log line and for a header."""
    return re.sub(r"[^ -~]", "?", ", ".join(name.encode("ascii", "replace").decode() for name in names))[:2000]


class JsonLines(logging.Formatter):
    """A record as a JSON object; `extra={"fields": {...}}` gives it more keys."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", "-"),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # half a surrogate pair, which only escapes can tell
            return json.dumps(line, default=str)


def start_logging(level: str, form: Form = "console", *, is_served: bool = True) -> None:
    """One handler for all, the server's lines too, unless the program around it has set up logging already.

    `is_served`: by a program that goes on when its store fails; one that does not says it with its last line.
    """
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.addFilter(_NamesRequest())
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in SERVER_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger(SOCKET_LOG).setLevel("WARNING")  # below that are query strings, where clients may have put keys
    logging.getLogger(POOL_LOG).setLevel("ERROR")
    if not is_served:
        logging.getLogger(STORE_LOG).setLevel("ERROR")
