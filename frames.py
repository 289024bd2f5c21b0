"""Events as the bytes of server-sent events, and such bytes cut at a number.

May not know what an event says. Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Any

import orjson

Event = dict[str, Any]

KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"
END = b"\n\n"


class Interrupted(Exception):
    """A stream that this process leaves; it is not at its end, and can be taken up at another."""


def encode(events: list[Event]) -> bytes:
    """Server-sent events, LF only, each whole: a parser in use loses state between reads."""
    return b"".join([b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events])


def after(number: int, first: int, frames: bytes) -> tuple[bytes, int]:
    """What stands behind the event of that number, and the number of the last event; the first event has `first`.

    JSON holds no line feeds, so that an empty line ends an event and nothing else.
    """
    events = frames.split(END)
    last = first + len(events) - 2
    return (frames if number < first else END.join(events[number - first + 1 :])), last
