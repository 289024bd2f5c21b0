"""Recorded answers of real servers, as bytes, through the decoder and the state machine."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest
from conftest import App
from event_grammar import check, parse, relay, without_ids
from scripted import Backend, Script
from wire_reader import Transcript, transcript, transcripts

from refusals import raise_if_error, refusal
from sse import SSEDecoder
from upstream_errors import UpstreamError

Json = dict[str, Any]
ALL = transcripts()
ANSWERS = [t for t in ALL if t.status == 200 and t.is_chat]
STREAMS = [t for t in ANSWERS if t.is_stream]
WHOLE_STREAMS = [t for t in STREAMS if not t.cut]
PLAIN = [t for t in ANSWERS if not t.is_stream]
CUT = [t for t in STREAMS if t.cut]
REFUSALS = [t for t in ALL if t.status >= 400 and "chat/completions" in t.asked and "input_tokens" not in t.asked]


def named(found: list[Transcript]) -> list[Any]:
    return [pytest.param(each, id=each.name) for each in found]


def payloads(body: bytes, cuts: list[int]) -> list[bytes]:
    decoder = SSEDecoder()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        found += decoder.feed(body[start:end])
    return found + decoder.flush()


def chunks_of(recorded: Transcript) -> list[Json]:
    if not recorded.is_stream:
        return [orjson.loads(recorded.body)]
    return [orjson.loads(payload) for payload in payloads(recorded.body, []) if payload != b"[DONE]"]


def test_the_recordings_are_all_there() -> None:
    assert [len(found) for found in (WHOLE_STREAMS, PLAIN, CUT, REFUSALS, pairs())] == [63, 128, 2, 65, 41]


# -- one recording at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", named(ANSWERS))
def test_a_recorded_answer_becomes_a_valid_event_stream(recorded: Transcript) -> None:
    events = relay(chunks_of(recorded), logprobs=True)
    parse(events)
    assert events[-1]["response"]["output"]


@pytest.mark.parametrize("recorded", named(WHOLE_STREAMS))
def test_a_recorded_stream_reads_the_same_wherever_the_network_cuts_it(recorded: Transcript) -> None:
    whole = payloads(recorded.body, [])
    places = random.Random(recorded.name)
    for count in (1, 10, 100):
        cuts = sorted(places.choices(range(len(recorded.body)), k=count))
        assert payloads(recorded.body, cuts) == whole
        crlf = recorded.body.replace(b"\n", b"\r\n")
        assert payloads(crlf, cuts) == whole


@pytest.mark.parametrize("source", ["llamacpp", "vllm", "transformers", "aimock", "litellm"])
def test_a_recorded_stream_reads_the_same_byte_by_byte(source: str) -> None:
    body = transcript(f"{source}/tools-auto-stream").body
    assert payloads(body, list(range(1, len(body)))) == payloads(body, [])


# -- recordings that break off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", named(CUT))
async def test_a_stream_that_was_cut_ends_as_failed_with_what_was_said(
    app: App, backend: Backend, recorded: Transcript
) -> None:
    backend.script(Script([recorded.body], end="cut"))
    async with app.post({"model": "m", "input": "Hi", "stream": True}) as answer:
        found = payloads(await answer.read(), [])
    events = [orjson.loads(payload) for payload in found if payload != b"[DONE]"]
    response = check(events)
    assert response["status"] == "failed"
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert (said, response["output"][0]["content"][0]["text"]) == (said_in(recorded), said_in(recorded))


def said_in(recorded: Transcript) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks_of(recorded))


# -- plain against streamed --------------------------------------------------------------------------------------------

# Pairs in which the backend itself says two different things, and why.
UNEQUAL = {
    "vllm/one-call-cut": "streamed, a call cut by the token limit is a call; plain, it is raw <tool_call> text",
}


def asks_the_same(one: Transcript, other: Transcript) -> bool:
    bare = [{k: v for k, v in (t.request or {}).items() if k not in ("stream", "stream_options")} for t in (one, other)]
    return one.request is not None and bare[0] == bare[1]


def pairs() -> list[tuple[Transcript, Transcript]]:
    by_name = {recorded.name: recorded for recorded in ANSWERS}
    found = [(one, by_name.get(f"{one.name}-stream")) for one in PLAIN]
    return [(one, other) for one, other in found if other and not other.cut and asks_the_same(one, other)]


def both(pair: tuple[Transcript, Transcript]) -> list[list[Json]]:
    return [without_ids(relay(chunks_of(recorded), logprobs=True)[-1]["response"]["output"]) for recorded in pair]


EQUAL_PAIRS = [pytest.param(pair, id=pair[0].name) for pair in pairs() if pair[0].name not in UNEQUAL]


@pytest.mark.parametrize("pair", EQUAL_PAIRS)
def test_the_same_prompt_gives_the_same_items_plain_and_streamed(pair: tuple[Transcript, Transcript]) -> None:
    plain, streamed = both(pair)
    assert plain == streamed


@pytest.mark.parametrize("name", sorted(UNEQUAL))
def test_an_exception_is_still_one(name: str) -> None:
    (pair,) = [pair for pair in pairs() if pair[0].name == name]
    plain, streamed = both(pair)
    assert plain != streamed


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", named(REFUSALS))
def test_a_recorded_refusal_is_an_error_with_the_backends_own_words(recorded: Transcript) -> None:
    try:
        body = orjson.loads(recorded.body)
    except orjson.JSONDecodeError:
        body = recorded.body.decode()
    error = refusal(recorded.status, body, "here")
    assert 400 <= error.http_status <= 599
    assert len(error.message) > len(f"Upstream 'here' answered {recorded.status}.")


@pytest.mark.parametrize("recorded", named([t for t in REFUSALS if t.body.startswith(b'{"error"')]))
def test_a_recorded_error_object_inside_an_answer_is_raised(recorded: Transcript) -> None:
    with pytest.raises(UpstreamError):
        raise_if_error(orjson.loads(recorded.body), "here")
