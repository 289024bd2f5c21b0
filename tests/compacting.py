"""A backend that counts what it is sent and keeps the facts of what it summarises; and builders for compacted turns.

`FACT 3: red` is a fact. It stands in what a user says, or `TELL 3: red` has the backend say it. Its records hold the
facts of what it was given and nothing else, so that a fact that is lost on the way is seen.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from conftest import App, StartApp
from openai import AsyncOpenAI
from scripted import DEADLINE_S, DONE, Backend, Received, Script, chunk, refused, sse

from summaries import PROMPT

Json = dict[str, Any]
FACT = re.compile(r"FACT \d+: \w+")
TELL = re.compile(r"TELL (\d+: \w+)")
FILLER = "We walk along the river and talk about the weather of the last few days. "
ANSWER = "It was a fine day, and then it rained. "
BYTES_PER_TOKEN = 4
SUMMARY_OUTPUT_TOKENS = 5
# Lets every turn that follows one of some length be compacted.
LOW: Json = {"threshold_tokens": 1000}
LONG = FILLER * 60
BLOB = "encrypted_content"


def tokens_of(messages: list[Json]) -> int:
    return len(json.dumps(messages)) // BYTES_PER_TOKEN


def texts_of(body: Json) -> str:
    """All that a model is told."""
    return json.dumps(body["messages"], ensure_ascii=False)


def facts_of(text: str) -> list[str]:
    return list(dict.fromkeys(FACT.findall(text)))


def answered(body: Json, text: str, finish: str = "stop", output_tokens: int | None = None, **message: Any) -> Script:
    """A chat answer in the form that was asked for, with a true count of the prompt."""
    given = tokens_of(body["messages"])
    made = len(text) // BYTES_PER_TOKEN if output_tokens is None else output_tokens
    usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    if body.get("stream"):
        count = sse({"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": usage})
        said = [chunk(role="assistant", content="", **message), chunk(content=text)]
        return Script([*said, chunk(finish), count, DONE])
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return Script([json.dumps({"id": "c1", "model": "m", "choices": [choice], "usage": usage}).encode()])


def called(body: Json, call_id: str, name: str = "look", arguments: str = "{}") -> Script:
    call = {"index": 0, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return answered(body, "", "tool_calls", 9, tool_calls=[call])


def record_of(body: Json) -> Script:
    """A record that holds all facts of the earlier record and of the conversation."""
    return answered(body, "\n".join(facts_of(body["messages"][1]["content"])) or "-", "stop", SUMMARY_OUTPUT_TOKENS)


def said(body: Json) -> Script:
    told = TELL.findall(str(body["messages"][-1]["content"]))
    return answered(body, "".join(f"FACT {each}. " for each in told) or ANSWER)


Answer = Callable[[Json], Script]


class Talker(Backend):
    """Answers requests for records with `record`, and all others with `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = PROMPT
        self.record: Answer = record_of
        self.answer: Answer = said

    def is_record(self, body: Json) -> bool:
        return bool(body["messages"][0] == {"role": "system", "content": self.prompt})

    def _answer(self, request: Received, *streams: Any) -> Any:
        if request.path.endswith("/chat/completions"):
            body = request.body
            self.script((self.record if self.is_record(body) else self.answer)(body))
        return super()._answer(request, *streams)

    def _looked_up(self, request: Received) -> Script:
        """A script, too, may stand in `looked_up`."""
        found = self.looked_up.get(request.path)
        return found if isinstance(found, Script) else super()._looked_up(request)

    @property
    def records(self) -> list[Json]:
        """The requests for records."""
        return [each.body for each in self.requests if self.is_record(each.body)]

    @property
    def turns(self) -> list[Received]:
        return [each for each in self.requests if not self.is_record(each.body)]

    async def asked_for_record(self) -> Received:
        """The next request for a record; other requests before it are passed over."""
        while not self.is_record((found := await self.received()).body):
            pass
        return found


def held(answer: Answer = record_of) -> tuple[Answer, asyncio.Event]:
    """The answer, before which the backend waits."""
    goes_on = asyncio.Event()

    def waiting(body: Json) -> Script:
        script = answer(body)
        script.before = goes_on
        return script

    return waiting, goes_on


def in_turn(*answers: Answer) -> Answer:
    """One after the other, and the last one again and again."""
    left = list(answers)
    return lambda body: (left.pop(0) if len(left) > 1 else left[0])(body)


def broken(body: Json) -> Script:
    return refused(500, "broken")


# What a model may do that has to write a record, and what is said of it.
BAD_RECORDS: dict[str, Answer] = {
    "broken": broken,
    "empty": lambda body: answered(body, " "),
    "too-long": lambda body: answered(body, "word " * 60_000),
    "cut": lambda body: answered(body, "FACT", "length"),
}


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def backend() -> AsyncIterator[Talker]:
    async with Talker().running() as backend:
        yield backend


@pytest.fixture
async def app(start_app: StartApp) -> App:
    """Compacts nothing by itself."""
    return await start_app()


@pytest.fixture
async def low(start_app: StartApp) -> App:
    """Compacts whatever is longer than a few sentences."""
    return await start_app(compaction=LOW)


# -- turns -------------------------------------------------------------------------------------------------------------


async def until(found: Callable[[], Any]) -> Any:
    """What is found, as soon as there is something; it may be a coroutine function."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            result = found()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.005)


async def ended(client: AsyncOpenAI, response_id: str) -> Any:
    async def found() -> Any:
        response = await client.responses.retrieve(response_id)
        return response if response.status not in ("queued", "in_progress") else None

    return await until(found)


async def turn(app: App, mode: str, said: Any, **options: Any) -> Json:
    """The response of a turn that is made in one of the three modes, as it is at its end."""
    # Around the SDK's rewriting of the input, which takes 0.1 s for hundreds of items.
    client, body = app.openai, {"model": "m", "extra_body": {"input": said}, **options}
    if mode == "background":
        return dict((await ended(client, (await client.responses.create(**body, background=True)).id)).to_dict())
    if mode == "plain":
        return dict((await client.responses.create(**body)).to_dict())
    async with await client.responses.create(**body, stream=True) as stream:
        return dict([event async for event in stream][-1].response.to_dict())


async def chain(app: App, length: int = 1, text: str = LONG, **options: Any) -> Json:
    """The last response of a chain of long turns, each with a fact in it; their facts are 1, 2 and so on."""
    response: Json = {"id": None}
    for number in range(1, length + 1):
        said = f"FACT {number}: red. {text}"
        response = await turn(app, "plain", said, previous_response_id=response["id"], **options)
    return response


MODES = ("plain", "streamed", "background")
each_mode = pytest.mark.parametrize("mode", MODES)
TRIGGER: Json = {"type": "compaction_trigger"}
DOUBLE = ["compaction", "message"]


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"type": "message", "role": "assistant", "content": text}


def kinds(items: list[Json]) -> list[str]:
    return [item["type"] for item in items]


def without_compacting(events: list[Json]) -> list[Json]:
    """The events of a stream, after a look at the one that a trigger adds; numbered as if it had never been there."""
    (at,) = [n for n, event in enumerate(events) if event["type"] == "response.compaction.compacting"]
    added = events[at - 1]
    assert (added["type"], added["item"]["type"]) == ("response.output_item.added", "compaction")
    assert (events[at]["item_id"], events[at]["output_index"]) == (added["item"]["id"], added["output_index"])
    rest = [{**event, "sequence_number": event["sequence_number"] - 1} for event in events[at + 1 :]]
    return [*events[:at], *rest]


async def metrics(app: App) -> defaultdict[str, float]:
    """The values of all series, by name and labels as they are written."""
    async with app.http.get(f"{app.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    pairs = [line.removeprefix("responses_proxy_").rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return defaultdict(float, {name: float(value) for name, value in pairs})


async def asked(app: App, path: str, body: Any = None, status: int = 200, **options: Any) -> Json:
    """What a route answers, or its error; GET without a body."""
    method = "GET" if body is None else "POST"
    async with app.http.request(method, f"{app.url}/v1{path}", json=body, **options) as answer:
        told: Json = await answer.json()
        assert answer.status == status, told
        return told if status == 200 else told["error"]


async def compacted(app: App, body: Json, status: int = 200, **options: Any) -> Json:
    """What POST /v1/responses/compact answers."""
    return await asked(app, "/responses/compact", {"model": "m", **body}, status, **options)
