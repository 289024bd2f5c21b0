"""What several processes count together: two of them on one store, and what becomes of it when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import App, StartApp, running_app, settings_of
from controlled import controlled
from raw_backend import Answer, RawBackend, Seen, whole
from scripted import DEADLINE_S, Backend, Script, chunk, plain, streamed
from socket_client import connected
from test_owners import HI
from test_proxy import error_of
from test_quotas import Clock, OpenQuotas, clock, kind, opened, quota_place, refusal_of, start_app, store, text_of

import admissions
from admissions import Quotas
from errors import RateLimited, StoreError
from leases import LEASE_S
from quota_verbs import Charge, Used
from run_verbs import RunStore

__all__ = ["clock", "kind", "opened", "quota_place", "start_app", "store"]

shared = pytest.mark.parametrize("kind", ["file", "postgres"], indirect=True)
UNUSABLE = StoreError("The store of responses cannot be reached.")


# -- several processes -------------------------------------------------------------------------------------------------


async def test_all_processes_count_together(opened: OpenQuotas) -> None:
    one, two = [await opened(requests_per_minute=4) for _ in range(2)]
    told = [text_of(await quotas.admit("alice"))["remaining-requests"] for quotas in (one, two, one, two)]
    refusals = [(await refusal_of(quotas)).message for quotas in (one, two)]
    assert (told, refusals) == (
        ["3", "2", "1", "0"],
        ["Rate limit reached: 4 requests per minute. Please try again in 15s."] * 2,
    )


async def test_what_is_in_flight_at_one_process_counts_at_the_other(opened: OpenQuotas) -> None:
    one, two = [await opened(in_flight_per_owner=2) for _ in range(2)]
    async with await one.admit("alice"), await two.admit("alice") as second:
        assert {(await refusal_of(quotas)).message for quotas in (one, two)} == {
            "Rate limit reached: 2 requests at once. Please try again in 1s."
        }
        await second.over()
        async with await one.admit("alice"):
            await refusal_of(two)


async def test_tokens_that_were_spent_at_one_process_are_spent_at_the_other(opened: OpenQuotas) -> None:
    one, two = [await opened(tokens_per_minute=600, in_flight_per_owner=5) for _ in range(2)]
    async with await one.admit("alice") as admission:
        one.spent("alice", 1199)
        await admission.over()
    assert (await refusal_of(two)).message == "Rate limit reached: 600 tokens per minute. Please try again in 60s."


async def test_how_long_the_last_one_took_is_known_to_the_other(opened: OpenQuotas, clock: Clock) -> None:
    one, two = [await opened(in_flight_per_owner=1) for _ in range(2)]
    async with await one.admit("alice"):
        clock.now += 20
    async with await one.admit("alice"):
        assert (await refusal_of(two)).retry_after_s == 20


async def test_of_many_at_once_no_more_are_admitted_than_may_be(opened: OpenQuotas) -> None:
    processes = [await opened(in_flight_per_owner=7) for _ in range(4)]
    asked = (quotas.admit("alice") for quotas in processes for _ in range(10))
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, RateLimited) for each in found) == 33
    for each in found:
        if not isinstance(each, BaseException):
            await each.over()
    await processes[0].admit("alice")


# -- a process that is gone --------------------------------------------------------------------------------------------


async def test_what_a_killed_process_had_in_flight_is_free_some_time_later(opened: OpenQuotas, clock: Clock) -> None:
    killed, left = [await opened(in_flight_per_owner=1) for _ in range(2)]
    await killed.admit("alice")
    clock.now += LEASE_S - 1
    await refusal_of(left)
    clock.now += 1
    await left.admit("alice")


async def test_what_a_process_had_in_flight_is_free_when_it_has_ended(opened: OpenQuotas) -> None:
    ended, left = [await opened(in_flight_per_owner=1) for _ in range(2)]
    await ended.admit("alice")
    await ended.close()
    await left.admit("alice")


async def test_what_is_long_in_flight_at_a_living_process_stays_so(
    opened: OpenQuotas, clock: Clock, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admissions, "RENEW_EVERY_S", 0.001)
    one, two = [await opened(in_flight_per_owner=1) for _ in range(2)]
    await one.admit("alice")
    for _ in range(5):
        clock.now += LEASE_S / 2
        await until(lambda: is_known(two, store, clock))
    clock.now += 10 * LEASE_S  # as if the store could not be used for so long; its lease was swept
    await store.purge(0.0, clock.now)
    await until(lambda: is_known(two, store, clock))
    await refusal_of(two)


async def is_known(other: Quotas, store: RunStore, clock: Clock) -> bool:
    """Whether the flight counts for another holder, at the end of half a lease from now too."""
    told = other.charge("alice", 0, 0.0, None)
    later = Charge(owner="alice", holder=told.holder, now=clock.now + LEASE_S / 2, in_flight=0)
    return (await store.charge(later)).elsewhere == 1


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await is_so():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


# -- a store that cannot be used ---------------------------------------------------------------------------------------


class Flaky:
    """A store whose charges wait, or fail, and may have been carried out all the same."""

    def __init__(self, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self._charge = store.charge
        self.charges: list[Charge] = []
        self.failure: StoreError | None = None
        self.is_lost = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        monkeypatch.setattr(store, "charge", self.charge, raising=False)

    async def charge(self, charge: Charge) -> Used:
        self.charges.append(charge)
        if self.failure and self.is_lost:
            raise self.failure.with_traceback(None)
        used = await self._charge(charge)
        await self.may_answer.wait()
        if self.failure:
            raise self.failure.with_traceback(None)
        return used


@pytest.fixture
def flaky(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> Flaky:
    monkeypatch.setattr(admissions, "TELL_AGAIN_S", 0.001)
    return Flaky(store, monkeypatch)


async def is_free(quotas: Quotas) -> bool:
    try:
        admission = await quotas.admit("alice")
    except RateLimited:
        return False
    await admission.over()
    return True


@pytest.mark.parametrize("is_lost", [True, False], ids=["not carried out", "carried out"])
async def test_while_the_store_cannot_be_used_nobody_is_admitted_and_later_all_is_right(
    opened: OpenQuotas, flaky: Flaky, is_lost: bool
) -> None:
    quotas, other = [await opened(in_flight_per_owner=2, tokens_per_minute=6000) for _ in range(2)]
    held = await quotas.admit("alice")
    flaky.failure, flaky.is_lost = UNUSABLE, is_lost
    asked = [quotas.admit("alice") for _ in range(3)]
    assert await asyncio.gather(*asked, return_exceptions=True) == [UNUSABLE] * 3
    quotas.spent("alice", 600 if is_lost else 0)
    flaky.failure = None
    await until(lambda: is_free(other))
    await held.over()
    async with await other.admit("alice") as first, await other.admit("alice"):
        assert text_of(first)["remaining-tokens"] == ("5400" if is_lost else "6000")


async def test_tokens_that_may_be_counted_already_are_not_counted_again(opened: OpenQuotas, flaky: Flaky) -> None:
    quotas = await opened(tokens_per_minute=6000)
    flaky.failure = StoreError("It was written, or it was not.")
    flaky.failure.is_unsure = True
    quotas.spent("alice", 600)
    with pytest.raises(StoreError):
        await quotas.admit("alice")
    flaky.failure = None
    async with await quotas.admit("alice") as admission:
        assert text_of(admission)["remaining-tokens"] == "5400"


async def test_all_who_wait_are_refused_with_the_first_of_them(opened: OpenQuotas, flaky: Flaky) -> None:
    quotas = await opened(requests_per_minute=60)
    flaky.failure = UNUSABLE
    flaky.may_answer.clear()
    asked = asyncio.gather(*(quotas.admit("alice") for _ in range(10)), return_exceptions=True)
    await until(lambda: asyncio.sleep(0, bool(flaky.charges)))
    flaky.may_answer.set()
    assert (await asked, len(flaky.charges)) == ([UNUSABLE] * 10, 1)


async def test_an_answer_does_not_wait_long_for_a_store_that_does_not_answer(
    opened: OpenQuotas, flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admissions, "KNOWN_WITHIN_S", 0.01)
    quotas = await opened(in_flight_per_owner=1)
    admission = await quotas.admit("alice")
    flaky.may_answer.clear()
    async with asyncio.timeout(DEADLINE_S):
        await admission.over()
    flaky.may_answer.set()
    await until(lambda: is_free(quotas))


@pytest.mark.parametrize("steps", range(12))
async def test_who_is_cancelled_has_nothing_in_flight(opened: OpenQuotas, flaky: Flaky, steps: int) -> None:
    quotas, other = [await opened(in_flight_per_owner=1) for _ in range(2)]
    flaky.may_answer.clear()
    asking = asyncio.create_task(quotas.admit("alice"))
    await until(lambda: asyncio.sleep(0, bool(flaky.charges)))
    if steps:
        flaky.may_answer.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    flaky.may_answer.set()
    if not asking.cancelled():
        await asking.result().over()
    await until(lambda: is_free(other))


async def test_what_ends_while_the_store_is_told_goes_into_one_write(opened: OpenQuotas, flaky: Flaky) -> None:
    quotas = await opened(in_flight_per_owner=20, tokens_per_minute=6000)
    held = [await quotas.admit("alice") for _ in range(10)]
    flaky.charges.clear()
    for admission in held:
        quotas.spent("alice", 60)
        admission.release()
    async with await quotas.admit("alice") as last:
        assert text_of(last)["remaining-tokens"] == "5400"
    assert [(charge.in_flight, charge.has_wish) for charge in flaky.charges] == [(0, True), (0, False)]


# -- the running proxy -------------------------------------------------------------------------------------------------


Ask = Callable[[App], Awaitable[str]]


async def by_plain(app: App) -> str:
    return (await app.openai.responses.create(model="m", input="Hi")).status or ""


async def by_stream(app: App) -> str:
    """As soon as the last event is there, and not at the end of the answer."""
    async for event in await app.openai.responses.create(model="m", input="Hi", stream=True):
        if event.type == "response.completed":
            return "completed"
    return "cut"


async def by_socket(app: App) -> str:
    async with connected(app) as socket:
        await socket.create("Hi")
        return str((await socket.ended())["status"])


async def by_chat(app: App) -> str:
    async with app.post({"model": "m", "messages": []}, "/v1/chat/completions") as answer:
        await answer.read()
        return "completed" if answer.status == 200 else str(answer.status)


async def by_background(app: App) -> str:
    return "completed" if (await app.openai.responses.create(model="m", input="Hi", background=True)).id else ""


ASK: dict[str, tuple[Ask, Callable[[], Script]]] = {
    "plain": (by_plain, plain),
    "stream": (by_stream, lambda: streamed("Hello")),
    "socket": (by_socket, lambda: streamed("Hello")),
    "background": (by_background, lambda: streamed("Hello")),
    "chat": (by_chat, plain),
}


@shared
@pytest.mark.parametrize("mode", sorted(ASK))
async def test_who_has_an_answer_may_ask_another_process_at_once(
    start_app: StartApp, backend: Backend, mode: str
) -> None:
    apps = [await start_app(limits={"in_flight_per_owner": 1, "tokens_per_minute": 1_000_000}) for _ in range(2)]
    ask, script = ASK[mode]
    backend.script(*(script() for _ in range(20)))
    assert [await ask(apps[number % 2]) for number in range(20)] == ["completed"] * 20


@pytest.mark.parametrize("kind", ["file"], indirect=True)
@pytest.mark.parametrize("mode", ["plain", "stream", "socket", "chat"])
async def test_no_answer_ends_before_the_store_knows_that_it_is_over(
    start_app: StartApp, backend: Backend, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(admissions, "KNOWN_WITHIN_S", DEADLINE_S)
    app = await start_app(limits={"in_flight_per_owner": 1})
    ask, script = ASK[mode]
    held = script()
    held.before = asyncio.Event()
    backend.script(held)
    charging, saving = controlled("charge", monkeypatch), controlled("save", monkeypatch)
    asking = asyncio.create_task(ask(app))
    await backend.received()
    charging.may_begin.clear()
    known = asyncio.create_task(charging.once_more("asked"))
    held.before.set()
    await known
    async with asyncio.timeout(DEADLINE_S):
        while mode in ("plain", "stream") and not saving.done:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)  # an answer that did not wait would be here by now
    assert not asking.done()
    charging.may_begin.set()
    assert await asking == "completed"


async def test_an_answer_of_known_length_that_goes_through_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "KNOWN_WITHIN_S", DEADLINE_S)
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(RawBackend().running())
        limited = settings_of(backend.url, limits={"in_flight_per_owner": 1})
        app = await stack.enter_async_context(running_app(limited))
        charging = controlled("charge", monkeypatch)
        backend.answer = stopping(whole(b"an answer"), charging.may_begin)
        asking = asyncio.create_task(by_chat(app))
        await charging.once_more("asked", times=2)
        await asyncio.sleep(0.05)  # an answer that did not wait would be here by now
        assert not asking.done()
        charging.may_begin.set()
        assert await asking == "completed"


def stopping(answer: Answer, event: asyncio.Event) -> Answer:
    """An answer before which an event is cleared."""

    async def stop_and_answer(seen: Seen) -> None:
        event.clear()
        await answer(seen)

    return stop_and_answer


@shared
async def test_a_refused_request_is_over_before_its_refusal(start_app: StartApp) -> None:
    apps = [await start_app(limits={"in_flight_per_owner": 1}) for _ in range(2)]
    statuses = []
    for number in range(10):
        async with apps[number % 2].post({"model": "m"}) as answer:
            statuses.append(answer.status)
    assert statuses == [400] * 10


@shared
async def test_a_stream_at_one_process_is_in_flight_at_the_other(start_app: StartApp, backend: Backend) -> None:
    one, two = [await start_app(limits={"in_flight_per_owner": 1}) for _ in range(2)]
    backend.script(Script([chunk(content="Hel")], end="silent"), plain())
    async with one.post({**HI, "stream": True}) as answer:
        await answer.content.readany()
        async with two.post(HI) as refused:
            error = await error_of(refused, 429)
    assert error["message"] == "Rate limit reached: 1 requests at once. Please try again in 1s."


@shared
async def test_a_store_that_cannot_count_is_a_503_and_reaches_no_backend(
    start_app: StartApp, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await start_app(limits={"requests_per_minute": 60})

    async def fail(*_: Any) -> Used:
        raise UNUSABLE.with_traceback(None)

    with monkeypatch.context() as patch:
        for name in ("store.SQLiteStore.charge", "store_postgres.PostgresStore.charge"):
            patch.setattr(name, fail)
        async with app.post({**HI, "store": False}) as answer:
            error = await error_of(answer, 503)
    assert (error["code"], len(backend.requests)) == ("store_unavailable", 0)
    assert await by_plain(app) == "completed"


@shared
async def test_a_process_that_stops_tells_what_it_has_used(start_app: StartApp, opened: OpenQuotas) -> None:
    quotas, other = [await opened(tokens_per_minute=600) for _ in range(2)]
    with contextlib.suppress(RateLimited):
        await quotas.admit("alice")
    quotas.spent("alice", 1200)
    await quotas.close()
    await refusal_of(other)
