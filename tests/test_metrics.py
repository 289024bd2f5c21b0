"""What is counted for operators: the form of it, and what moves each number in the running proxy."""

from __future__ import annotations

import asyncio
import hashlib
import re

from conftest import ROOT, App, StartApp
from prometheus_client.parser import text_string_to_metric_families
from scripted import Backend, streamed
from store_places import Place
from test_background import (
    RUN,
    STREAMED_RUN,
    StartOnStore,
    cancelled,
    created,
    deleted,
    ended,
    foreground,
    gated,
    on_store,
    until,
)

from metrics import CONTENT_TYPE, ENDS, MODES, Load, Metrics

__all__ = ["on_store"]
NAMES = {
    "runs_queued": "gauge",
    "runs_running": "gauge",
    "run_attempts": "counter",
    "run_takeovers": "counter",
    "run_cancels": "counter",
    "compactions": "counter",
    "compaction_failures": "counter",
    "compaction_tokens_before": "histogram",
    "compaction_tokens_after": "histogram",
    "compaction_seconds": "histogram",
    "requests": "counter",
    "requests_in_flight": "gauge",
    "streams_open": "gauge",
    "websockets_open": "gauge",
    "answer_seconds": "histogram",
    "turns": "counter",
    "turn_seconds": "histogram",
    "first_output_seconds": "histogram",
    "upstream_requests": "counter",
    "upstream_fallbacks": "counter",
    "upstream_retries": "counter",
    "upstream_errors": "counter",
    "tokens": "counter",
    "ignored": "counter",
    "store_save_seconds": "histogram",
    "store_writes_waiting": "gauge",
    "store_bytes": "gauge",
    "build_info": "gauge",
}


UNUSED_HISTOGRAMS = ("tokens_before", "tokens_after", "seconds")


def values_in(text: str) -> dict[str, float]:
    """The samples by name and label, without those that say when a counter was made, and without buckets."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        assert NAMES[family.name.removeprefix("responses_proxy_")] == family.type
        assert family.documentation
        for sample in family.samples:
            if "le" not in sample.labels:
                name = sample.name.removeprefix("responses_proxy_")
                found["".join([name, *(f"[{value}]" for value in sample.labels.values())])] = sample.value
    return found


async def values(app: App) -> dict[str, float]:
    async with app.http.get(f"{app.url}/metrics") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, CONTENT_TYPE)
        return values_in(await answer.text())


async def reached(app: App, **expected: float) -> None:
    """Waits until the metrics have these values."""

    async def is_so() -> bool:
        found = await values(app)
        return {name: found[name] for name in expected} == expected

    await until(is_so)


def test_a_fresh_process_has_counted_nothing() -> None:
    text = Metrics("1.2").text(Load(3, 2, 1, 4096)).decode()
    assert values_in(text) == {
        "runs_queued": 3,
        "runs_running": 2,
        "store_writes_waiting": 1,
        "store_bytes": 4096,
        "build_info[1.2]": 1,
        "requests_in_flight": 0,
        "streams_open": 0,
        "websockets_open": 0,
        **{f"turns_total[{mode}][{status}]": 0 for mode in MODES for status in ENDS},
        "run_attempts_total": 0,
        "run_takeovers_total": 0,
        "run_cancels_total": 0,
        **{f"compaction_{name}_{part}": 0 for name in UNUSED_HISTOGRAMS for part in ("sum", "count")},
    }


def test_two_of_them_in_one_program_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.cancels.inc()
    assert [values_in(each.text(Load()).decode())["run_cancels_total"] for each in (one, other)] == [1, 0]


def test_every_name_is_in_the_docs() -> None:
    families = list(text_string_to_metric_families(Metrics().text(Load()).decode()))
    told = {
        name
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"`(responses_proxy_\w+)`", page.read_text())
    }
    assert told == {family.name + ("_total" if family.type == "counter" else "") for family in families}


async def test_they_need_no_key(start_app: StartApp) -> None:
    keys = {"alice": f"sha256:{hashlib.sha256(b'rp-alice').hexdigest()}"}
    assert (await values(await start_app(auth={"mode": "keys", "keys": keys})))["runs_queued"] == 0


async def test_what_waits_and_what_runs_is_told_at_every_process(on_store: StartOnStore, backend: Backend) -> None:
    submitting = await on_store(workers=0)
    carrying_out = await on_store(workers=1)
    script, goes_on = gated()
    backend.script(script)
    for _ in range(3):
        await created(submitting)
    await backend.received()
    for app in (submitting, carrying_out):
        await reached(app, runs_queued=2, runs_running=1)
    goes_on.set()
    for app in (submitting, carrying_out):
        await reached(app, runs_queued=0, runs_running=0)
    assert (await values(submitting))["run_attempts_total"] == 0
    assert (await values(carrying_out))["run_attempts_total"] == 3


async def test_a_foreground_turn_is_no_attempt(app: App) -> None:
    await foreground(app)
    assert (await values(app))["run_attempts_total"] == 0


async def test_a_failed_response_is_one_attempt(app: App, backend: Backend) -> None:
    goes_on = asyncio.Event()
    script, _ = gated()
    script.end, script.steps, script.before = "cut", [], goes_on
    backend.script(script)
    response_id = (await created(app))["id"]
    goes_on.set()
    assert (await ended(app, response_id))["status"] == "failed"
    await reached(app, run_attempts_total=1, run_takeovers_total=0, runs_running=0)


async def test_a_run_that_was_begun_before_is_a_takeover(
    on_store: StartOnStore, backend: Backend, place: Place
) -> None:
    backend.script(streamed("Hi"))
    app = await on_store(workers=0)
    response_id = (await created(app))["id"]
    place.asked("UPDATE run SET attempts = 1")
    taking_over = await on_store()
    assert (await ended(app, response_id))["status"] == "completed"
    await reached(taking_over, run_attempts_total=1, run_takeovers_total=1)


async def test_a_cancel_counts_where_it_was_asked_for_and_once(on_store: StartOnStore, backend: Backend) -> None:
    submitting = await on_store(workers=0)
    carrying_out = await on_store()
    script, _ = gated()
    backend.script(script)
    response_id = (await created(submitting, STREAMED_RUN))["id"]
    await backend.received()
    for _ in range(2):
        await cancelled(submitting, response_id)
    await reached(submitting, run_cancels_total=1, runs_running=0)
    assert (await values(carrying_out))["run_cancels_total"] == 0


async def test_a_delete_of_a_running_one_counts_as_a_cancel(app: App, backend: Backend) -> None:
    script, _ = gated()
    backend.script(script)
    response_id = (await created(app))["id"]
    await backend.received()
    await deleted(app, response_id)
    await reached(app, run_cancels_total=1, runs_running=0)


async def test_a_cancel_of_one_that_has_ended_does_not_count(app: App, backend: Backend) -> None:
    backend.script(streamed("Hi"))
    response_id = (await ended(app, (await created(app, RUN))["id"]))["id"]
    await cancelled(app, response_id)
    assert (await values(app))["run_cancels_total"] == 0
