"""Requests that go through, and several backends: who answers in place of another, with whose key, places, counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from conftest import App, no_task_is_left, running_app, settings_of
from raw_backend import Answer, RawBackend, Seen, framed, head, whole
from scripted import DEADLINE_S
from test_metrics import values
from test_proxy import error_of

from upstream import UpstreamSettings

Json = dict[str, Any]
BODY = b'{ "x" : "m", "model" :"m","n":1.0}'
CHAT = "/v1/chat/completions"
TINY_S = 0.05
NOWHERE = "http://127.0.0.1:9/v1"
NAMES = ("first", "second", "third")
Start = Callable[..., Awaitable[App]]


@pytest.fixture
async def first() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        yield backend


@pytest.fixture
async def second() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        backend.answer = whole(b'"second"')
        yield backend


@pytest.fixture
async def start(first: RawBackend, second: RawBackend) -> AsyncIterator[Start]:
    """Starts the proxy with "first" and "second", which answers in its place; `tables` change them, or add a third."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(*tables: Json, **sections: Json) -> App:
            upstreams = []
            for number, name in enumerate(NAMES[: max(len(tables), 2)]):
                quiet = {"dialect": "generic", "models": ("m",) if number == 0 else ("none",)}
                fallback = {"fallback": ("second",)} if number == 0 else {}
                table = tables[number] if number < len(tables) else {}
                url = first.url if number == 0 else second.url
                upstreams.append(UpstreamSettings(**{"name": name, "base_url": url, **quiet, **fallback, **table}))
            settings = replace(settings_of(first.url, **sections), upstream=tuple(upstreams))
            return await stack.enter_async_context(running_app(settings))

        yield started
    await no_task_is_left()


def posted(backend: RawBackend) -> list[Seen]:
    return [seen for seen in backend.seen if seen.target != "/v1/models"]


async def ask(app: App, path: str = CHAT, body: bytes = BODY, **options: Any) -> tuple[int, str | None, bytes]:
    """The status, who is said to have answered, and the body."""
    async with app.post(body, path, **options) as answer:
        return answer.status, answer.headers.get("x-responses-proxy-upstream"), await answer.read()


async def counted(app: App, family: str) -> dict[str, float]:
    found = await values(app)
    return {key.removeprefix(family): value for key, value in found.items() if key.startswith(family) and value}


def refuses(status: int, body: bytes = b'"its own words"', **headers: Any) -> Answer:
    return whole(body, f"{status} Status", **headers)


async def cut(seen: Seen) -> None:
    await seen.read()
    await seen.write(head(content_length=9) + b"half")
    seen.writer.close()


async def silent(seen: Seen) -> None:
    await seen.read()
    assert await seen.is_let_go()
    seen.gone.set()


# -- who answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
async def test_an_answer_that_is_the_backends_fault_goes_on(
    first: RawBackend, second: RawBackend, start: Start, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    first.answer = refuses(status)
    app = await start()
    assert await ask(app) == (200, "second", b'"second"')
    assert [[seen.raw for seen in posted(backend)] for backend in (first, second)] == [[BODY]] * 2
    assert f"'second' is asked in its place: Upstream 'first' answered with the status {status}." in caplog.text
    assert sum((await counted(app, "upstream_fallbacks_total")).values()) == 1


@pytest.mark.parametrize("table", [{"base_url": NOWHERE}, {"first_byte_timeout_s": TINY_S}])
async def test_no_answer_goes_on(first: RawBackend, start: Start, table: Json) -> None:
    first.answer = silent
    assert await ask(await start(table)) == (200, "second", b'"second"')


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422, 501])
async def test_an_answer_about_the_request_stays(
    first: RawBackend, second: RawBackend, start: Start, status: int
) -> None:
    first.answer = refuses(status)
    assert await ask(await start()) == (status, "first", b'"its own words"')
    assert posted(second) == []


async def test_the_last_answer_is_passed_on_as_it_is(first: RawBackend, second: RawBackend, start: Start) -> None:
    first.answer, second.answer = refuses(500), refuses(429, b"slower", retry_after="7", x_own="1")
    app = await start()
    async with app.post(BODY, CHAT) as answer:
        assert (answer.status, answer.headers["retry-after"], answer.headers["x-own"]) == (429, "7", "1")
        assert (answer.headers["x-responses-proxy-upstream"], await answer.read()) == ("second", b"slower")


async def test_the_last_failure_is_told(first: RawBackend, start: Start) -> None:
    first.answer = refuses(500)
    app = await start({}, {"base_url": NOWHERE})
    async with app.post(BODY, CHAT) as answer:
        assert "'second'" in (await error_of(answer, 502))["message"]


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_fallback_that_was_not_set_up_says_nothing_to_the_client(
    first: RawBackend, second: RawBackend, start: Start, status: int
) -> None:
    first.answer, second.answer = refuses(503, retry_after="7"), refuses(status)
    app = await start({"fallback": ("second", "third")}, {}, {})
    async with app.post(BODY, CHAT) as answer:
        message = (await error_of(answer, 503))["message"]
    assert (message, answer.headers["retry-after"]) == ("Upstream 'first' answered with the status 503.", "7")
    assert len(posted(second)) == 2


async def test_a_fallback_that_was_not_set_up_has_its_place_back(
    first: RawBackend, second: RawBackend, start: Start
) -> None:
    first.answer, second.answer = refuses(503), refuses(404)
    app = await start({}, {"max_in_flight": 1, "max_waiting": 0})
    assert [(await ask(app))[0] for _ in range(2)] == [503, 503]
    assert len(posted(second)) == 2


async def test_the_other_backend_gets_its_own_name_of_the_model(
    first: RawBackend, second: RawBackend, start: Start
) -> None:
    first.answer = refuses(500)
    assert (await ask(await start({"aliases": {"m": "there"}}, {"aliases": {"m": "elsewhere"}})))[1] == "second"
    sent = [posted(backend)[0].raw for backend in (first, second)]
    assert sent == [b'{ "x" : "m", "model" :"%b","n":1.0}' % name for name in (b"there", b"elsewhere")]


async def test_without_an_alias_there_it_gets_the_clients(first: RawBackend, second: RawBackend, start: Start) -> None:
    first.answer = refuses(500)
    assert (await ask(await start({"aliases": {"m": "there"}})))[1] == "second"
    assert posted(second)[0].raw == BODY


async def test_a_model_that_cannot_be_replaced_for_the_other_backend_ends_it(
    first: RawBackend, second: RawBackend, start: Start
) -> None:
    first.answer = refuses(500)
    app = await start({"aliases": {"m": "m"}}, {"aliases": {"m": "there"}})
    assert await ask(app, body=b'{"a":1,"a":2,"model":"m"}') == (500, "first", b'"its own words"')
    assert posted(second) == []


async def test_an_answer_that_has_begun_is_not_replaced(first: RawBackend, second: RawBackend, start: Start) -> None:
    first.answer = cut
    with pytest.raises(aiohttp.ClientPayloadError):
        await ask(await start())
    assert posted(second) == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/files", BODY),
        ("POST", "/v1/fine_tuning/jobs", BODY),
        ("DELETE", "/v1/chat/completions", BODY),
        ("GET", "/v1/files/f", b""),
        ("POST", "/v1/chat/completions", b"{}"),
        ("POST", "/v1/chat/completions", b""),
    ],
)
async def test_what_may_be_kept_or_names_no_model_stays(
    first: RawBackend, second: RawBackend, start: Start, method: str, path: str, body: bytes
) -> None:
    first.answer = refuses(500)
    app = await start()
    async with app.http.request(method, app.url + path, data=body) as answer:
        assert (answer.status, await answer.read()) == (500, b'"its own words"')
    assert posted(second) == []


async def test_a_list_says_where_a_model_goes_that_no_settings_name(
    first: RawBackend, second: RawBackend, start: Start
) -> None:
    second.answer = whole(b'{"data":[{"id":"listed"}]}')
    app = await start({"base_url": NOWHERE, "models": ()}, {"models": ()})
    assert (await ask(app, body=b'{"model":"listed"}'))[:2] == (200, "second")


# -- whose key ---------------------------------------------------------------------------------------------------------


MINE = {"authorization": "Bearer mine", "x-api-key": "mine too"}


def keys_of(backend: RawBackend) -> list[tuple[str | None, str | None]]:
    return [(seen.header("authorization"), seen.header("x-api-key")) for seen in posted(backend)]


@pytest.mark.parametrize("own", [{}, {"api_key": "of-the-second"}])
async def test_the_clients_key_stays_with_the_backend_that_it_speaks_to(
    first: RawBackend, second: RawBackend, start: Start, own: Json
) -> None:
    first.answer = refuses(500)
    app = await start({"api_key": "of-the-first"}, own, auth={"mode": "passthrough"})
    assert (await ask(app, headers=MINE))[:2] == (200, "second")
    assert keys_of(first) == [("Bearer mine", "mine too")]
    assert keys_of(second) == [("Bearer of-the-second" if own else None, None)]


async def test_a_list_does_not_draw_the_clients_key(second: RawBackend, start: Start) -> None:
    second.answer = whole(b'{"data":[{"id":"listed"}]}')
    app = await start({"models": ()}, {"models": ()}, auth={"mode": "passthrough"})
    assert (await ask(app, body=b'{"model":"listed"}', headers=MINE))[1] == "second"
    assert keys_of(second) == [(None, None)]


async def test_the_clients_key_goes_where_the_settings_name_the_model(
    first: RawBackend, second: RawBackend, start: Start
) -> None:
    app = await start({}, {"models": ("big-*",)}, auth={"mode": "passthrough"})
    for body in (b'{"model":"big-1"}', b"{}"):
        assert (await ask(app, body=body, headers=MINE))[0] == 200
    assert (keys_of(first), keys_of(second)) == ([("Bearer mine", "mine too")],) * 2


# -- places and circuits -----------------------------------------------------------------------------------------------


ONE_PLACE = {"fallback": (), "max_in_flight": 1, "queue_wait_s": TINY_S}


@contextlib.asynccontextmanager
async def busy(app: App, backend: RawBackend) -> AsyncIterator[asyncio.Event]:
    """While a stream of the backend is in the middle of its answer."""
    goes_on = asyncio.Event()

    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(head(content_type="text/event-stream", transfer_encoding="chunked") + framed(b"Hel"))
        await goes_on.wait()
        await seen.write(framed(b"lo") + b"0\r\n\r\n")

    backend.answer = answer
    async with app.post(BODY, CHAT) as answered:
        backend.answer = whole()
        yield goes_on
        goes_on.set()
        assert await answered.read() == b"Hello"


async def test_an_answer_has_its_place_to_its_end(first: RawBackend, start: Start) -> None:
    app = await start(ONE_PLACE)
    async with busy(app, first):
        async with app.post(BODY, CHAT) as answer:
            assert (await error_of(answer, 503))["code"] == "upstream_busy"
        async with app.post({"model": "m", "input": "Hi"}) as turn:
            assert (await error_of(turn, 503))["code"] == "upstream_busy"
    assert (await ask(app))[0] == 200


async def test_who_finds_no_place_goes_on(first: RawBackend, start: Start) -> None:
    app = await start({**ONE_PLACE, "fallback": ("second",)})
    async with busy(app, first):
        assert (await ask(app))[1] == "second"
    assert (await ask(app))[1] == "first"


@pytest.mark.parametrize("answer", [whole(), refuses(404), refuses(500), cut, silent, refuses(204, b"")])
@pytest.mark.parametrize("fallback", [(), ("second",)])
async def test_the_place_is_given_back_however_it_ends(
    first: RawBackend, start: Start, answer: Answer, fallback: tuple[str, ...]
) -> None:
    first.answer = answer
    app = await start({**ONE_PLACE, "fallback": fallback, "first_byte_timeout_s": TINY_S})
    for _ in range(2):
        with contextlib.suppress(aiohttp.ClientPayloadError):
            await ask(app)
    first.answer = whole()
    assert (await ask(app))[:2] == (200, "first")


@pytest.mark.parametrize("begin", [b"", head(content_length=9) + b"half", head("500 Oh", content_length=9) + b"half"])
async def test_a_client_that_leaves_gives_its_place_back_and_is_nobodys_failure(
    first: RawBackend, start: Start, begin: bytes
) -> None:
    async def answer(seen: Seen) -> None:
        await seen.read()
        await seen.write(begin)
        assert await seen.is_let_go()
        seen.gone.set()

    first.answer = answer
    app = await start({**ONE_PLACE, "queue_wait_s": DEADLINE_S})
    leaving = asyncio.create_task(app.post(BODY, CHAT).__aenter__())
    while (seen := await first.next()).target == "/v1/models":
        pass
    if begin:
        (await leaving).close()
    leaving.cancel()
    await asyncio.wait({leaving})
    async with asyncio.timeout(DEADLINE_S):
        await seen.gone.wait()
    first.answer = whole()
    assert (await ask(app))[0] == 200
    told = {"[refused_5xx][first]": 1} if b"500" in begin else {}
    assert await counted(app, "upstream_errors_total") == told


async def ends_after_its_fault(seen: Seen) -> None:
    await seen.read()
    await seen.write(head("500 Oh", content_length=9) + b"half")
    seen.writer.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (refuses(500), {"[refused_5xx][first]": 1}),
        (ends_after_its_fault, {"[refused_5xx][first]": 1}),
        (cut, {"[broken][first]": 1}),
        (silent, {"[timeout][first]": 1}),
        (refuses(429), {}),
        (refuses(404), {}),
        (refuses(501), {}),
    ],
)
async def test_a_failure_is_counted_once(first: RawBackend, start: Start, answer: Answer, told: Json) -> None:
    first.answer = answer
    app = await start({"fallback": (), "first_byte_timeout_s": TINY_S})
    with contextlib.suppress(aiohttp.ClientPayloadError):
        await ask(app)
    assert await counted(app, "upstream_errors_total") == told
    assert await counted(app, "upstream_requests_total") == {"[first]": 1}


@pytest.mark.parametrize("answer", [refuses(500), cut, ends_after_its_fault])
async def test_a_backend_that_fails_again_and_again_is_left_alone(
    first: RawBackend, second: RawBackend, start: Start, answer: Answer
) -> None:
    first.answer = answer
    app = await start({"circuit_failures": 2, "circuit_open_s": 60.0})
    for _ in range(5):
        with contextlib.suppress(aiohttp.ClientPayloadError):
            await ask(app)
    assert len(posted(first)) == 2


@pytest.mark.parametrize("status", [404, 429, 501])
async def test_a_refusal_that_is_no_failure_opens_no_circuit(first: RawBackend, start: Start, status: int) -> None:
    first.answer = refuses(status)
    app = await start({"circuit_failures": 1, "circuit_open_s": 60.0})
    for _ in range(3):
        await ask(app)
    assert len(posted(first)) == 3


async def test_a_refusal_that_goes_on_shows_that_a_backend_is_alive(first: RawBackend, start: Start) -> None:
    app = await start({"circuit_failures": 2, "circuit_open_s": 60.0})
    for status in (500, 429, 500, 429, 500):
        first.answer = refuses(status)
        await ask(app)
    assert len(posted(first)) == 5


# -- what is told ------------------------------------------------------------------------------------------------------


async def test_what_goes_through_is_counted_by_few_names(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "responses_proxy.access")
    app = await start(server={"access_log": True})
    paths = [
        CHAT,
        "/chat/completions",
        "/v1/embeddings",
        "/v1/audio/speech",
        "/v1/files/f-1",
        "/v1/x/y",
        "/v1/responses/x/y",
    ]
    for path in paths:
        await ask(app, path)
    await ask(app, "/v1/models/org/m")
    assert await counted(app, "requests_total") == {
        "[POST /v1/chat/completions][200]": 2,
        "[POST /v1/embeddings][200]": 1,
        "[POST /v1/audio/speech][200]": 1,
        "[POST /v1/*][200]": 2,
        "[POST /v1/models/{model:path}][200]": 1,
        "[other][404]": 1,
    }
    assert "method=POST path=/v1/* status=200" in caplog.text
    assert "f-1" not in caplog.text
    lines = [record.message for record in caplog.records if record.name == "responses_proxy.access"]
    assert sum("upstream=first" in line for line in lines) == len(paths)


async def test_what_the_proxy_says_itself_a_backend_does_not_say_too(first: RawBackend, start: Start) -> None:
    theirs = {"x_responses_proxy_upstream": "theirs", "x_ratelimit_limit_requests": "9", "x_ratelimit_reset_odd": "9"}
    first.answer = whole(**theirs)
    app = await start(limits={"requests_per_minute": 5})
    async with app.post(BODY, CHAT) as answer:
        names = ("x-responses-proxy-upstream", "x-ratelimit-limit-requests", "x-ratelimit-reset-odd")
        assert [answer.headers.getall(name) for name in names] == [["first"], ["5"], ["9"]]


# -- what may go through -----------------------------------------------------------------------------------------------


ALLOWED = {"paths": ("/v1/chat/*", "/v1/files")}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (CHAT, 200),
        ("/chat/completions", 200),
        (f"{CHAT}?x=/v1/y", 200),
        ("/v1/files?limit=2", 200),
        ("/v1/files/f", 404),
        ("/v1/embeddings", 404),
        ("/embeddings", 404),
        ("/v1/x?y=/v1/chat/z", 404),
        ("/v1//chat/completions", 404),
        ("/v1/chat/../files/f", 400),
        ("/v1/models/m", 404),
    ],
)
async def test_only_paths_that_are_allowed_go_through(first: RawBackend, start: Start, path: str, status: int) -> None:
    app = await start(passthrough=ALLOWED)
    port = int(app.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode())
    async with asyncio.timeout(DEADLINE_S):
        line = await reader.readline()
    writer.transport.abort()
    assert (int(line.split()[1]), len(posted(first))) == (status, status == 200)


async def test_nothing_goes_through_where_no_path_is_allowed(first: RawBackend, start: Start) -> None:
    app = await start(passthrough={"paths": ()})
    async with app.post(BODY, CHAT) as answer:
        assert (await error_of(answer, 404))["message"] == "Unknown request URL or method."
    first.answer = whole(json.dumps({"data": [{"id": "m"}]}).encode())
    async with app.http.get(f"{app.url}/v1/models/m") as answer:
        assert answer.status == 200
