"""The models of all backends as one list: what is in it, what a dead backend does to it, and for whom it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import openai
import pytest
from conftest import App, no_task_is_left, running_app, settings_of
from raw_backend import RawBackend, Seen, whole
from test_proxy import error_of

import catalogue
from upstream import UpstreamSettings

DEAD = "http://127.0.0.1:9/v1"
Start = Callable[..., Awaitable[App]]


def entry(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 7, "owned_by": "maker", **fields}


def listing(*entries: Any, status: str = "200 OK") -> Callable[[Seen], Awaitable[None]]:
    return whole(json.dumps({"object": "list", "data": list(entries)}).encode(), status)


@pytest.fixture
async def one() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        backend.answer = listing(entry("a", meta={"n_ctx": 1.5}), entry("org/b"))
        yield backend


@pytest.fixture
async def two() -> AsyncIterator[RawBackend]:
    async with RawBackend().running() as backend:
        backend.answer = listing(entry("big-1"), entry("hidden"), entry("a"))
        yield backend


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts the proxy in front of backends of these tables."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(*tables: dict[str, Any], **sections: Any) -> App:
            quiet: dict[str, Any] = {"dialect": "generic", "retries": 0}
            upstreams = tuple(UpstreamSettings(**{**quiet, **table}) for table in tables)
            settings = replace(settings_of(DEAD, **sections), upstream=upstreams)
            return await stack.enter_async_context(running_app(settings))

        yield started
    await no_task_is_left()


async def let_go(seen: Seen) -> None:
    """Says nothing for as long as anybody listens."""
    await seen.is_let_go()


async def names(app: App, path: str = "/v1/models") -> list[str]:
    async with app.http.get(app.url + path) as answer:
        body = await answer.json()
    assert (answer.status, body["object"]) == (200, "list"), body
    return [each["id"] for each in body["data"]]


def both(one: RawBackend, two: RawBackend) -> tuple[dict[str, Any], dict[str, Any]]:
    second = {
        "name": "two",
        "base_url": two.url,
        "models": ("big-*",),
        "aliases": {"gpt-5": "big-1", "gpt-6": "unseen"},
    }
    return {"name": "one", "base_url": one.url}, second


async def test_what_would_be_routed_to_a_backend_is_listed_with_its_aliases(
    one: RawBackend, two: RawBackend, start: Start
) -> None:
    app = await start(*both(one, two))
    async with app.http.get(f"{app.url}/v1/models") as answer:
        assert await answer.json() == {
            "object": "list",
            "data": [
                entry("a", meta={"n_ctx": 1.5}),
                entry("org/b"),
                entry("big-1"),
                entry("gpt-5"),
                {"id": "gpt-6", "object": "model", "created": 0, "owned_by": "two"},
            ],
        }
    assert await names(app, "/models") == ["a", "org/b", "big-1", "gpt-5", "gpt-6"]


async def test_an_alias_hides_a_model_of_that_name_and_nothing_is_listed_twice(one: RawBackend, start: Start) -> None:
    one.answer = listing(entry("a", owned_by="x"), entry("b", x=1), entry("b", owned_by="y"), {"object": "model"}, 5)
    app = await start({"base_url": one.url, "aliases": {"a": "b", "b": "b"}})
    async with app.http.get(f"{app.url}/v1/models") as answer:
        assert (await answer.json())["data"] == [entry("b", x=1), entry("a")]


async def test_a_name_that_another_backend_takes_is_listed_as_its_own(
    one: RawBackend, two: RawBackend, start: Start
) -> None:
    """A name wins over a glob, of globs the one that names most, and of two names the first."""
    one.answer = listing(*map(entry, ("a", "big-1", "big-2", "x")))
    two.answer = listing(*(entry(name, meta="of two") for name in ("a", "big-1", "big-2", "y")))
    first = {"base_url": one.url, "models": ("*", "big-1", "a")}
    second = {"base_url": two.url, "models": ("big-*", "a"), "aliases": {"gpt-5": "big-2", "x": "big-2"}}
    app = await start(first, second)
    assert await names(app) == ["a", "big-1", "big-2", "gpt-5", "x"]
    async with app.http.get(f"{app.url}/v1/models/big-2") as answer:
        assert (await answer.json())["meta"] == "of two"


async def test_a_list_counts_for_a_backend_that_sets_no_models(one: RawBackend, two: RawBackend, start: Start) -> None:
    named = {"base_url": two.url, "models": ("big-*",)}
    assert await names(await start({"base_url": one.url}, named)) == ["a", "org/b", "big-1"]
    two.answer = listing(entry("big-1"), entry("hidden"), entry("a"))
    assert await names(await start({"base_url": one.url}, {"base_url": two.url})) == ["a", "org/b", "big-1", "hidden"]


@pytest.mark.parametrize(
    "broken",
    [
        {"base_url": DEAD},
        {"connect_timeout_s": 0.05, "silent": True},
        {"refuses": True},
    ],
)
async def test_a_dead_backend_does_not_hide_the_others(
    one: RawBackend, two: RawBackend, start: Start, caplog: pytest.LogCaptureFixture, broken: dict[str, Any]
) -> None:
    first, second = both(one, two)
    if broken.pop("silent", False):
        one.answer = let_go
    if broken.pop("refuses", False):
        one.answer = listing(status="500 Internal Server Error")
    app = await start({**first, **broken}, second)
    assert await names(app) == ["big-1", "gpt-5", "gpt-6"]
    assert "the models of upstream 'one' are not listed" in caplog.text
    async with app.http.get(f"{app.url}/v1/models/a") as answer:  # nobody can say that it is not there
        assert (await error_of(answer, answer.status))["type"] == "server_error"
    assert answer.status in (500, 502, 504)


async def test_without_any_backend_there_is_no_list(start: Start) -> None:
    app = await start({"name": "x", "base_url": DEAD}, {"name": "y", "base_url": DEAD})
    async with app.http.get(f"{app.url}/v1/models") as answer:
        assert (await error_of(answer, 502))["code"] == "upstream_error"


async def test_backends_that_fail_in_different_ways_are_all_named(one: RawBackend, start: Start) -> None:
    one.answer = listing(status="403 Forbidden")
    app = await start({"name": "x", "base_url": DEAD}, {"name": "y", "base_url": one.url})
    async with app.http.get(f"{app.url}/v1/models") as answer:
        assert (await error_of(answer, 502))["message"] == "None of the upstreams 'x', 'y' told its models."


@pytest.mark.parametrize("path", ["org/b", "org%2Fb", "gpt-5"])
async def test_one_model_is_found_by_its_name(one: RawBackend, two: RawBackend, start: Start, path: str) -> None:
    app = await start(*both(one, two))
    async with app.http.get(f"{app.url}/v1/models/{path}") as answer:
        assert (answer.status, await answer.json()) == (200, entry(path.replace("%2F", "/")))


@pytest.mark.parametrize("name", ["c", "hidden", "big-2", "org/b/c"])
async def test_a_model_that_is_not_listed_is_a_404(one: RawBackend, two: RawBackend, start: Start, name: str) -> None:
    app = await start(*both(one, two))
    async with app.http.get(f"{app.url}/v1/models/{name}") as answer:
        error = await error_of(answer, 404)
    assert (error["code"], error["message"]) == ("model_not_found", f"The model '{name}' does not exist.")


async def test_the_official_client_lists_and_retrieves(one: RawBackend, start: Start) -> None:
    app = await start({"base_url": one.url})
    assert [model.id async for model in app.openai.models.list()] == ["a", "org/b"]
    assert (await app.openai.models.retrieve("org/b")).created == 7
    with pytest.raises(openai.NotFoundError):
        await app.openai.models.retrieve("nothing")


async def test_those_who_ask_at_once_are_told_what_one_was_told(one: RawBackend, start: Start) -> None:
    app = await start({"base_url": one.url})
    assert await asyncio.gather(*(names(app) for _ in range(5))) == [["a", "org/b"]] * 5
    assert len(one.seen) == 1


async def test_a_list_that_is_too_old_is_asked_for_again(
    one: RawBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "KEPT_S", 0.0)
    app = await start({"base_url": one.url})
    assert await names(app) == ["a", "org/b"]
    one.answer = listing(entry("new"))
    assert await names(app) == ["new"]


async def test_a_clients_own_key_asks_and_what_it_is_told_is_told_to_nobody_else(one: RawBackend, start: Start) -> None:
    async def answer(seen: Seen) -> None:
        await listing(entry(str(seen.header("authorization"))))(seen)

    one.answer = answer
    app = await start({"base_url": one.url, "api_key": "ours"}, auth={"mode": "passthrough"})
    for key in ("alice", "bob"):
        async with app.http.get(f"{app.url}/v1/models", headers={"authorization": f"Bearer {key}"}) as answered:
            assert [each["id"] for each in (await answered.json())["data"]] == [f"Bearer {key}"]


async def test_a_clients_own_key_asks_only_the_backend_that_it_speaks_to(
    one: RawBackend, two: RawBackend, start: Start
) -> None:
    tables = [{**table, "api_key": f"of {table['name']}"} for table in both(one, two)]
    app = await start(*tables, {"name": "three", "base_url": two.url, "models": ("3",)}, auth={"mode": "passthrough"})
    async with app.http.get(f"{app.url}/v1/models", headers={"authorization": "Bearer mine"}) as answer:
        assert answer.status == 200
    assert one.seen[-1].header("authorization") == "Bearer mine"
    assert {seen.header("authorization") for seen in two.seen} == {"Bearer of two", None}


async def test_a_clients_own_key_that_is_no_good_is_a_401(one: RawBackend, start: Start) -> None:
    one.answer = listing(status="401 Unauthorized")
    app = await start({"base_url": one.url}, auth={"mode": "passthrough"})
    async with app.http.get(f"{app.url}/v1/models", headers={"authorization": "Bearer x"}) as answer:
        await error_of(answer, 401)


async def test_a_head_request_has_no_body(one: RawBackend, start: Start) -> None:
    app = await start({"base_url": one.url})
    async with app.http.head(f"{app.url}/v1/models") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
