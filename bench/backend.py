"""A scripted chat-completions backend for load: one asyncio protocol, answers built beforehand.

`POST /script?chunks=200&interval_ms=5&silent=0` sets how the streams that begin after it behave: that many chunks, one
network write each, one per interval (0: as fast as the reader takes them), or, silent, the first chunk and then nothing
until the connection closes. `words` is how many there are in a chunk. With `counting=1` the usage of an answer
follows its length and that of the request, as a model's would; `plain_ms` is how long a plain answer takes. An answer
of `/v1/embeddings` has as many bytes as its request.
"""

import argparse
import asyncio
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from urllib.parse import parse_qsl

import httptools
import orjson
import uvloop

WORDS = [b" word", b" that", b" then", b" some", b" line", b" more", b" time", b" here"]
ENVELOPE = b'"created":1790000000,"id":"chatcmpl-5Yq0bJ1m","model":"bench","system_fingerprint":"b1","object":'
BYTES_PER_TOKEN = 4
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    numbers = (completion_tokens, prompt_tokens, prompt_tokens + completion_tokens)
    return b'"usage":{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d}' % numbers


USAGE = usage(12, 200)


@dataclass
class Script:
    chunks: int = 200
    interval_ms: float = 5.0
    silent: bool = False
    counting: bool = False
    plain_ms: float = 0.0
    words: int = 1

    def set(self, query: bytes) -> None:
        for key, value in parse_qsl(query.decode()):
            setattr(self, key, float(value) if key.endswith("_ms") else int(value))


def chunk(choices: bytes, extra: bytes = b"") -> bytes:
    return frame(b'data: {"choices":%b,%b"chat.completion.chunk"%b}\n\n' % (choices, ENVELOPE, extra))


def frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def choice(delta: bytes, finish: bytes = b"null") -> bytes:
    return b'[{"finish_reason":%b,"index":0,"delta":%b}]' % (finish, delta)


FIRST = chunk(choice(b'{"role":"assistant","content":null}'))


@lru_cache
def deltas(words: int) -> list[bytes]:
    """One chunk for each word, in which it stands so many times."""
    return [chunk(choice(b'{"content":"%b"}' % (word * words))) for word in WORDS]


FINISH = chunk(choice(b"{}", b'"stop"'))
USAGE_CHUNK = chunk(b"[]", b"," + USAGE)
DONE = frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MESSAGE = b'[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"%b"}}]' % b"".join(WORDS)


def completion(usage: bytes) -> bytes:
    return plain(b'{"choices":%b,%b"chat.completion",%b}' % (MESSAGE, ENVELOPE, usage))


COMPLETION = completion(USAGE)
MODELS = plain(b'{"object":"list","data":[{"id":"bench","object":"model","created":0,"owned_by":"bench"}]}')
NOT_FOUND = plain(b'{"error":{"message":"no such route","code":404}}', b"404 Not Found")


class Stream:
    """Writes one scripted answer, chunk by chunk, at times counted from its start so that lateness does not add up."""

    def __init__(self, transport: asyncio.WriteTransport, script: Script, tail: bytes) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = transport
        self.left = script.chunks
        self.deltas = deltas(script.words)
        self.interval_s = script.interval_ms / 1000
        self.tail = tail
        self.next_at = self.loop.time()
        self.timer: asyncio.Handle | None = None
        self.transport.write(STREAM_HEAD + FIRST)
        if not script.silent:
            self.schedule()

    def schedule(self) -> None:
        self.next_at += self.interval_s
        self.timer = self.loop.call_at(self.next_at, self.step) if self.interval_s else self.loop.call_soon(self.step)

    def step(self) -> None:
        if not self.left:
            self.timer = None
            self.transport.write(self.tail)
            return
        self.left -= 1
        self.transport.write(self.deltas[self.left % len(self.deltas)])
        self.schedule()

    def pause(self) -> None:
        if self.timer:
            self.timer.cancel()

    def resume(self) -> None:
        if self.timer:
            self.schedule()


class Connection(asyncio.Protocol):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.parser = httptools.HttpRequestParser(self)
        self.target = b""
        self.body = bytearray()
        self.stream: Stream | None = None
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stream:
            self.stream.pause()

    def pause_writing(self) -> None:
        if self.stream:
            self.stream.pause()

    def resume_writing(self) -> None:
        if self.stream:
            self.stream.resume()

    def on_url(self, url: bytes) -> None:
        self.target, self.body = url, bytearray()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path, _, query = self.target.partition(b"?")
        if path == b"/v1/chat/completions":
            self.complete(orjson.loads(self.body))
        elif path == b"/v1/embeddings":
            self.transport.write(plain(b" " * len(self.body)))
        elif path == b"/script":
            self.script.set(query)
            self.transport.write(plain(b"{}"))
        else:
            self.transport.write(MODELS if path == b"/v1/models" else NOT_FOUND)

    def complete(self, request: dict[str, object]) -> None:
        if not request.get("stream"):
            self.answer(completion(self.usage(len(WORDS))) if self.script.counting else COMPLETION)
            return
        options = request.get("stream_options")
        is_counted = isinstance(options, dict) and options.get("include_usage")
        told = (
            chunk(b"[]", b"," + self.usage(self.script.chunks * self.script.words))
            if self.script.counting
            else USAGE_CHUNK
        )
        self.stream = Stream(self.transport, self.script, FINISH + told * bool(is_counted) + DONE)

    def usage(self, words: int) -> bytes:
        """As a model would count the request and an answer of so many words."""
        return usage(len(self.body) // BYTES_PER_TOKEN, words * len(WORDS[0]) // BYTES_PER_TOKEN)

    def answer(self, whole: bytes) -> None:
        if self.script.plain_ms:
            asyncio.get_running_loop().call_later(self.script.plain_ms / 1000, self.transport.write, whole)
        else:
            self.transport.write(whole)


async def serve(port: int) -> None:
    script = Script()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(script), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port", type=int, required=True)
    uvloop.run(serve(flags.parse_args().port))


if __name__ == "__main__":
    main()
