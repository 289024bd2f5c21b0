"""Limits per owner: what is granted, on a clock of the test, and what the running proxy answers. Over every store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from conftest import App, StartApp, at
from replicas import PLACES, place_of
from scripted import DEADLINE_S, END, Backend, Script, chunk, plain, refused, streamed
from store_places import Place
from test_owners import ALICE, AUTH, BOB, HI, Client
from test_proxy import error_of

from admissions import Admission, Quotas, opened_quotas
from errors import RateLimited
from quotas import QuotaSettings, duration
from run_verbs import RunStore
from sources import Ids, Sources
from store import StoreSettings, open_store

LIMIT_HEADERS = [f"x-ratelimit-{key}-requests" for key in ("limit", "remaining", "reset")]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


KINDS = ("memory", *PLACES)
OpenQuotas = Callable[..., Awaitable[Quotas]]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def quota_place(kind: str, tmp_path: Path) -> Iterator[Place | None]:
    """None: in memory."""
    quota_place = None if kind == "memory" else place_of(kind, tmp_path)
    yield quota_place
    if quota_place is not None:
        quota_place.close()


@pytest.fixture
async def store(quota_place: Place | None) -> AsyncIterator[RunStore]:
    store = await (quota_place.open() if quota_place else open_store(StoreSettings(":memory:")))
    yield store
    await store.close()


@pytest.fixture
async def opened(store: RunStore, clock: Clock) -> AsyncIterator[OpenQuotas]:
    """The quotas of one more process: `await opened(requests_per_minute=3)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_them(**limits: int) -> Quotas:
            quotas = await opened_quotas(QuotaSettings(**limits), store, Sources(clock, Ids(clock)))
            assert quotas is not None
            stack.push_async_callback(quotas.close)
            return quotas

        yield open_them


def text_of(admission: Admission | RateLimited) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in admission.headers}


async def refusal_of(quotas: Quotas, owner: str = "alice", **how: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        await quotas.admit(owner, **how)
    return caught.value


# -- the arithmetic ----------------------------------------------------------------------------------------------------


async def test_without_a_limit_nothing_is_counted(store: RunStore, clock: Clock) -> None:
    assert await opened_quotas(QuotaSettings(), store, Sources(clock, Ids(clock))) is None


async def test_the_headers_say_what_is_left_and_when_all_is_back(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(requests_per_minute=60)
    told = [text_of(await quotas.admit("alice")) for _ in range(2)]
    assert told == [
        {"limit-requests": "60", "remaining-requests": "59", "reset-requests": "1s"},
        {"limit-requests": "60", "remaining-requests": "58", "reset-requests": "2s"},
    ]


async def test_one_more_than_the_limit_is_refused_until_one_is_free_again(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(requests_per_minute=3)
    for _ in range(3):
        await quotas.admit("alice")
    clock.now += 5
    refusal = await refusal_of(quotas)
    assert (refusal.http_status, refusal.error_code, refusal.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert refusal.message == "Rate limit reached: 3 requests per minute. Please try again in 15s."
    assert refusal.retry_after_s == 15
    assert text_of(refusal) == {"limit-requests": "3", "remaining-requests": "0", "reset-requests": "55s"}


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 999])
async def test_after_the_wait_that_was_told_one_is_free_and_no_more(
    opened: OpenQuotas, clock: Clock, limit: int
) -> None:
    quotas = await opened(requests_per_minute=limit)
    for _ in range(limit):
        await quotas.admit("alice")
    for _ in range(20):
        clock.now += (await refusal_of(quotas)).retry_after_s or 0.0
        await quotas.admit("alice")
        await refusal_of(quotas)


@pytest.mark.parametrize("limit", range(1, 100, 7))
async def test_one_is_free_when_its_part_of_a_minute_is_over(opened: OpenQuotas, clock: Clock, limit: int) -> None:
    quotas = await opened(requests_per_minute=limit)
    for _ in range(limit):
        await quotas.admit("alice")
    for _ in range(100):
        clock.now += 60 / limit
        await quotas.admit("alice")


async def test_what_is_refused_is_not_counted(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(requests_per_minute=1, in_flight_per_owner=1)
    await quotas.admit("alice")
    waits = [(await refusal_of(quotas)).retry_after_s for _ in range(3)]
    assert waits == [60, 60, 60]


async def test_each_owner_has_its_own_allowance(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(requests_per_minute=1)
    await quotas.admit("alice")
    await quotas.admit("bob")
    await refusal_of(quotas, "alice")
    await refusal_of(quotas, "bob")


async def test_requests_in_flight_are_free_again_when_they_end(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(in_flight_per_owner=2)
    async with await quotas.admit("alice") as first, await quotas.admit("alice"):
        refusal = await refusal_of(quotas)
        assert refusal.message == "Rate limit reached: 2 requests at once. Please try again in 1s."
        first.release()
        first.release()
        await quotas.admit("alice")
        await refusal_of(quotas)
    await quotas.admit("alice")


async def test_what_is_not_held_is_not_in_flight(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(in_flight_per_owner=1)
    async with await quotas.admit("alice"):
        (await quotas.admit("alice", is_held=False)).release()
        await refusal_of(quotas)


@pytest.mark.parametrize(("took_s", "guess_s"), [(0.1, 1), (30, 15), (3600, 60)])
async def test_the_wait_for_one_in_flight_is_guessed_by_the_last_one(
    opened: OpenQuotas, clock: Clock, took_s: float, guess_s: float
) -> None:
    quotas = await opened(in_flight_per_owner=2)
    async with await quotas.admit("alice"):
        async with await quotas.admit("alice"):
            clock.now += took_s
        await quotas.admit("alice")
        assert (await refusal_of(quotas)).retry_after_s == guess_s


async def test_tokens_that_a_turn_took_delay_the_next_one(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(tokens_per_minute=600)
    headers = text_of(await quotas.admit("alice"))
    assert headers == {"limit-tokens": "600", "remaining-tokens": "600", "reset-tokens": "0s"}
    quotas.spent("alice", 1199)
    refusal = await refusal_of(quotas)
    assert refusal.message == "Rate limit reached: 600 tokens per minute. Please try again in 60s."
    assert text_of(refusal) == {"limit-tokens": "600", "remaining-tokens": "0", "reset-tokens": "1m59.9s"}
    clock.now += 60
    assert text_of(await quotas.admit("alice"))["remaining-tokens"] == "1"


async def test_the_longest_wait_is_told(opened: OpenQuotas, clock: Clock) -> None:
    quotas = await opened(requests_per_minute=1, tokens_per_minute=600, in_flight_per_owner=1)
    await quotas.admit("alice")
    quotas.spent("alice", 1800)
    assert (await refusal_of(quotas)).message.startswith("Rate limit reached: 600 tokens per minute. ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "1ms"),
        (0.012, "12ms"),
        (0.5471, "548ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (172.8, "2m52.8s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90_061.5, "25h1m1.5s"),
    ],
)
def test_a_duration_is_written_as_the_api_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- the running proxy -------------------------------------------------------------------------------------------------


@pytest.fixture
def start_app(start_app: StartApp, quota_place: Place | None) -> StartApp:
    """The proxy on the test's store; once more, another process on it."""

    async def start(**sections: Any) -> App:
        return await start_app(**(at(quota_place, sections) if quota_place else sections))

    return start


def limits_in(answer: aiohttp.ClientResponse) -> list[str | None]:
    return [answer.headers.get(name) for name in LIMIT_HEADERS]


@pytest.mark.parametrize("extra", [{}, {"stream": True}, {"background": True}], ids=str)
async def test_every_answer_says_what_is_left(start_app: StartApp, extra: Any) -> None:
    app = await start_app(limits={"requests_per_minute": 60})
    async with app.post({**HI, **extra}) as answer:
        await answer.read()
    assert (answer.status, limits_in(answer)) == (200, ["60", "59", "1s"])


async def test_without_a_limit_no_answer_speaks_of_one(app: App) -> None:
    async with app.post(HI) as answer:
        assert [name for name in answer.headers if name.lower().startswith("x-ratelimit")] == []


async def test_over_the_limit_is_a_429_that_does_not_reach_the_backend(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(limits={"requests_per_minute": 1})
    async with app.post(HI):
        pass
    async with app.post(HI) as answer:
        error = await error_of(answer, 429)
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert error["message"].startswith("Rate limit reached: 1 requests per minute. Please try again in ")
    assert (limits_in(answer)[:2], len(backend.requests)) == (["1", "0"], 1)
    assert 50 < int(answer.headers["retry-after"]) <= 60


async def test_the_sdk_raises_its_own_error_for_it(start_app: StartApp) -> None:
    app = await start_app(limits={"requests_per_minute": 1})
    await app.openai.responses.create(model="m", input="Hi")
    with pytest.raises(openai.RateLimitError, match="Please try again in"):
        await app.openai.responses.create(model="m", input="Hi")


async def test_the_sdk_waits_and_tries_again(start_app: StartApp) -> None:
    app = await start_app(limits={"requests_per_minute": 120})
    patient = app.openai.with_options(max_retries=2)
    for _ in range(120):
        async with app.post(b"{") as answer:
            await answer.read()
    assert (await patient.responses.create(model="m", input="Hi")).status == "completed"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/responses", {"model": "m"}, 400),
        ("/v1/responses", b"{", 400),
        ("/v1/responses", b" " * 2000, 413),
        ("/v1/responses/input_tokens", HI, 200),
        ("/v1/responses/compact", b"{", 400),
    ],
)
async def test_what_is_refused_for_its_form_and_light_work_count_too(
    start_app: StartApp, path: str, body: Any, status: int
) -> None:
    app = await start_app(limits={"requests_per_minute": 60, "body_bytes": 1000})
    async with app.post(body, path) as answer:
        assert (answer.status, limits_in(answer)[:2]) == (status, ["60", "59"])


async def test_a_backends_refusal_says_what_is_left(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(limits={"requests_per_minute": 60})
    backend.script(refused(500, "No."))
    async with app.post(HI) as answer:
        assert (answer.status, limits_in(answer)) == (502, ["60", "59", "1s"])


async def test_reads_and_deletes_are_not_limited(start_app: StartApp) -> None:
    app = await start_app(limits={"requests_per_minute": 1, "in_flight_per_owner": 1})
    async with app.post(HI) as answer:
        url = f"{app.url}/v1/responses/{(await answer.json())['id']}"
    statuses = []
    for method, path in (("GET", url), ("GET", f"{url}/input_items"), ("DELETE", url), ("GET", f"{app.url}/healthz")):
        async with app.http.request(method, path) as answer:
            statuses.append((answer.status, limits_in(answer)))
    assert statuses == [(200, [None] * 3)] * 4


async def test_a_stranger_is_refused_before_anything_is_counted(start_app: StartApp) -> None:
    app = await start_app(auth=AUTH, limits={"requests_per_minute": 1})
    async with app.post(HI) as answer:
        assert (answer.status, limits_in(answer)) == (401, [None] * 3)


async def test_what_one_owner_asks_does_not_hinder_another(start_app: StartApp) -> None:
    app = await start_app(auth=AUTH, limits={"requests_per_minute": 1})
    alice, bob = Client(app, ALICE), Client(app, BOB)
    statuses = [(await client.ask("POST", "/v1/responses", HI)).status for client in (alice, alice, bob, bob)]
    assert statuses == [200, 429, 200, 429]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/compact"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_in_flight_until_its_end(
    start_app: StartApp, backend: Backend, path: str, stream: bool
) -> None:
    app = await start_app(limits={"in_flight_per_owner": 1})
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hel"), goes_on, *END]) if stream else Script(plain().steps, before=goes_on))
    first = asyncio.ensure_future(app.http.post(f"{app.url}/v1/responses", json={**HI, "stream": stream}))
    await backend.received()
    async with app.post(HI, path) as answer:
        error = await error_of(answer, 429)
        assert (answer.headers["retry-after"], error["code"]) == ("1", "rate_limit_exceeded")
    async with app.post(HI, "/v1/responses/input_tokens") as answer:
        assert answer.status == 200
    goes_on.set()
    async with await first as answer:
        assert answer.status == 200
        await answer.read()
    backend.script(plain())
    async with app.post(HI) as answer:
        assert answer.status == 200


async def test_a_client_that_leaves_is_no_longer_in_flight(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(limits={"in_flight_per_owner": 1})
    backend.script(Script([chunk(content="Hel")], end="silent"), plain())
    async with app.post({**HI, "stream": True}) as answer:
        await answer.content.readany()
        arrived = await backend.received()
        answer.close()
    await arrived.is_let_go()
    status = 429
    async with asyncio.timeout(DEADLINE_S):
        while status == 429:  # until the proxy has seen it too
            async with app.post(HI) as answer:
                status = answer.status
    assert status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_background_response_is_in_flight_until_it_is_queued(
    start_app: StartApp, backend: Backend, stream: bool
) -> None:
    app = await start_app(limits={"in_flight_per_owner": 1})
    goes_on = asyncio.Event()
    backend.script(Script(streamed("Hello").steps, before=goes_on))
    async with app.post({**HI, "background": True, "stream": stream}) as first:
        await backend.received()
        async with app.post(HI, "/v1/responses/input_tokens") as answer:
            assert answer.status == 200
        async with app.post({**HI, "background": True}) as answer:
            assert answer.status == 200
        goes_on.set()
        await first.read()


async def test_an_answer_that_is_given_again_is_not_in_flight(start_app: StartApp, backend: Backend) -> None:
    app = await start_app(limits={"in_flight_per_owner": 1})
    goes_on = asyncio.Event()
    backend.script(Script(streamed("Hello").steps, before=goes_on))
    body, key = {**HI, "background": True, "stream": True}, {"idempotency-key": "one"}
    async with app.post(body, headers=key), app.post(body, headers=key) as again:
        assert again.headers["idempotent-replayed"] == "true"
        async with app.post({**HI, "background": True}) as answer:
            assert answer.status == 200
        goes_on.set()
        await again.read()


@pytest.mark.parametrize("extra", [{}, {"stream": True}], ids=str)
async def test_the_tokens_of_a_turn_count_for_its_owner(start_app: StartApp, backend: Backend, extra: Any) -> None:
    app = await start_app(limits={"tokens_per_minute": 18})
    backend.script(streamed("Hello") if extra else plain())
    async with app.post({**HI, **extra}) as answer:
        await answer.read()
        assert answer.headers["x-ratelimit-remaining-tokens"] == "18"
    async with app.post(HI) as answer:
        error = await error_of(answer, 429)
    assert error["message"].startswith("Rate limit reached: 18 tokens per minute.")
