"""What fault tests and `bench/campaign.py` share: a backend that remembers, proxies that are killed, and a campaign.

The backend's answer is made of everything it was sent, so that wrong content and a missing parent can be told. Proxies
are real processes on one store. A campaign is many background runs under clients that never give up, while processes
are killed; its report counts what must not happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import aiohttp

Json = dict[str, Any]
# Who said what, oldest first.
Transcript = tuple[tuple[str, str], ...]

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0
LOOK_EVERY_S = 0.01
PIECES = 8
TERMINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})
LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})
# How far a response has come, which never becomes less.
STAGES = {"queued": 0, "in_progress": 1, **dict.fromkeys(TERMINAL, 2)}
# What a client sees of a process that is gone, or of one that leaves a stream.
BROKEN = (aiohttp.ClientError, asyncio.IncompleteReadError, ConnectionError, TimeoutError)


async def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """What the condition gives as soon as that is something; it may be a coroutine function."""
    ends_at = time.monotonic() + deadline_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < ends_at, f"in {deadline_s:g} s there was no {what}"
        await asyncio.sleep(LOOK_EVERY_S)


# -- the backend -------------------------------------------------------------------------------------------------------


def pieces_of(transcript: Transcript) -> list[str]:
    """The answer to a transcript, in the pieces in which it is streamed."""
    digest = hashlib.sha256(json.dumps(transcript).encode()).hexdigest()
    return [f"{digest[at * 4 : at * 4 + 4]} " for at in range(PIECES - 1)] + [f"<{len(transcript)}>"]


def answer_to(transcript: Transcript) -> str:
    return "".join(pieces_of(transcript))


def asked(prompt: str, before: Transcript = ()) -> Transcript:
    return (*before, ("user", prompt))


def answered(transcript: Transcript) -> Transcript:
    return (*transcript, ("assistant", answer_to(transcript)))


@dataclass(frozen=True)
class Pace:
    """Seconds before the headers and before each piece; the generation stands still before the pieces in `held_at`.

    -1: before the headers; PIECES: before the end.
    """

    before_s: float = 0.0
    every_s: float = 0.0
    held_at: frozenset[int] = frozenset()


@dataclass
class Generation:
    """One request for a prompt: when it was open, in seconds of the loop, and how much was sent."""

    prompt: str
    began_at: float
    ended_at: float | None = None
    sent: int = 0
    is_whole: bool = False
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0), repr=False)

    @property
    def is_open(self) -> bool:
        return self.ended_at is None

    def go_on(self) -> None:
        """To the next place where it stands still."""
        self.gate.release()


class Backend:
    """Answers every prompt at its own pace. What is held goes on when it is let go."""

    def __init__(self, pace_of: Callable[[str], Pace] = lambda prompt: Pace()) -> None:
        self.url = ""
        self.generations: list[Generation] = []
        self._pace_of = pace_of
        self._let_go: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, prompt: str) -> list[Generation]:
        return [each for each in self.generations if each.prompt == prompt]

    def let_go(self, prompt: str) -> None:
        """It is not held any more, in no attempt."""
        self._let_go.add(prompt)
        for generation in self.of(prompt):
            generation.go_on()

    async def begun(self, prompt: str, times: int = 1, sent: int = 0, deadline_s: float = DEADLINE_S) -> Generation:
        """The prompt's generation of that number, once that many pieces of it were sent."""

        def found() -> Generation | None:
            every = self.of(prompt)
            return every[times - 1] if len(every) >= times and every[times - 1].sent >= sent else None

        generation: Generation = await until(found, f"generation {times} of '{prompt}' with {sent} pieces", deadline_s)
        return generation

    def doubles(self, noticed_within_s: float = 0.0) -> list[str]:
        """Prompts for which two requests were open at the same time, for longer than it takes to notice an end."""
        by_prompt: dict[str, list[Generation]] = {}
        for each in self.generations:
            by_prompt.setdefault(each.prompt, []).append(each)
        return [prompt for prompt, every in by_prompt.items() if _overlap(every, noticed_within_s)]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Backend]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while request := await _read_request(reader):
                if not await self._answer(*request, reader, writer):
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, path: str, raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can be used again."""
        if not path.endswith("/chat/completions"):
            writer.write(_plain({"object": "list", "data": [{"id": "m", "object": "model"}]}))
            return True
        body = json.loads(raw)
        transcript = tuple((each["role"], _text(each["content"])) for each in body["messages"])
        generation = Generation(transcript[-1][1], asyncio.get_running_loop().time())
        self.generations.append(generation)
        playing = asyncio.ensure_future(self._play(generation, transcript, bool(body.get("stream")), writer))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
            return generation.is_whole
        finally:
            generation.ended_at = asyncio.get_running_loop().time()
            for each in (playing, watching):
                each.cancel()
            await asyncio.gather(playing, watching, return_exceptions=True)

    async def _play(
        self, generation: Generation, transcript: Transcript, is_streamed: bool, writer: asyncio.StreamWriter
    ) -> None:
        pace = self._pace_of(generation.prompt)
        await asyncio.sleep(pace.before_s)
        await self._pass(generation, pace, -1)
        if is_streamed:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        pieces = pieces_of(transcript)
        for number, piece in enumerate(pieces):
            await asyncio.sleep(pace.every_s)
            await self._pass(generation, pace, number)
            if is_streamed:
                writer.write(_chunk([{"index": 0, "delta": {"content": piece}, "finish_reason": None}]))
                await writer.drain()
            generation.sent += 1
        await self._pass(generation, pace, PIECES)
        choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
        message = {**choice, "message": {"role": "assistant", "content": "".join(pieces)}}
        last = _chunk([choice]) + _chunk([], usage=USAGE) + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        writer.write(last if is_streamed else _plain({**ENVELOPE, "choices": [message], "usage": USAGE}))
        await writer.drain()
        generation.is_whole = True

    async def _pass(self, generation: Generation, pace: Pace, place: int) -> None:
        if place in pace.held_at and generation.prompt not in self._let_go:
            await generation.gate.acquire()


USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
ENVELOPE = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def _overlap(generations: list[Generation], noticed_within_s: float) -> bool:
    """Of generations in the order in which they began."""
    pairs = itertools.pairwise(generations)
    return any(one.ended_at is None or one.ended_at > next_one.began_at + noticed_within_s for one, next_one in pairs)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chunk(choices: list[Json], **fields: Any) -> bytes:
    return _framed(b"data: %b\n\n" % json.dumps({**ENVELOPE, "choices": choices, **fields}).encode())


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _plain(body: Json) -> bytes:
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw)


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, bytes] | None:
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first.split()[1], await reader.readexactly(int(headers.get("content-length", 0)))


# -- proxies -----------------------------------------------------------------------------------------------------------

LISTENING = re.compile(r"running on (http://\S+)")
CONFIG = """[server]
keepalive_s = 2.0
shutdown_grace_s = {shutdown_grace_s}
[background]
workers = {workers}
lease_s = {lease_s}
max_attempts = {max_attempts}
[[upstream]]
base_url = "{upstream}"
dialect = "generic"
"""


@dataclass(frozen=True)
class Knobs:
    """The settings that tests turn."""

    workers: int = 8
    lease_s: float = 1.0
    max_attempts: int = 1000
    shutdown_grace_s: float = 10.0


class Proxy:
    """A proxy as a process, which can be started again after its end: its address, and what it said."""

    def __init__(self, *command: str, **environ: str) -> None:
        self.url: str | None = None
        self.output: list[str] = []
        self._command = command
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RESPONSES_PROXY_")}
        environ = {**kept, "PYTHONPATH": str(ROOT), **self._environ}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            cwd=ROOT,
            env=environ,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._listening = asyncio.create_task(self._listen(self._process))
        await until(lambda: self.url or self._process_has_ended(), "proxy that listens")
        assert self.url, f"it ended early: {self.said()}"

    def _process_has_ended(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := (await process.stderr.readline()).decode():
            self.output.append(line)
            if found := LISTENING.search(line):
                self.url = found[1]

    def said(self) -> str:
        return "".join(self.output)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """As `kill -9`."""
        self.url = None
        self.signal(signal.SIGKILL)
        assert await self.ended() == -signal.SIGKILL

    async def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Its exit code."""
        assert self._process is not None
        assert self._listening is not None
        async with asyncio.timeout(DEADLINE_S):
            code = await self._process.wait()
            await self._listening
        self.url = None
        return code

    async def close(self) -> None:
        """Whatever it does just now, and the workers that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self.ended()


class Shared(Protocol):
    """Where the store of a fleet is; the places of `store_places` are such."""

    @property
    def environ(self) -> dict[str, str]:
        """What names it to a proxy."""

    def asked(self, query: str, *values: Any) -> list[Any]:
        """What a statement gives or does there."""


class Fleet:
    """Proxies on one store in front of one backend, and clients of them."""

    def __init__(self, backend: Backend, place: Shared, folder: Path, http: aiohttp.ClientSession) -> None:
        self.backend = backend
        self.place = place
        self.http = http
        self.proxies: list[Proxy] = []
        self._folder = folder

    async def start(self, knobs: Knobs = Knobs(), **environ: str) -> Proxy:
        """`environ` goes before what names the store."""
        arguments = ("proxy.py", "--config", self.config(knobs), "--port", "0")
        return await self.started(Proxy(*arguments, **{**self.place.environ, **environ}))

    async def started(self, proxy: Proxy) -> Proxy:
        self.proxies.append(proxy)
        await proxy.start()
        return proxy

    def config(self, knobs: Knobs) -> str:
        """A settings file."""
        path = self._folder / f"config{len(self.proxies)}.toml"
        path.write_text(CONFIG.format(**vars(knobs), upstream=self.backend.url))
        return str(path)

    def any(self, random: Random) -> Proxy | None:
        living = [proxy for proxy in self.proxies if proxy.url]
        return random.choice(living) if living else None

    async def post(self, proxy: Proxy, body: Json, path: str = "", key: str | None = None) -> Json:
        """The answer of a 200."""
        headers = {"Idempotency-Key": key} if key else {}
        async with self.http.post(f"{proxy.url}/v1/responses{path}", json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            made: Json = await answer.json()
            return made

    async def create(self, proxy: Proxy, prompt: str, **fields: Any) -> Json:
        """The response of a background run as it is queued."""
        return await self.post(proxy, request_of(prompt, **fields))

    async def cancel(self, proxy: Proxy, response_id: str) -> Json:
        return await self.post(proxy, {}, f"/{response_id}/cancel")

    async def get(self, proxy: Proxy, response_id: str) -> Json:
        async with self.http.get(f"{proxy.url}/v1/responses/{response_id}") as answer:
            assert answer.status == 200, await answer.text()
            got: Json = await answer.json()
            return got

    async def finished(self, proxy: Proxy, response_id: str, deadline_s: float = DEADLINE_S) -> Json:
        """The response when it is terminal."""

        async def look() -> Json | None:
            response = await self.get(proxy, response_id)
            return response if response["status"] in TERMINAL else None

        response: Json = await until(look, f"end of {response_id}", deadline_s)
        return response

    async def tail(self, proxy: Proxy, response_id: str, after: int | None = None) -> AsyncGenerator[Json, None]:
        """The events behind a number. Raises: what is in BROKEN, when the stream is cut."""
        params = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
        async with self.http.get(f"{proxy.url}/v1/responses/{response_id}", params=params) as answer:
            assert answer.status == 200, await answer.text()
            async for event in events_of(answer):
                yield event

    async def told(self, proxy: Proxy, response_id: str, after: int | None = None) -> list[Json]:
        """All events to the end."""
        return [event async for event in self.tail(proxy, response_id, after)]

    async def close(self) -> None:
        await asyncio.gather(*(proxy.close() for proxy in self.proxies))


@contextlib.asynccontextmanager
async def running_fleet(place: Shared, folder: Path, pace_of: Callable[[str], Pace]) -> AsyncIterator[Fleet]:
    """`folder`: for settings files."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=15)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        Backend(pace_of).running() as backend,
        aiohttp.ClientSession(timeout=timeout, connector=connector) as http,
    ):
        fleet = Fleet(backend, place, folder, http)
        try:
            yield fleet
        finally:
            await fleet.close()


def request_of(prompt: str, **fields: Any) -> Json:
    return {"model": "m", "input": prompt, "background": True, **fields}


def text_of(response: Json) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def events_of(answer: aiohttp.ClientResponse) -> AsyncGenerator[Json, None]:
    """Raises: IncompleteReadError for a stream without `[DONE]`, and what is in BROKEN."""
    while line := await answer.content.readline():
        if line == b"data: [DONE]\n":
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise asyncio.IncompleteReadError(b"", None)


# -- what a reader of events holds them to -----------------------------------------------------------------------------


@dataclass
class Reading:
    """The events that one client was told, over all its connections; `faults` says what was wrong with them."""

    events: list[Json] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    attempts: int = 0
    text: str = ""
    final: Json | None = None

    @property
    def last(self) -> int | None:
        return self.events[-1]["sequence_number"] if self.events else None

    def note(self, event: Json) -> None:
        """Numbers have no gap; an attempt begins empty, and is told whole."""
        expected = -1 if self.last is None else self.last
        if event["sequence_number"] != expected + 1 or self.final is not None:
            self.faults.append(f"{event['sequence_number']} ({event['type']}) came after {expected}")
        self.events.append(event)
        if event["type"] == "response.in_progress":
            self.attempts += 1
            self.text = ""
            if event["response"]["output"]:
                self.faults.append(f"attempt {self.attempts} does not begin empty")
        elif event["type"] == "response.output_text.delta":
            self.text += event["delta"]
        elif event["type"] in LAST_EVENTS:
            self.final = event["response"]


# -- a campaign --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is done to how many runs; a third is streamed, and a third continues a run that has not ended."""

    seed: int
    runs: int = 200
    kills: int = 10
    processes: int = 1
    clients: int = 24
    knobs: Knobs = Knobs(workers=16)
    deadline_s: float = 50.0
    # A key or a conversation that a dead process held is free after 30 s. True: the test lets that time pass at once.
    is_impatient: bool = True
    # How long after it the backend may see an end; it matters where a run is handed over at once.
    noticed_within_s: float = 0.0


@dataclass
class Known:
    """What clients know of one run. `status` is the newest one that was seen, `final` the response at its end."""

    prompt: str
    body: Json
    transcript: Transcript = ()
    parent: Known | None = None
    response_id: str | None = None
    status: str = ""
    final: Json | None = None
    reading: Reading | None = None
    is_lost: bool = False

    @property
    def is_done(self) -> bool:
        """Whether its client has nothing to wait for any more."""
        is_told = self.reading is None or self.reading.final is not None
        return self.is_lost or (self.final is not None and is_told)


@dataclass
class Report:
    """What happened. `faults` names each thing that must not happen by its kind; the rest shows that much did."""

    faults: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    runs: int = 0
    streamed: int = 0
    on_unfinished: int = 0
    kills: int = 0
    takeovers: int = 0
    resumes: int = 0
    resumed_attempts: int = 0
    creates_again: int = 0
    seconds: float = 0.0

    def fault(self, kind: str, detail: str) -> None:
        self.faults[kind] += 1
        self.details.append(f"{kind}: {detail}")


KINDS = ("lost", "stuck", "wrong", "flips", "gaps", "doubles", "twice", "refused", "tracebacks")


class Campaign:
    """Clients, a poller and a killer at work on one fleet."""

    def __init__(self, fleet: Fleet, plan: Plan) -> None:
        self.report = Report()
        self._fleet = fleet
        self._plan = plan
        self._random = Random(plan.seed)
        self._known: list[Known] = []
        self._allowed = asyncio.Semaphore(0)
        self._todo = self._drawn()

    def _drawn(self) -> list[Known]:
        numbers = range(self._plan.runs)
        streamed = set(self._random.sample(numbers, self._plan.runs // 3))
        chained = set(self._random.sample(numbers[4:], self._plan.runs // 3))
        drawn = []
        for number in numbers:
            prompt = f"run {number}"
            body = request_of(prompt, stream=number in streamed, metadata={"chained": str(number in chained)})
            drawn.append(Known(prompt, body, reading=Reading() if number in streamed else None))
        return drawn[::-1]

    async def run(self) -> Report:
        began_at = time.monotonic()
        for _ in range(self._plan.processes):
            await self._fleet.start(self._plan.knobs)
        clients = [asyncio.create_task(self._client()) for _ in range(self._plan.clients)]
        polling = asyncio.create_task(self._poll_again_and_again())
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                await self._kill_again_and_again()
                await asyncio.gather(*clients)
        except TimeoutError:
            self.report.details.append("the campaign did not end in time")
        finally:
            for task in (*clients, polling):
                task.cancel()
            ended = await asyncio.gather(*clients, polling, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        await self._look_at_all()
        self.report.seconds = time.monotonic() - began_at
        return self.report

    # -- processes die -------------------------------------------------------------------------------------------------

    async def _kill_again_and_again(self) -> None:
        """New runs are allowed for each life of a process, so that every death meets some at every stage."""
        share, rest = divmod(self._plan.runs, self._plan.kills + 1)
        for number in range(self._plan.kills):
            self._allow(share)
            await self._until_known(number * share + 1)
            await asyncio.sleep(self._random.uniform(0, 0.9))
            victim = self._random.choice(self._fleet.proxies)
            await victim.kill()
            self.report.kills += 1
            if self._plan.is_impatient:
                self._fleet.place.asked("UPDATE lease SET until_at = 0")
            await victim.start()
        self._allow(share + rest)

    async def _until_known(self, count: int) -> None:
        await until(lambda: len(self._known) >= count, f"run {count}", self._plan.deadline_s)

    def _allow(self, runs: int) -> None:
        for _ in range(runs):
            self._allowed.release()

    # -- clients -------------------------------------------------------------------------------------------------------

    async def _client(self) -> None:
        while self._todo:
            known = self._todo.pop()
            await self._allowed.acquire()
            await self._continue(known)
            await self._create(known)
            if known.parent and known.parent.status not in TERMINAL and known.parent.response_id:
                await self._see(known.parent)
                self.report.on_unfinished += known.parent.status not in TERMINAL
            while not known.is_done:
                if known.reading:
                    await self._read(known)
                await self._see(known)
                await asyncio.sleep(0.05)

    async def _continue(self, known: Known) -> None:
        """Chains it to a run that has not ended, as far as its client knows."""
        if known.body["metadata"]["chained"] == "True":
            await until(lambda: self._known, "run to continue", self._plan.deadline_s)
            running = [each for each in self._known if each.status not in TERMINAL] or self._known[-1:]
            known.parent = self._random.choice(running)
            known.body["previous_response_id"] = known.parent.response_id
        known.transcript = asked(known.prompt, answered(known.parent.transcript) if known.parent else ())

    async def _create(self, known: Known) -> None:
        """Until it is acknowledged, with the same key each time; many a client does not wait for the first answer."""
        tries = 0
        patience_s = self._random.choice((None, None, self._random.uniform(0, 0.02)))
        while known.response_id is None:
            tries += 1
            if proxy := self._fleet.any(self._random):
                with contextlib.suppress(*BROKEN):
                    await self._create_once(proxy, known, patience_s if tries == 1 else None)
            if known.response_id is None:
                await asyncio.sleep(0.05)
        self.report.creates_again += tries > 1
        self.report.runs += 1
        self.report.streamed += known.reading is not None
        self._known.append(known)

    async def _create_once(self, proxy: Proxy, known: Known, patience_s: float | None) -> None:
        headers = {"Idempotency-Key": known.prompt}
        url = f"{proxy.url}/v1/responses"
        async with asyncio.timeout(patience_s), self._fleet.http.post(url, json=known.body, headers=headers) as answer:
            if answer.status != 200:
                self._refused(known, answer.status, await answer.text())
            elif known.reading:
                await self._follow(known, events_of(answer))
            else:
                response = await answer.json()
                known.response_id, known.status = response["id"], response["status"]

    def _refused(self, known: Known, status: int, text: str) -> None:
        """A key whose first use died with its process is in use for a while, and a busy store says so."""
        if "idempotency_key_in_use" not in text and "store_unavailable" not in text:
            self.report.fault("refused", f"{known.prompt}: {status} {text}")

    async def _follow(self, known: Known, events: AsyncGenerator[Json, None]) -> None:
        """Reads on, and now and then leaves in the middle."""
        assert known.reading is not None
        leaves_after = self._random.choice((2, 5, 9, 1000))
        async with contextlib.aclosing(events) as told:
            async for event in told:
                known.reading.note(event)
                if "response" in event:
                    known.response_id = event["response"]["id"]
                leaves_after -= 1
                if leaves_after == 0:
                    return

    async def _read(self, known: Known) -> None:
        """One connection more of a reader that has not come to the end."""
        assert known.reading is not None
        assert known.response_id is not None
        proxy = self._fleet.any(self._random)
        if proxy and known.reading.final is None:
            self.report.resumes += 1
            with contextlib.suppress(*BROKEN):
                await self._follow(known, self._fleet.tail(proxy, known.response_id, known.reading.last))

    # -- statuses ------------------------------------------------------------------------------------------------------

    async def _poll_again_and_again(self) -> None:
        while True:
            for known in self._random.sample(self._known, min(8, len(self._known))):
                await self._see(known)
            await asyncio.sleep(0.05)

    async def _see(self, known: Known) -> None:
        """Looks at a run once, and holds what it is to what it was before."""
        before, final, proxy = known.status, known.final, self._fleet.any(self._random)
        if proxy is None:
            return
        try:
            async with self._fleet.http.get(f"{proxy.url}/v1/responses/{known.response_id}") as answer:
                status, text = answer.status, await answer.text()
        except BROKEN:
            return
        if status == 404:
            self.report.fault("lost", f"{known.prompt} {known.response_id} is not known any more")
            known.is_lost = True
        elif status != 200:
            self._refused(known, status, text)
        else:
            self._compare(known, json.loads(text), before, final)

    def _compare(self, known: Known, response: Json, before: str, final: Json | None) -> None:
        if STAGES[response["status"]] < STAGES.get(before, 0) or (final and response != final):
            self.report.fault("flips", f"{known.prompt}: {before} {final}, and then {response}")
        if response["status"] in TERMINAL:
            known.final = response
        if STAGES[response["status"]] >= STAGES.get(known.status, 0):
            known.status = response["status"]

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> None:
        """Once more at everything, when nothing happens any more."""
        for known in self._known:
            await self._see(known)
            if not known.is_done:
                self.report.fault("stuck", f"{known.prompt} is {known.status}")
            elif known.final is not None:
                self._check(known, known.final)
            if known.final and known.reading and known.reading.final:
                await self._hold_to_log(known, known.reading)
        for prompt in self._fleet.backend.doubles(self._plan.noticed_within_s):
            self.report.fault("doubles", f"{prompt}: {self._fleet.backend.of(prompt)}")
        for _ in range(self._plan.runs - len(self._known)):
            self.report.fault("lost", "a run that was never acknowledged")
        await self._count_rows()
        self.report.takeovers = len(self._fleet.backend.generations) - len(self._known)
        for proxy in self._fleet.proxies:
            if (at := proxy.said().find("Traceback")) >= 0:
                self.report.fault("tracebacks", proxy.said()[max(at - 500, 0) : at + 6000])

    def _check(self, known: Known, final: Json) -> None:
        if final["status"] != "completed" or text_of(final) != answer_to(known.transcript):
            self.report.fault("wrong", f"{known.prompt}: {final}")

    async def _hold_to_log(self, known: Known, reading: Reading) -> None:
        """What a reader was told in pieces is what the log says now, and ends with the response."""
        proxy = self._fleet.any(self._random)
        assert proxy is not None
        assert known.response_id is not None
        self.report.resumed_attempts += reading.attempts > 1
        for fault in reading.faults:
            self.report.fault("gaps", f"{known.prompt}: {fault}")
        if await self._fleet.told(proxy, known.response_id) != reading.events:
            self.report.fault("gaps", f"{known.prompt}: the log differs from what was told")
        if reading.final != known.final or reading.text != answer_to(known.transcript):
            self.report.fault("wrong", f"{known.prompt}: the stream told {reading.text!r} and {reading.final}")

    async def _count_rows(self) -> None:
        """A create that was sent again has made one response, and not two."""
        ids = {response_id for (response_id,) in self._fleet.place.asked("SELECT id FROM turn")}
        ((runs,),) = self._fleet.place.asked("SELECT count(*) FROM run")
        for extra in ids - {known.response_id for known in self._known}:
            self.report.fault("twice", f"{extra} was acknowledged to nobody")
        if runs:
            self.report.fault("stuck", f"{runs} rows are left in the queue")


async def campaign(plan: Plan, place: Shared, folder: Path) -> Report:
    """Runs it on a new store, with a folder of its own."""

    def pace_of(prompt: str) -> Pace:
        drawn = Random(f"{plan.seed} {prompt}")
        return Pace(drawn.uniform(0, 0.1), drawn.uniform(0.005, 0.03))

    async with running_fleet(place, folder, pace_of) as fleet:
        return await Campaign(fleet, plan).run()
