"""Which backend a model goes to: by the settings, and by what the backends list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import StartApp
from scripted import DEADLINE_S, Backend, plain, refused

from dispatch import Renderer
from metrics import Load, Metrics
from observing import Observer
from routing import Upstreams, may_go_on
from upstream import UpstreamSettings
from upstream_errors import UpstreamBroken, UpstreamError, UpstreamRefused, UpstreamTimeout, WindowExceeded

BASE = "http://127.0.0.1:9/v1"
Make = Callable[..., Upstreams]


def settings(name: str, url: str = BASE, **more: Any) -> UpstreamSettings:
    return UpstreamSettings(name, url, dialect="generic", **more)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Upstreams] = []

    def upstreams(*all_settings: UpstreamSettings) -> Upstreams:
        made.append(Upstreams(all_settings))
        return made[-1]

    yield upstreams
    for each in made:
        await each.close()


def routed(upstreams: Upstreams, model: str) -> tuple[str, str]:
    upstream, there = upstreams.route(model)
    return upstream.settings.name, there


@pytest.mark.parametrize(
    ("model", "name", "there"),
    [
        ("gpt-5", "two", "qwen3:30b"),  # an alias before a name and a glob of earlier backends
        ("exact", "two", "exact"),  # a name before a glob
        ("qwen3:8b", "two", "qwen3:8b"),  # the glob that names more
        ("qwen2", "one", "qwen2"),
        ("other", "one", "other"),  # `*` names least
        ("qwen3:30b", "two", "qwen3:30b"),
        ("qwen3:8b-q4", "three", "qwen3:8b-q4"),
        ("a1", "three", "a1"),
        ("same", "one", "same"),  # of two, the earlier one
    ],
)
async def test_the_settings_are_asked_by_alias_name_and_glob(make: Make, model: str, name: str, there: str) -> None:
    one = settings("one", models=("*", "qwen*", "gpt-5", "same"))
    two = settings("two", models=("qwen3:*", "exact", "same"), aliases={"gpt-5": "qwen3:30b"})
    three = settings("three", models=("qwen3:8b-*", "a[0-9]", "exac?"))
    assert routed(make(one, two, three), model) == (name, there)


async def test_an_alias_may_stand_for_a_name_that_belongs_elsewhere(make: Make) -> None:
    one = settings("one", models=("real",))
    two = settings("two", aliases={"nick": "real"})
    assert routed(make(one, two), "nick") == ("two", "real")


async def test_a_glob_is_of_the_whole_name_and_minds_its_case(make: Make) -> None:
    upstreams = make(settings("one"), settings("two", models=("qwen*",)))
    assert [routed(upstreams, model)[0] for model in ("qwen3", "my-qwen3", "Qwen3")] == ["two", "one", "one"]


async def test_what_nobody_names_goes_to_who_lists_it_else_to_the_first(make: Make, backend: Backend) -> None:
    backend.models = {"data": [{"id": "listed"}]}
    upstreams = make(settings("one"), settings("two", backend.url))
    await upstreams.known("listed")
    assert [routed(upstreams, model)[0] for model in ("listed", "unknown")] == ["two", "one"]


async def test_a_name_in_the_settings_wins_over_a_list(make: Make, backend: Backend) -> None:
    backend.models = {"data": [{"id": "listed"}]}
    upstreams = make(settings("one", backend.url), settings("two", models=("listed",)))
    await upstreams.look()
    assert routed(upstreams, "listed")[0] == "two"


async def test_a_backend_whose_models_are_set_serves_no_others(make: Make, backend: Backend) -> None:
    backend.models = {"data": [{"id": "listed"}]}
    upstreams = make(settings("one"), settings("two", backend.url, models=("other",)))
    await upstreams.known("listed")
    assert routed(upstreams, "listed")[0] == "one"


async def test_a_list_is_looked_at_again_when_a_name_is_in_none(
    make: Make, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstreams = make(settings("one"), settings("two", backend.url))
    await upstreams.known("new")
    backend.models = {"data": [{"id": "new"}]}
    await upstreams.known("new")
    assert routed(upstreams, "new")[0] == "one"
    monkeypatch.setattr("upstream.FOUND_KEPT_S", 0.0)
    await upstreams.known("new")
    async with asyncio.timeout(DEADLINE_S):
        while routed(upstreams, "new")[0] != "two":  # noqa: ASYNC110 - the look ends by itself
            await asyncio.sleep(0)


async def test_of_one_backend_alone_no_list_is_looked_at(start_app: StartApp, backend: Backend) -> None:
    app = await start_app()
    async with app.post({"model": "any", "input": "Hi"}) as answer:
        assert answer.status == 200
    assert backend.connections == 1


async def test_the_fallbacks_of_a_fallback_are_not_its_own(make: Make) -> None:
    upstreams = make(settings("one", fallback=("two",)), settings("two", fallback=("three", "one")), settings("three"))
    one, two, _ = upstreams
    assert [each.settings.name for each in upstreams.fallbacks(one)] == ["two"]
    assert [each.settings.name for each in upstreams.fallbacks(two)] == ["three", "one"]


@pytest.mark.parametrize(
    ("error", "at_first", "at_fallback"),
    [
        (UpstreamBroken("cut"), True, True),
        (UpstreamTimeout("late"), True, True),
        (UpstreamRefused("slower", status=429), True, True),
        (UpstreamRefused("oh", status=503), True, True),
        (UpstreamRefused("no such model", status=404), False, True),
        (UpstreamRefused("no key", status=401), False, True),
        (UpstreamRefused("no", status=400), False, False),
        (WindowExceeded("full"), False, False),
    ],
)
def test_only_what_is_not_the_requests_fault_may_go_on(error: UpstreamError, at_first: bool, at_fallback: bool) -> None:
    assert (may_go_on(error, at_fallback=False), may_go_on(error, at_fallback=True)) == (at_first, at_fallback)


# -- who is told -------------------------------------------------------------------------------------------------------


UPSTREAM = "responses_proxy_upstream_"


async def test_every_failure_is_counted_and_what_was_done_about_it(backend: Backend) -> None:
    backend.script(refused(503, "later"), refused(503, "later"), refused(400, "no"), plain())
    metrics = Metrics()
    first = settings("first", backend.url, retries=1, retry_backoff_s=0.0, fallback=("second",))
    upstreams = Upstreams((first, settings("second", backend.url)), Observer(metrics))
    renderer = Renderer(upstreams, strict=False)
    way = await renderer.way("m")
    with pytest.raises(UpstreamRefused) as later:
        await way.upstream.complete({"messages": []})
    way = await renderer.way_on("m", way, later.value)
    with pytest.raises(UpstreamRefused):
        await way.upstream.complete({"messages": []})
    await way.upstream.complete({"messages": []})
    await upstreams.close()
    counted = {line for line in metrics.text(Load()).decode().splitlines() if line.startswith(UPSTREAM)}
    assert {line.removeprefix(UPSTREAM) for line in counted if not line.endswith(" 0.0")} == {
        'requests_total{upstream="first"} 2.0',
        'requests_total{upstream="second"} 2.0',
        'retries_total{upstream="first"} 1.0',
        'errors_total{kind="refused_5xx",upstream="first"} 2.0',
        'errors_total{kind="refused_4xx",upstream="second"} 1.0',
        'fallbacks_total{kind="refused_5xx",to="second",upstream="first"} 1.0',
    }
