"""The load generator: drives `/v1/responses` and prints what it saw as one JSON line.

`--mode stream` and `--mode plain` send `--count` requests, `--concurrency` at a time, over kept-alive connections.
`--mode hold` opens `--count` streams, prints once all have begun, and closes them when its standard input ends.
`--keep` says what the server is to keep: nothing, every response, or one chain of responses for each connection.
"""

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import orjson
import uvloop

CREATED = b"event: response.created"
DELTA = b"event: response.output_text.delta"
DEADLINE_S = 60


@dataclass
class Exchange:
    """One request and what came back; times are seconds on the monotonic clock."""

    sent_at: float
    parser: httptools.HttpResponseParser = field(init=False)
    finished: asyncio.Future[None] = field(init=False)
    begun: asyncio.Future[None] = field(init=False)
    body: bytearray = field(default_factory=bytearray)
    created_at: float = 0.0
    delta_at: float = 0.0

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)
        self.finished, self.begun = loop.create_future(), loop.create_future()

    def on_body(self, data: bytes) -> None:
        self.body += data
        if not self.created_at and CREATED in self.body:
            self.created_at = time.perf_counter()
            self.begun.set_result(None)
        if not self.delta_at and DELTA in self.body:
            self.delta_at = time.perf_counter()

    def on_message_complete(self) -> None:
        self.finished.set_result(None)

    def lost(self) -> None:
        for waiter in (self.begun, self.finished):
            if not waiter.done():
                waiter.set_exception(ConnectionError("the server closed the connection"))
                waiter.exception()

    def answer(self) -> dict[str, Any]:
        """The final response, empty if there is none."""
        events = bytes(self.body).removesuffix(b"data: [DONE]\n\n")
        last = events[events.rfind(b"\ndata: ") + 7 :] if self.created_at else events
        answer: dict[str, Any] = orjson.loads(last) if self.parser.get_status_code() == 200 else {}
        response: dict[str, Any] = answer.get("response", answer)
        return response

    def text_length(self) -> int:
        """Characters of output text in the final response, -1 if there is none."""
        answer = self.answer()
        texts = [part["text"] for item in answer.get("output", ()) for part in item.get("content", ())]
        return len("".join(texts)) if answer.get("status") == "completed" else -1


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.exchange: Exchange | None = None
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        if self.exchange:
            self.exchange.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.exchange:
            self.exchange.lost()

    def send(self, request: bytes) -> Exchange:
        self.exchange = Exchange(time.perf_counter())
        self.transport.write(request)
        return self.exchange


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def request_bytes(given: argparse.Namespace, previous_id: str | None = None) -> bytes:
    fields = {"model": "bench", "input": "Say some words."}
    if previous_id:
        fields["previous_response_id"] = previous_id
    body = orjson.dumps({**fields, "stream": given.mode != "plain", "store": given.keep != "nothing"})
    headers = b"host: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    return b"POST /v1/responses HTTP/1.1\r\n" + headers + body


async def work(given: argparse.Namespace) -> list[Exchange]:
    connection, request = await connect(given.port), request_bytes(given)
    done: list[Exchange] = []
    for _ in range(given.count // given.concurrency):
        if connection.transport.is_closing():
            connection = await connect(given.port)
        exchange = connection.send(request)
        await exchange.finished
        done.append(exchange)
        if given.keep == "chains":
            request = request_bytes(given, exchange.answer().get("id"))
    connection.transport.close()
    return done


async def drive(given: argparse.Namespace) -> None:
    async with asyncio.timeout(DEADLINE_S):
        workers = await asyncio.gather(*(work(given) for _ in range(given.concurrency)))
    print(orjson.dumps(summary([exchange for done in workers for exchange in done])).decode())


def summary(exchanges: list[Exchange]) -> dict[str, object]:
    lengths = [exchange.text_length() for exchange in exchanges]
    return {
        "requests": len(exchanges),
        "failed": lengths.count(-1),
        "characters": sum(lengths),
        "deltas": sum(exchange.body.count(DELTA) for exchange in exchanges),
        "created_ms": median_delay_ms([(exchange.sent_at, exchange.created_at) for exchange in exchanges]),
        "delta_ms": median_delay_ms([(exchange.sent_at, exchange.delta_at) for exchange in exchanges]),
    }


def median_delay_ms(times: list[tuple[float, float]]) -> float | None:
    """None when what is timed never came, as in plain answers."""
    delays = [(seen_at - sent_at) * 1000 for sent_at, seen_at in times if seen_at]
    return statistics.median(delays) if delays else None


async def hold(given: argparse.Namespace) -> None:
    async with asyncio.timeout(DEADLINE_S):
        connections = [await connect(given.port) for _ in range(given.count)]
        exchanges = [connection.send(request_bytes(given)) for connection in connections]
        await asyncio.gather(*(exchange.begun for exchange in exchanges))
    print(orjson.dumps({"requests": len(exchanges), "failed": 0}).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for connection in connections:
        connection.transport.close()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--mode", choices=("stream", "plain", "hold"), required=True)
    flags.add_argument("--keep", choices=("nothing", "turns", "chains"), default="nothing")
    flags.add_argument("--concurrency", type=int, default=1)
    flags.add_argument("--count", type=int, required=True)
    given = flags.parse_args()
    uvloop.run(hold(given) if given.mode == "hold" else drive(given))


if __name__ == "__main__":
    main()
