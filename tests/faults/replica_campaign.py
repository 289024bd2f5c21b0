"""A campaign on replicas: three processes on one PostgreSQL, chats that hop between them, and what befalls them.

Each turn of a chat goes to another replica than the one before, in every form that there is. The backend answers with a
digest of all that it was sent, so an answer proves that its history was whole and nobody else's. Clients do what the
SDKs do: the same request once more, with the same Idempotency-Key, when the connection breaks or the answer says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from campaign_harness import (
    BROKEN,
    TERMINAL,
    Backend,
    Campaign,
    Fleet,
    Knobs,
    Known,
    Pace,
    Plan,
    Proxy,
    Reading,
    Report,
    answer_to,
    answered,
    asked,
    events_of,
    until,
)
from postgres_server import Beside

Json = dict[str, Any]

DEFAULT = Knobs()
SEALING_KEY = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
# What a key or a conversation of a dead process keeps others waiting is 30 s; in a short campaign it is this.
SHORT_LEASES = """import leases, proxy
leases.LEASE_S, leases.RENEW_EVERY_S = 3.0, 0.75
proxy.main()"""
# How long a process that stops is still sent requests.
NOTICED_AFTER_S = 0.3
# No single request may take longer, whatever happens.
BOUND_S = 30.0
TURNS_A_CHAT = 5
FORMS = ("plain", "streamed", "background", "followed")
BACKGROUND = frozenset({"background", "followed"})
# What a client is told that has to send its request again: it is told so in one clear error.
AGAIN = {
    "store_unavailable": {503},
    "idempotency_key_in_use": {409},
    "still_running": {409},
    "conversation_locked": {400},
}


# -- replicas ----------------------------------------------------------------------------------------------------------


class Address:
    """A database, as replicas are told of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.environ = {"RESPONSES_PROXY_STORE__PATH": url, "RESPONSES_PROXY_SEALING__KEYS": SEALING_KEY}

    def asked(self, query: str, *values: Any) -> list[Any]:
        with contextlib.closing(Beside(self.url)) as beside:
            return beside.asked(query, *values)


class Replicas(Fleet):
    """Processes on one database in front of one backend. Those that leave are sent nothing new."""

    def __init__(
        self, backend: Backend, folder: Path, http: aiohttp.ClientSession, store: str, *, has_short_leases: bool
    ) -> None:
        super().__init__(backend, Address(store), folder, http)
        self.leaving: set[Proxy] = set()
        self.program = ("-c", SHORT_LEASES) if has_short_leases else ("proxy.py",)

    async def start(self, knobs: Knobs = DEFAULT, **environ: str) -> Proxy:
        arguments = (*self.program, "--config", self.config(knobs), "--port", "0")
        return await self.started(Proxy(*arguments, **{**self.place.environ, **environ}))

    async def start_three(self, knobs: Knobs = DEFAULT) -> list[Proxy]:
        return list(await asyncio.gather(*(self.start(knobs) for _ in range(3))))

    def serving(self) -> list[Proxy]:
        return [proxy for proxy in self.proxies if proxy.url and proxy not in self.leaving]

    def any(self, random: Random) -> Proxy | None:
        serving = self.serving()
        return random.choice(serving) if serving else None

    async def leave(self, proxy: Proxy) -> None:
        """It is told to stop, and ends well; those who send the requests learn of it a little later."""
        proxy.signal(signal.SIGTERM)
        await asyncio.sleep(NOTICED_AFTER_S)
        self.leaving.add(proxy)
        assert await proxy.ended() == 0


@contextlib.asynccontextmanager
async def replicas(
    folder: Path, store: str, pace_of: Callable[[str], Pace], *, has_short_leases: bool = True
) -> AsyncIterator[Replicas]:
    """Clients open a connection for each request, as it is seen behind a load balancer that retries unused ones."""
    timeout = aiohttp.ClientTimeout(total=2 * BOUND_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with (
        Backend(pace_of).running() as backend,
        aiohttp.ClientSession(timeout=timeout, connector=connector) as http,
    ):
        fleet = Replicas(backend, folder, http, store, has_short_leases=has_short_leases)
        try:
            yield fleet
        finally:
            await fleet.close()


# -- what is done, and what came of it ---------------------------------------------------------------------------------


@dataclass
class Turn(Known):
    """One turn of a chat. `hurries`: the next one does not wait for its end."""

    form: str = "plain"
    is_to_be_cancelled: bool = False
    hurries: bool = False
    began_at: float = 0.0
    done_at: float = 0.0


@dataclass
class Chat:
    """Turns that continue each other, by their ids or in a conversation."""

    turns: list[Turn]
    has_conversation: bool
    conversation: str | None = None
    newest: Turn | None = None
    last_at: Proxy | None = None


@dataclass(frozen=True)
class ReplicaPlan(Plan):
    """`kills` is how often something befalls the replicas; `runs` how many turns there are in all."""

    runs: int = 240
    processes: int = 3
    noticed_within_s: float = 0.1
    # What may be cut: nothing but streams of background runs when replicas are replaced.
    cuts_allowed: frozenset[str] = frozenset({*FORMS, "cancel", "conversation"})
    again_allowed: frozenset[str] = frozenset(AGAIN)


@dataclass
class ReplicaReport(Report):
    """`again`: what clients had to send again, and why."""

    forms: Counter[str] = field(default_factory=Counter)
    in_conversation: int = 0
    cancelled: int = 0
    unconnected: int = 0
    again: Counter[str] = field(default_factory=Counter)
    begun_again: int = 0
    slowest_recovery_s: float = 0.0
    slowest_turn_s: float = 0.0


Step = Callable[[int], Awaitable[None]]


async def _nothing(number: int) -> None:
    pass


@dataclass(frozen=True)
class Disturbance:
    """What befalls the replicas, in three steps: turns begin before the second one and before the third."""

    strike: Step
    mend: Step = _nothing
    prepare: Step = _nothing


class ReplicaCampaign(Campaign):
    """Chats on replicas, while the disturbance befalls them again and again."""

    report: ReplicaReport

    def __init__(self, fleet: Replicas, plan: ReplicaPlan, disturb: Disturbance) -> None:
        self._chats: list[Chat] = []
        super().__init__(fleet, plan)
        self.report = ReplicaReport()
        self._replicas = fleet
        self._replica_plan = plan
        self._disturb = disturb

    def _drawn(self) -> list[Known]:
        chats, rest = divmod(self._plan.runs, TURNS_A_CHAT)
        lengths = [TURNS_A_CHAT] * chats + ([rest] if rest else [])
        self._chats = [self._drawn_chat(number, length) for number, length in enumerate(lengths)][::-1]
        return []

    def _drawn_chat(self, number: int, length: int) -> Chat:
        chat = Chat([], self._random.random() < 0.25)
        for place in range(length):
            form = self._random.choice(FORMS)
            prompt = f"chat {number} turn {place}"
            body = {"model": "m", "input": prompt, "background": form in BACKGROUND}
            body["stream"] = form in {"streamed", "followed"}
            turn = Turn(prompt, body, form=form, reading=Reading() if body["stream"] else None)
            chance = self._random.random() if form in BACKGROUND else 1.0
            turn.is_to_be_cancelled = chance < 0.2
            turn.hurries = 0.2 <= chance < 0.6 and not chat.has_conversation
            chat.turns.append(turn)
        return chat

    # -- what befalls them ---------------------------------------------------------------------------------------------

    async def _kill_again_and_again(self) -> None:
        """New turns are allowed for each time, so that each meets some at every stage."""
        share, rest = divmod(self._plan.runs, 2 * self._plan.kills + 1)
        for number in range(self._plan.kills):
            await self._disturb.prepare(number)
            self._allow(share)
            await self._until_known(number * 2 * share + 1)
            await asyncio.sleep(self._random.uniform(0, 0.5))
            await self._disturb.strike(number)
            self._allow(share)
            await self._disturb.mend(number)
            self.report.kills += 1
        self._allow(share + rest)

    # -- clients -------------------------------------------------------------------------------------------------------

    async def _client(self) -> None:
        while self._chats:
            chat = self._chats.pop()
            async with asyncio.TaskGroup() as ends:
                for turn in chat.turns:
                    await self._allowed.acquire()
                    await self._go_on(chat, turn)
                    if turn.hurries:
                        ends.create_task(self._until_done(turn))
                    else:
                        await self._until_done(turn)
                        chat.newest = turn if turn.status == "completed" else turn.parent

    async def _go_on(self, chat: Chat, turn: Turn) -> None:
        turn.parent, turn.began_at = chat.newest, time.monotonic()
        turn.transcript = asked(turn.prompt, answered(turn.parent.transcript) if turn.parent else ())
        if chat.has_conversation:
            chat.conversation = chat.conversation or await self._opened(turn)
            turn.body["conversation"] = chat.conversation
            self.report.in_conversation += 1
        elif turn.parent:
            turn.body["previous_response_id"] = turn.parent.response_id
        await self._create_in(chat, turn)
        if turn.is_to_be_cancelled:
            await asyncio.sleep(self._random.uniform(0, 0.3))
            await self._cancel(turn)
        chat.newest = turn

    async def _opened(self, turn: Turn) -> str:
        while True:
            async with (
                self._trying(turn, "conversation") as proxy,
                self._fleet.http.post(f"{proxy.url}/v1/conversations", json={}) as answer,
            ):
                if answer.status == 200:
                    return str((await answer.json())["id"])
                self._refused(turn, answer.status, await answer.text())
            await self._pause()

    async def _create_in(self, chat: Chat, turn: Turn) -> None:
        """Until it is acknowledged: each time at another replica, with the same key."""
        tries = 0
        while not _is_acknowledged(turn):
            tries += 1
            async with self._trying(turn, turn.form, chat.last_at) as chat.last_at:
                await self._create_once(chat.last_at, turn, None)
            if not _is_acknowledged(turn):
                await self._pause()
        self.report.creates_again += tries > 1
        self.report.runs += 1
        self.report.streamed += turn.reading is not None
        self.report.forms[turn.form] += 1
        self.report.on_unfinished += turn.parent is not None and turn.parent.status not in TERMINAL
        self._known.append(turn)

    async def _create_once(self, proxy: Proxy, known: Known, patience_s: float | None) -> None:
        assert isinstance(known, Turn)
        headers = {"Idempotency-Key": known.prompt}
        url = f"{proxy.url}/v1/responses"
        async with self._fleet.http.post(url, json=known.body, headers=headers) as answer:
            if answer.status != 200:
                self._refused(known, answer.status, await answer.text())
            elif known.form == "followed":
                await self._follow(known, events_of(answer))
            elif known.form == "streamed":
                await self._stream(known, events_of(answer))
            else:
                self._acknowledge(known, await answer.json())

    async def _stream(self, turn: Turn, events: AsyncIterator[Json]) -> None:
        """A stream of the foreground is whole, or counts for nothing."""
        reading = Reading()
        async for event in events:
            reading.note(event)
        assert reading.final is not None
        if reading.final["status"] == "failed":
            self._refused(turn, *_failed_as(reading.final))
        else:
            turn.reading = reading
            self._acknowledge(turn, reading.final)

    def _acknowledge(self, turn: Turn, response: Json) -> None:
        turn.response_id, turn.status = response["id"], response["status"]
        if response["status"] in TERMINAL:
            turn.final = response

    async def _cancel(self, turn: Turn) -> None:
        """Through any replica, until it is answered."""
        while turn.status not in TERMINAL:
            before, final = turn.status, turn.final
            async with self._trying(turn, "cancel") as proxy:
                url = f"{proxy.url}/v1/responses/{turn.response_id}/cancel"
                async with self._fleet.http.post(url) as answer:
                    if answer.status != 200:
                        self._refused(turn, answer.status, await answer.text())
                    else:
                        self._compare(turn, await answer.json(), before, final)
            await self._pause()
        self.report.cancelled += turn.status == "cancelled"

    async def _until_done(self, turn: Turn) -> None:
        while not turn.is_done:
            if turn.form == "followed":
                await self._read(turn)
            await self._see(turn)
            await asyncio.sleep(0.05)
        turn.done_at = time.monotonic()

    async def _read(self, known: Known) -> None:
        assert isinstance(known, Turn)
        assert known.reading is not None
        if known.reading.final is not None:
            return
        self.report.resumes += 1
        params = {"stream": "true"} | (
            {} if known.reading.last is None else {"starting_after": str(known.reading.last)}
        )
        async with self._trying(known, "followed") as proxy:
            url = f"{proxy.url}/v1/responses/{known.response_id}"
            async with self._fleet.http.get(url, params=params) as answer:
                if answer.status == 200:
                    await self._follow(known, events_of(answer))
                else:
                    self._refused(known, answer.status, await answer.text())

    async def _see(self, known: Known) -> None:
        began_at = time.monotonic()
        await super()._see(known)
        if time.monotonic() - began_at > BOUND_S:
            self.report.fault("hung", f"a look at {known.prompt}")

    @contextlib.asynccontextmanager
    async def _trying(self, turn: Turn, what: str, not_at: Proxy | None = None) -> AsyncIterator[Proxy]:
        """Another replica than the one given, if there is one; what breaks is the client's to try again."""
        serving = await until(self._replicas.serving, "replica that serves", self._plan.deadline_s)
        others = [proxy for proxy in serving if proxy is not not_at]
        proxy = self._random.choice(others or serving)
        try:
            async with asyncio.timeout(BOUND_S):
                yield proxy
        except aiohttp.ClientConnectorError:
            self.report.unconnected += 1
        except TimeoutError:
            self.report.fault("hung", f"{what} of {turn.prompt} took longer than {BOUND_S:g} s")
        except BROKEN as error:
            self.report.again[f"cut {what}"] += 1
            if what not in self._replica_plan.cuts_allowed:
                self.report.fault("cut", f"{what} of {turn.prompt}: {error!r}")

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.uniform(0.05, 0.15))

    def _refused(self, known: Known, status: int, text: str) -> None:
        """A clear error that says that the request may be sent again."""
        code = json.loads(text)["error"]["code"] or "still_running"
        self.report.again[code] += 1
        if status not in AGAIN.get(code, ()) or code not in self._replica_plan.again_allowed:
            self.report.fault("refused", f"{known.prompt}: {status} {text}")

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _look_at_all(self) -> None:
        await super()._look_at_all()
        by_prompt: dict[str, list[float]] = {}
        waits = []
        for each in self._fleet.backend.generations:
            if before := by_prompt.get(each.prompt):
                waits.append(each.began_at - before[-1])
            by_prompt.setdefault(each.prompt, []).append(each.ended_at or each.began_at)
        turns = {turn.prompt: turn for turn in self._known if isinstance(turn, Turn)}
        again = {prompt: len(ends) - 1 for prompt, ends in by_prompt.items()}
        self.report.takeovers = sum(again[name] for name in again if name in turns and turns[name].form in BACKGROUND)
        self.report.begun_again = sum(again.values()) - self.report.takeovers
        self.report.slowest_recovery_s = round(max(waits, default=0.0), 2)
        took = [turn.done_at - turn.began_at for turn in turns.values() if turn.done_at]
        self.report.slowest_turn_s = round(max(took, default=0.0), 2)

    def _check(self, known: Known, final: Json) -> None:
        assert isinstance(known, Turn)
        if not known.is_to_be_cancelled or final["status"] != "cancelled":
            super()._check(known, final)
        elif final["output"]:
            self.report.fault("wrong", f"{known.prompt} was cancelled, and has output: {final}")

    async def _hold_to_log(self, known: Known, reading: Reading) -> None:
        """Of a stream of the foreground there is no log."""
        assert isinstance(known, Turn)
        if known.form == "followed" and known.status != "cancelled":
            await super()._hold_to_log(known, reading)
            return
        for fault in reading.faults:
            self.report.fault("gaps", f"{known.prompt}: {fault}")
        told = "" if known.status == "cancelled" else answer_to(known.transcript)
        if reading.final != known.final or (told and reading.text != told):
            self.report.fault("wrong", f"{known.prompt}: the stream told {reading.text!r} and {reading.final}")

    async def _count_rows(self) -> None:
        """Each turn has made one response, whatever its client sent again, and nothing waits any more."""
        asked = self._replicas.place.asked
        for (extra,) in asked("SELECT id FROM turn WHERE id IS NOT NULL"):
            if extra not in {known.response_id for known in self._known}:
                self.report.fault("twice", f"{extra} was acknowledged to nobody")
        try:  # what was cancelled is let go when the lease of a dead process runs out
            await until(lambda: not asked("SELECT 1 FROM run"), "end of the queue")
        except AssertionError:
            self.report.fault("stuck", str(asked("SELECT * FROM run")))


def _is_acknowledged(turn: Turn) -> bool:
    return turn.response_id is not None


def _failed_as(response: Json) -> tuple[int, str]:
    """The status and the body that it would have had before its stream began; a failed response tells them in words."""
    message = response["error"]["message"]
    code = next((code for words, code in FAILED_AS.items() if words in message), message)
    return min(AGAIN.get(code, {500})), json.dumps({"error": {"code": code}})


# What a failed response says of an error that has a code of its own.
FAILED_AS = {"store of responses": "store_unavailable", "is still running": "still_running"}


def pace_by(seed: int) -> Callable[[str], Pace]:
    def pace_of(prompt: str) -> Pace:
        drawn = Random(f"{seed} {prompt}")
        return Pace(drawn.uniform(0, 0.2), drawn.uniform(0.01, 0.06))

    return pace_of
