"""The load generator: drives `/v1/responses` and prints what it saw as one JSON line.

`--mode stream` and `--mode plain` send `--count` requests, `--concurrency` at a time, over kept-alive connections.
`--mode hold` opens `--count` streams, prints once all have begun, and closes them when its standard input ends.
`--keep` says what the server is to keep: nothing, every response, or one chain of responses for each connection.
`--background` asks for background responses. With `--mode stream` each is read live; with `--mode plain` and `--store
PLACE` each is fetched once, as soon as the file or the database says that it has ended, which costs the server nothing;
with `--mode admit` it is left in the queue. With several ports, `--port 8001,8002`, a client takes the next one for
every request: chains hop between servers. `--owners` spreads the connections over that many client keys, `bench-0` and
so on.
`--passing` streams chat completions, and `--mode upload` sends embeddings requests of so many `--megabytes`.
"""

import argparse
import asyncio
import importlib
import itertools
import sqlite3
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import httptools
import orjson
import uvloop

CREATED = b"event: response.created"
DELTA = b"event: response.output_text.delta"
DEADLINE_S = 60
LOOK_EVERY_S = 0.004
UNFINISHED = "SELECT turn.id FROM run JOIN turn ON turn.seq = run.turn"


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


class Passed(Exchange):
    """What went through: nothing is looked at before it has ended."""

    def on_body(self, data: bytes) -> None:
        self.body += data

    def answer(self) -> dict[str, Any]:
        """Shown as a response would be."""
        *chunks, end, rest = bytes(self.body).split(b"\n\n")
        choices = [orjson.loads(chunk.removeprefix(b"data: "))["choices"] for chunk in chunks]
        texts = [choice["delta"].get("content") or "" for choice, *_ in filter(None, choices)]
        is_whole = self.parser.get_status_code() == 200 and (end, rest) == (b"data: [DONE]", b"")
        content = [{"text": text} for text in texts]
        return {"status": "completed" if is_whole else "failed", "output": [{"content": content}]}


class Uploaded(Passed):
    """As many bytes come back as were sent."""

    sent_bytes = 0

    def answer(self) -> dict[str, Any]:
        return {"status": "completed" if len(self.body) == self.sent_bytes else "failed"}


def text_length(response: dict[str, Any]) -> int:
    """Characters of output text."""
    return sum(len(part["text"]) for item in response.get("output", ()) for part in item.get("content", ()))


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

    def send(self, request: bytes, kind: type[Exchange] = Exchange) -> Exchange:
        self.exchange = kind(time.perf_counter())
        self.transport.write(request)
        return self.exchange


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Ends:
    """Knows from the store which runs have ended. `look_again_and_again`, each time from another `look`."""

    look_every_s = LOOK_EVERY_S

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def wait_for(self, response_id: str) -> None:
        """The end of a run that was admitted."""
        self._waiting[response_id] = asyncio.get_running_loop().create_future()
        await self._waiting[response_id]

    async def look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self.look_every_s)
            if waiting := set(self._waiting):
                for ended in waiting - await self.look():
                    self._waiting.pop(ended).set_result(None)

    async def look(self) -> set[str]:
        """The runs that have not ended."""
        raise NotImplementedError


class FileEnds(Ends):
    """A reader of the file costs its writer nothing."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)

    async def look(self) -> set[str]:
        return {response_id for (response_id,) in self._db.execute(UNFINISHED)}


class DatabaseEnds(Ends):
    """Looks less often, and by the keys, for it costs the database something."""

    look_every_s = 5 * LOOK_EVERY_S
    BY_KEYS = MappingProxyType({"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"})

    def __init__(self, url: str) -> None:
        super().__init__()
        connect = importlib.import_module("asyncpg").connect
        self._connecting = asyncio.create_task(connect(url, server_settings=dict(self.BY_KEYS)))

    async def look(self) -> set[str]:
        return {row["id"] for row in await (await self._connecting).fetch(UNFINISHED)}


class Client:
    """A connection to each server, opened again where that has closed it."""

    def __init__(self, given: argparse.Namespace, number: int) -> None:
        self._given = given
        owner = b"authorization: Bearer bench-%d\r\n" % (number % given.owners) if given.owners else b""
        self._headers = b"host: 127.0.0.1\r\n" + owner
        self._ports = itertools.cycle(given.port[number % len(given.port) :] + given.port[: number % len(given.port)])
        self._connections: dict[int, Connection] = {}

    async def create(self, previous_id: str | None = None) -> Exchange:
        given = self._given
        if given.mode == "upload":
            return await self._upload(b'{"model":"bench","input":"%b"}' % (b"x" * (given.megabytes * 1_000_000)))
        if given.passing:
            messages = [{"role": "user", "content": "Say some words."}]
            return await self._post(
                "/v1/chat/completions", {"model": "bench", "messages": messages, "stream": True}, Passed
            )
        fields = {"model": "bench", "input": "Say some words."}
        if previous_id:
            fields["previous_response_id"] = previous_id
        flags = {"stream": given.mode in ("stream", "hold"), "store": given.keep != "nothing"}
        background = {"background": True} if given.background else {}
        return await self._post("/v1/responses", {**fields, **flags, **background}, Exchange)

    async def _upload(self, body: bytes) -> Exchange:
        exchange = await self._post_raw("/v1/embeddings", body, Uploaded)
        assert isinstance(exchange, Uploaded)
        exchange.sent_bytes = len(body)
        return exchange

    async def _post(self, path: str, body: dict[str, Any], kind: type[Exchange]) -> Exchange:
        return await self._post_raw(path, orjson.dumps(body), kind)

    async def _post_raw(self, path: str, body: bytes, kind: type[Exchange]) -> Exchange:
        headers = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        return await self._send(b"POST %b" % path.encode(), headers + b"\r\n" + body, kind)

    async def fetch(self, response_id: str) -> Exchange:
        return await self._send(b"GET /v1/responses/%b" % response_id.encode(), b"\r\n")

    async def _send(self, target: bytes, rest: bytes, kind: type[Exchange] = Exchange) -> Exchange:
        port = next(self._ports)
        connection = self._connections.get(port)
        if connection is None or connection.transport.is_closing():
            connection = self._connections[port] = await connect(port)
        return connection.send(target + b" HTTP/1.1\r\n" + self._headers + rest, kind)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.transport.close()


async def work(given: argparse.Namespace, number: int, ends: Ends | None) -> list[Exchange]:
    client = Client(given, number)
    done: list[Exchange] = []
    previous_id = None
    for _ in range(given.count // given.concurrency):
        exchange = await client.create(previous_id)
        await exchange.finished
        if ends is not None:
            response_id = exchange.answer()["id"]
            await ends.wait_for(response_id)
            exchange = await client.fetch(response_id)
            await exchange.finished
        done.append(exchange)
        if given.keep == "chains":
            previous_id = exchange.answer().get("id")
    client.close()
    return done


def ends_in(store: str) -> Ends:
    return DatabaseEnds(store) if "://" in store else FileEnds(store)


async def drive(given: argparse.Namespace) -> None:
    ends = ends_in(given.store) if given.store else None
    looking = asyncio.create_task(ends.look_again_and_again()) if ends else None
    begun_at = time.perf_counter()
    async with asyncio.timeout(DEADLINE_S):
        workers = await asyncio.gather(*(work(given, number, ends) for number in range(given.concurrency)))
    took_s = time.perf_counter() - begun_at
    if looking:
        looking.cancel()
    exchanges = [exchange for done in workers for exchange in done]
    wanted = "queued" if given.mode == "admit" else "completed"
    print(orjson.dumps({"took_s": took_s, **summary(exchanges, wanted)}).decode())


def summary(exchanges: Sequence[Exchange], wanted: str) -> dict[str, object]:
    answers = [exchange.answer() for exchange in exchanges]
    return {
        "requests": len(exchanges),
        "failed": sum(answer.get("status") != wanted for answer in answers),
        "characters": sum(map(text_length, answers)),
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
        clients = [Client(given, number) for number in range(given.count)]
        exchanges = [await client.create() for client in clients]
        await asyncio.gather(*(exchange.begun for exchange in exchanges))
    print(orjson.dumps({"requests": len(exchanges), "failed": 0}).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for client in clients:
        client.close()


def ports_in(given: str) -> list[int]:
    return [int(port) for port in given.split(",")]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--port", type=ports_in, required=True)
    flags.add_argument("--mode", choices=("stream", "plain", "admit", "hold", "upload"), required=True)
    flags.add_argument("--keep", choices=("nothing", "turns", "chains"), default="nothing")
    flags.add_argument("--background", action="store_true")
    flags.add_argument("--passing", action="store_true")
    flags.add_argument("--megabytes", type=int, default=1)
    flags.add_argument("--store")
    flags.add_argument("--owners", type=int, default=0)
    flags.add_argument("--concurrency", type=int, default=1)
    flags.add_argument("--count", type=int, required=True)
    given = flags.parse_args()
    uvloop.run(hold(given) if given.mode == "hold" else drive(given))


if __name__ == "__main__":
    main()
