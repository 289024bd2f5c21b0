"""Log lines, and the request that each belongs to.

May not know what is logged.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

# The request that a log line belongs to.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")


class _NamesRequest(logging.Filter):
    """Puts the request id on every log line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def start_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_NamesRequest())
    form = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[handler])
