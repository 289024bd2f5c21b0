"""Server-sent events of a backend: bytes in, payloads out.

May not do I/O, nor know what a payload means.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations


class SSEDecoder:
    """Splits bytes into the payloads of server-sent events; reads may end anywhere.

    Takes CRLF, data without a space and data over several lines; drops comments. Of event names only `error` matters:
    its payload becomes an error object if it is none. A JSON body that is no stream at all is one payload.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        if b"\r" in data:
            whole = data[:-1] if data.endswith(b"\r") else data
            data = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + data[len(whole) :]
        *blocks, self._rest = data.split(b"\n\n")
        return [payload for block in blocks if (payload := _payload(block))]

    def flush(self) -> list[bytes]:
        """The payload of a last event that no empty line followed."""
        rest, self._rest = self._rest.strip(), b""
        payload = rest if rest.startswith(b"{") else _payload(rest)
        return [payload] if payload else []


def _payload(block: bytes) -> bytes:
    if block.startswith(b"data: ") and b"\n" not in block:
        return block[6:].strip()
    lines = block.split(b"\n")
    payload = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")).strip()
    is_error = any(line.startswith(b"event:") and line[6:].strip() == b"error" for line in lines)
    return b'{"error":%b}' % payload if payload and is_error and b'"error"' not in payload else payload
