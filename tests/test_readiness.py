"""Whether a process says that it is ready: real stores and sockets, and what each trouble is called."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import replace
from typing import Any

import pytest
from conftest import App, StartApp, running_app, settings_of
from scripted import Backend, refused
from store_places import Place
from test_proxy import asgi_call, lifespan_of
from test_proxy import servers_handler as servers_handler  # a fixture

from proxy import Application
from upstream import UpstreamSettings

UNREACHABLE = "http://127.0.0.1:1/v1"


async def readyz(app: App) -> tuple[int, Any]:
    async with app.http.get(f"{app.url}/readyz") as answer:
        return answer.status, await answer.json()


@pytest.fixture(autouse=True)
def every_look_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("readiness.FRESH_S", 0.0)
    monkeypatch.setattr("readiness.WAIT_S", 5.0)


async def test_a_process_that_can_work_is_ready_and_needs_no_key(app: App) -> None:
    assert await readyz(app) == (200, {"status": "ready", "store": "ok", "upstreams": {"default": "ok"}})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/readyz", 503)])
async def test_a_process_without_a_backend_is_healthy_and_not_ready(
    start_app: StartApp, method: str, path: str, status: int
) -> None:
    app = await start_app(upstream={"base_url": UNREACHABLE})
    async with app.http.request(method, app.url + path) as answer:
        assert (answer.status, bool(await answer.read())) == (status, method == "GET")


async def test_what_is_wrong_is_told_without_an_address(start_app: StartApp) -> None:
    app = await start_app(upstream={"base_url": UNREACHABLE})
    told = {"status": "not ready", "store": "ok", "upstreams": {"default": "cannot be reached"}}
    assert await readyz(app) == (503, told)


@pytest.mark.parametrize(
    ("script", "status", "state"),
    [
        (refused(401, "No."), 200, "answered 401"),
        (refused(404, "No."), 200, "answered 404"),
        (refused(500, "No."), 503, "answered with an error"),
        (refused(503, "No."), 503, "answered with an error"),
    ],
)
async def test_a_refusal_is_an_answer_unless_the_backend_is_at_fault(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch, script: Any, status: int, state: str
) -> None:
    monkeypatch.setattr(backend, "_looked_up", lambda request: script)
    found, told = await readyz(app)
    assert (found, told["upstreams"]) == (status, {"default": state})


async def test_one_backend_that_answers_is_enough(backend: Backend) -> None:
    gone = UpstreamSettings(name="gone", base_url=UNREACHABLE, dialect="generic")
    settings = settings_of(backend.url)
    async with running_app(replace(settings, upstream=(gone, *settings.upstream))) as app:
        status, told = await readyz(app)
    assert (status, told["upstreams"]) == (200, {"gone": "cannot be reached", "default": "ok"})


async def test_turns_are_tried_whether_it_is_ready_or_not(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_looked_up", lambda request: refused(500, "No."))
    assert (await readyz(app))[0] == 503
    async with app.post({"model": "m", "input": "Hi"}) as answer:
        assert answer.status == 200


async def test_a_store_that_another_process_has_locked_is_not_ready(start_app: StartApp, place: Place) -> None:
    app = await start_app(store=place.hasty)
    with place.locked():
        status, told = await readyz(app)
    assert (status, told["store"]) == (503, "The store of responses is locked by another process.")
    assert (await readyz(app))[0] == 200


async def test_looking_leaves_nothing_in_the_store(start_app: StartApp, place: Place) -> None:
    app = await start_app()
    assert (await readyz(app))[0] == 200
    names = [name for (name,) in place.asked("SELECT name FROM lease")]
    assert [name for name in names if name.startswith("ready")] == []


async def test_many_questions_are_one_look(app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []

    def looked_up(request: Any) -> Any:
        looks.append(request.path)
        return refused(404, "No.")

    monkeypatch.setattr(backend, "_looked_up", looked_up)
    monkeypatch.setattr("readiness.FRESH_S", 3600.0)
    for _ in range(20):
        await asyncio.gather(*(readyz(app) for _ in range(5)))
    assert looks == ["/v1/models"]


async def test_a_backend_that_says_nothing_holds_no_answer_up(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await readyz(app))[0] == 200
    asked, goes_on = asyncio.Event(), asyncio.Event()
    silent = refused(404, "No.")
    silent.before = goes_on
    monkeypatch.setattr(backend, "_looked_up", lambda request: asked.set() or silent)
    monkeypatch.setattr("readiness.WAIT_S", 0.01)
    assert (await readyz(app))[0] == 200  # by the look before
    await asked.wait()
    goes_on.set()


async def test_a_backend_that_takes_too_long_is_not_ready(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = refused(404, "No.")
    silent.before = asyncio.Event()
    monkeypatch.setattr(backend, "_looked_up", lambda request: silent)
    monkeypatch.setattr("readiness.LOOK_S", 0.05)
    status, told = await readyz(app)
    assert (status, told["upstreams"]) == (503, {"default": "no answer in time"})


async def test_a_backend_that_is_late_once_may_be_busy_and_one_that_is_late_twice_is_not_ready(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await readyz(app))[0] == 200
    silent = refused(404, "No.")
    silent.before = asyncio.Event()
    monkeypatch.setattr(backend, "_looked_up", lambda request: silent)
    monkeypatch.setattr("readiness.LOOK_S", 0.05)
    assert [(await readyz(app))[0] for _ in range(3)] == [200, 503, 503]


async def test_a_change_is_logged_once(
    app: App, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "responses_proxy.readiness")
    await readyz(app)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "_looked_up", lambda request: refused(500, "No."))
        for _ in range(3):
            await readyz(app)
    await readyz(app)
    said = [(each.levelname, each.getMessage()) for each in caplog.records if each.name == "responses_proxy.readiness"]
    assert said == [("WARNING", "upstream 'default': answered with an error"), ("INFO", "upstream 'default': ok")]


async def test_a_process_that_is_told_to_stop_is_not_ready(backend: Backend, servers_handler: list[int]) -> None:
    scope = {"type": "http", "method": "GET", "path": "/readyz", "query_string": b"", "headers": []}
    async with lifespan_of(Application(lambda: settings_of(backend.url))) as application:
        before, _ = await asgi_call(application, scope)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        after, body = await asgi_call(application, scope)
    assert (before["status"], after["status"]) == (200, 503)
    assert b'"status":"stopping"' in body["body"]
