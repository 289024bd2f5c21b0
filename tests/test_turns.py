"""A turn by itself, against a real backend: where its ids and times come from, and who lets go of the backend."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from controlled import Verb, controlled
from event_grammar import check, parse
from scripted import DONE, END, Backend, Script, chunk, plain, streamed

from auth import Caller
from compaction import CompactionSettings
from counting import Counter
from errors import InvalidRequest, ProxyError, StoreError
from keeper import Asked
from leases import Leases
from metrics import Metrics
from observing import Observer
from records import restored
from request import RequestLimits, parse_request
from routing import Upstreams
from run_verbs import RunStore
from sealing import Seals
from sources import Sources
from store import StoreSettings, open_store
from stream_plan import ReasoningSettings
from turns import Means, Turn, Turns, TurnSettings
from upstream import UpstreamSettings
from upstream_errors import UpstreamRefused
from verbs import Page
from watching import Watcher

HI = {"model": "m", "input": "Hi"}
STREAM = {**HI, "stream": True}


def asked(body: dict[str, Any]) -> Asked:
    return Asked(parse_request(body, RequestLimits()), Caller(""))


class Bench:
    """Turns with a clock that stands still and ids that count."""

    def __init__(self, upstreams: Upstreams, store: RunStore) -> None:
        self.upstreams = upstreams
        self.store = store

    def turns(self, **settings: Any) -> Turns:
        numbers = itertools.count(1)
        sources = Sources(lambda: 1_700_000_000.9, lambda prefix: f"{prefix}_{next(numbers)}")
        means = Means(
            self.upstreams,
            Leases(self.store, sources),
            Seals((bytes(32),)),
            sources,
            Watcher(self.store),
            Counter(),
            Observer(Metrics()),
        )
        return Turns(means, TurnSettings(**settings), ReasoningSettings(), CompactionSettings())

    async def prepare(self, body: dict[str, Any], **settings: Any) -> Turn:
        return await self.turns(**settings).prepare(asked(body))


@pytest.fixture
async def bench(backend: Backend) -> AsyncIterator[Bench]:
    named = UpstreamSettings(base_url=backend.url, dialect="openai", retries=0, aliases={"gpt-5": "m"})
    upstreams = Upstreams((named,))
    store = await open_store(StoreSettings(":memory:"))
    yield Bench(upstreams, store)
    await store.close()
    await upstreams.close()


async def all_events(turn: Turn) -> list[dict[str, Any]]:
    return [event async for batch in turn.events() for event in batch]


async def test_ids_and_times_come_from_the_sources(bench: Bench) -> None:
    response = await (await bench.prepare(HI)).run()
    assert (response["id"], response["created_at"], response["completed_at"]) == (
        "resp_1",
        1_700_000_000,
        1_700_000_000,
    )
    assert response["output"][0]["id"] == "msg_10001"


async def test_an_alias_is_sent_by_its_real_name_and_echoed_as_asked(bench: Bench, backend: Backend) -> None:
    response = await (await bench.prepare({**HI, "model": "gpt-5"})).run()
    assert ((await backend.received()).body["model"], response["model"]) == ("m", "gpt-5")


async def test_only_a_streamed_turn_asks_the_backend_to_stream(bench: Bench, backend: Backend) -> None:
    backend.script(plain(), streamed("Hi"))
    await (await bench.prepare(HI)).run()
    turn = await bench.prepare(STREAM)
    await turn.accept()
    await all_events(turn)
    first, second = (await backend.received()).body, (await backend.received()).body
    assert ("stream" in first, "stream_options" in first) == (False, False)
    assert (second["stream"], second["stream_options"]) == (True, {"include_usage": True})


async def test_usage_is_estimated_for_a_backend_that_counts_nothing(bench: Bench, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hello"), chunk("stop"), DONE]))
    turn = await bench.prepare({**STREAM, "input": "x" * 4000})
    await turn.accept()
    usage = (await all_events(turn))[-1]["response"]["usage"]
    assert 1000 <= usage["input_tokens"] <= 1100
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


async def test_what_is_left_out_is_named(bench: Bench) -> None:
    turn = await bench.prepare({**HI, "seed": 1, "tools": [{"type": "web_search"}]})
    assert turn.ignored == ("seed", "tools[0].type=web_search")


async def test_strict_refuses_what_would_be_left_out(bench: Bench) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await bench.prepare({**HI, "seed": 1}, strict=True)
    assert caught.value.param == "seed"


async def test_a_file_is_read_beside_the_loop(bench: Bench, backend: Backend) -> None:
    part = {"type": "input_file", "filename": "a.txt", "file_data": "dGV4dA=="}
    await (await bench.prepare({**HI, "input": [{"role": "user", "content": [part]}]})).run()
    (message,) = (await backend.received()).body["messages"]
    assert message["content"] == [{"type": "file", "file": {"filename": "a.txt", "file_data": "dGV4dA=="}}]


async def test_a_refusal_at_once_is_raised(bench: Bench, backend: Backend) -> None:
    backend.script(Script([b"no"], 404))
    turn = await bench.prepare(STREAM, created_after_ms=60_000)
    with pytest.raises(UpstreamRefused) as caught:
        await turn.accept()
    assert caught.value.http_status == 404
    await turn.close()


async def test_cancelling_accept_lets_go_of_the_backend(bench: Bench, backend: Backend) -> None:
    backend.script(Script(before=asyncio.Event()))
    turn = await bench.prepare(STREAM, created_after_ms=60_000)
    accepting = asyncio.ensure_future(turn.accept())
    request = await backend.received()
    accepting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await accepting
    assert await request.is_let_go()


async def test_a_turn_that_is_closed_unread_lets_go_of_the_backend(bench: Bench, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    turn = await bench.prepare(STREAM, created_after_ms=60_000)
    await turn.accept()
    await turn.close()
    await turn.close()
    assert await (await backend.received()).is_let_go()


async def test_events_that_are_not_read_to_the_end_let_go_of_the_backend(bench: Bench, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    turn = await bench.prepare(STREAM)
    await turn.accept()
    events = turn.events()
    await anext(events)
    await anext(events)
    await events.aclose()
    assert await (await backend.received()).is_let_go()


async def test_cancelling_the_reader_of_events_is_not_a_failure(bench: Bench, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hel")], end="silent"))
    turn = await bench.prepare(STREAM)
    await turn.accept()
    seen: list[str] = []
    has_begun = asyncio.Event()

    async def read() -> None:
        async for batch in turn.events():
            seen.extend(event["type"] for event in batch)
            has_begun.set()

    reading = asyncio.ensure_future(read())
    request = await backend.received()
    await has_begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert "response.failed" not in seen
    assert await request.is_let_go()


async def test_a_cancelled_plain_turn_lets_go_of_the_backend(bench: Bench, backend: Backend) -> None:
    backend.script(Script(before=asyncio.Event()))
    running = asyncio.ensure_future((await bench.prepare(HI)).run())
    request = await backend.received()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await request.is_let_go()


async def test_a_finished_stream_leaves_its_connection_for_the_next_turn(bench: Bench, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hello"), *END]))
    for _ in range(2):
        turn = await bench.prepare(STREAM)
        await turn.accept()
        await all_events(turn)
    assert [request.gone.is_set() for request in backend.requests] == [False, False]
    assert backend.connections == 1


# -- a process that stops while a turn is kept -------------------------------------------------------------------------

STOPPED = ProxyError("The proxy was stopped before the answer was finished.")


async def cancelled_while_it_is_kept(turn: Turn, saving: Verb) -> list[dict[str, Any]]:
    """The events that an accepted turn gave before it was cancelled in its save, which has ended since."""
    seen: list[dict[str, Any]] = []

    async def read() -> None:
        async for batch in turn.events():
            seen.extend(batch)

    saving.may_begin.clear()
    reading = asyncio.ensure_future(read())
    await saving.once_more("asked")
    reading.cancel()
    saving.may_begin.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    return seen


async def test_a_stream_that_is_stopped_while_it_is_kept_ends_with_what_was_kept(
    bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.script(streamed("Hel", "lo"))
    saving = controlled("save", monkeypatch)
    turn = await bench.prepare(STREAM)
    await turn.accept()
    events = await cancelled_while_it_is_kept(turn, saving) + turn.fail(STOPPED)
    parse(events)
    response = check(events)
    kept = await bench.store.response("", response["id"])
    assert kept is not None
    assert (events[-1]["type"], restored(kept)) == ("response.completed", response)


async def test_a_stream_that_is_stopped_while_it_is_kept_ends_once(
    bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.script(streamed("Hello"))
    saving = controlled("save", monkeypatch)
    turn = await bench.prepare(STREAM)
    await turn.accept()
    await cancelled_while_it_is_kept(turn, saving)
    turn.fail(STOPPED)
    assert turn.fail(STOPPED) == []


async def test_a_stream_that_is_stopped_while_it_cannot_be_kept_has_failed(
    bench: Bench, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.script(streamed("Hello"))
    saving = controlled("save", monkeypatch)
    saving.failure = StoreError("The store of responses may not be written.")
    turn = await bench.prepare(STREAM)
    await turn.accept()
    await cancelled_while_it_is_kept(turn, saving)
    *closing, last = turn.fail(STOPPED)
    assert [event["type"] for event in closing[-2:]] == ["response.content_part.done", "response.output_item.done"]
    assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", STOPPED.message)
    assert await bench.store.response("", last["response"]["id"]) is None


# -- background --------------------------------------------------------------------------------------------------------

RUN = {**HI, "background": True}


async def test_a_background_turn_asks_the_backend_to_stream_and_tells_nothing(bench: Bench, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    assert await all_events(await bench.prepare(RUN)) == []
    assert (await backend.received()).body["stream"] is True
    (kept,) = (await bench.store.responses("", Page(), None)).rows
    assert (kept.status, [b"Hello" in item for item in kept.outputs]) == ("completed", [True])


async def test_a_look_gives_the_items_and_the_names_of_what_is_left_out(bench: Bench, backend: Backend) -> None:
    turns = bench.turns()
    own, ignored = await turns.look(asked({**RUN, "seed": 1, "tools": [{"type": "web_search"}]}))
    assert own == [{"type": "message", "role": "user", "content": "Hi"}]
    assert (ignored, backend.requests) == (("seed", "tools[0].type=web_search"), [])


async def test_a_look_refuses_what_a_turn_would_refuse(bench: Bench, backend: Backend) -> None:
    output = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}
    with pytest.raises(InvalidRequest) as caught:
        await bench.turns().look(asked({**RUN, "input": [output]}))
    assert ("call_x" in caught.value.message, backend.requests) == (True, [])


async def test_a_strict_look_refuses_what_would_be_left_out(bench: Bench) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await bench.turns(strict=True).look(asked({**RUN, "seed": 1}))
    assert caught.value.param == "seed"


async def test_a_stream_that_never_began_is_told_as_created_and_failed(bench: Bench) -> None:
    events = bench.turns().refused(asked(STREAM).request, InvalidRequest("No."))
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert [event["response"]["status"] for event in events] == ["in_progress", "in_progress", "failed"]
    assert events[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "No."}
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
