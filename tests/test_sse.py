"""Server-sent events: every framing seen, whole and byte by byte."""

from __future__ import annotations

import pytest

from sse import SSEDecoder


@pytest.mark.parametrize(
    ("body", "payloads"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: [1,\ndata: 2]\n\n", [b"[1,\n2]"]),
        (b": ping\n\n: ping\ndata: a\n\n", [b"a"]),
        (b"event: message\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"data: [DONE] \n\n", [b"[DONE]"]),
        (b"data: a\n\ndata: b", [b"a", b"b"]),
        (b"data: a\n\ndata: b\r", [b"a", b"b"]),
        (b"data:\n\nevent: ping\n\n", []),
        (b'event: error\ndata: {"message":"m"}\n\n', [b'{"error":{"message":"m"}}']),
        (b'event:error\ndata: {"error":"m"}\n\n', [b'{"error":"m"}']),
        (b'\n\n{"choices":[]}\n', [b'{"choices":[]}']),
        (b"", []),
    ],
)
def test_the_decoder_finds_the_payloads(body: bytes, payloads: list[bytes]) -> None:
    decoder = SSEDecoder()
    assert decoder.feed(body) + decoder.flush() == payloads
    decoder = SSEDecoder()
    assert [p for n in range(len(body)) for p in decoder.feed(body[n : n + 1])] + decoder.flush() == payloads
