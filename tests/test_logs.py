"""Log lines: their form, whose they are, and that nothing of a prompt, an answer or a key is in them."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import aiohttp
import pytest
from compacting import LONG, LOW, Talker, chain
from conftest import App, StartApp
from scripted import Backend, Script, call_delta, chunk, plain, refused, sse, streamed, streamed_calls
from test_background import RUN, created, ended, in_status
from test_cli import UVICORN, started
from test_observing import HI, STREAM, read

from errors import InvalidRequest
from logs import REQUEST_ID, JsonLines
from refusals import refusal
from summaries import failed
from upstream_errors import UpstreamRefused, WindowExceeded

Json = dict[str, Any]
SECRET = "sesame-4711"


def record(message: str = "A line.", **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "a.logger", "levelname": "INFO", "msg": message, "created": 0.5, **extra})


def told(line: logging.LogRecord) -> Json:
    found: Json = json.loads(JsonLines().format(line))
    return found


# -- one object a line -------------------------------------------------------------------------------------------------


def test_a_line_is_an_object() -> None:
    assert told(record(request_id="req_1")) == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "level": "info",
        "logger": "a.logger",
        "message": "A line.",
        "request_id": "req_1",
    }


def test_a_line_of_nobodys_request_says_so() -> None:
    assert told(record())["request_id"] == "-"


def test_fields_become_keys() -> None:
    found = told(record(fields={"status": 200, "odd": object}))
    assert (found["status"], found["odd"]) == (200, "<class 'object'>")


def test_an_exception_is_a_key() -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        line = record(exc_info=sys.exc_info())
    found = told(line)
    assert found["message"] == "A line."
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: the reason")


def test_half_a_character_and_a_newline_stay_in_their_line() -> None:
    line = JsonLines().format(record("Half \ud800 a\ncharacter"))
    assert "\n" not in line
    assert json.loads(line)["message"] == "Half \ud800 a\ncharacter"


JSON_LINES = {"RESPONSES_PROXY_SERVER__LOG_FORMAT": "json", "RESPONSES_PROXY_SERVER__ACCESS_LOG": "true"}
PROGRAMS = {"the program": ["proxy.py", "--port", "0"], "any server": UVICORN}


@pytest.mark.parametrize("command", PROGRAMS.values(), ids=PROGRAMS)
async def test_every_line_of_a_process_is_an_object(backend: Backend, command: list[str]) -> None:
    environ = {"RESPONSES_PROXY_UPSTREAM__URL": backend.url, **JSON_LINES}
    async with started(*command, **environ) as process, aiohttp.ClientSession() as session:
        async with session.post(f"{process.url}/v1/responses", json=HI) as answer:
            response, request_id = await answer.json(), answer.headers["x-request-id"]
        await process.stop()
    said = process.output.splitlines()
    begun = next(number for number, line in enumerate(said) if line.startswith("{"))
    lines = [json.loads(line) for line in said[begun:]]
    assert all(line.startswith("INFO:") for line in said[:begun])  # of another server, before it starts the application
    (found,) = [line for line in lines if line["logger"] == "responses_proxy.access"]
    assert found.pop("time")
    assert found.pop("message")
    assert found.pop("duration_ms") > 0
    assert found == {
        "level": "info",
        "logger": "responses_proxy.access",
        "request_id": request_id,
        "method": "POST",
        "path": "/v1/responses",
        "status": 200,
        "response_id": response["id"],
        "upstream": "127.0.0.1",
    }
    assert "uvicorn.error" in {line["logger"] for line in lines}


# -- a line for each request -------------------------------------------------------------------------------------------


def access_lines(caplog: pytest.LogCaptureFixture) -> list[Json]:
    return [vars(line)["fields"] for line in caplog.records if line.name == "responses_proxy.access"]


async def test_there_is_none_unless_it_is_asked_for(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await read(app, HI)
    assert access_lines(caplog) == []


async def test_it_names_templates_and_owners(start_app: StartApp, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = await start_app(server={"access_log": True}, auth={"mode": "passthrough"})
    key = {"authorization": f"Bearer {SECRET}"}
    async with app.http.get(f"{app.url}/v1/responses/resp_{SECRET}?include={SECRET}", headers=key):
        pass
    async with app.http.get(f"{app.url}/{SECRET}", headers=key):
        pass
    one, other = access_lines(caplog)
    assert one.pop("duration_ms") >= 0
    assert len(one.pop("owner")) == 32
    assert one == {"method": "GET", "path": "/v1/responses/{id}", "status": 400}
    assert (other["method"], other["path"], other["status"]) == ("other", "", 404)


async def test_a_look_at_its_health_is_no_line(start_app: StartApp, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = await start_app(server={"access_log": True})
    for path in ("/healthz", "/metrics"):
        async with app.http.get(app.url + path):
            pass
    assert access_lines(caplog) == []


async def test_lines_of_a_run_name_its_response(app: App, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    ids = []

    class Listens(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            if "turn failed" in line.getMessage():
                ids.append(REQUEST_ID.get())

    handler = Listens()
    logging.getLogger("responses_proxy").addHandler(handler)
    try:
        backend.script(refused(500, "No."))
        response = await created(app, RUN)
        await in_status(app, response["id"], "failed")
    finally:
        logging.getLogger("responses_proxy").removeHandler(handler)
    assert ids == [response["id"]]


# -- what is in none ---------------------------------------------------------------------------------------------------


ECHO = f"You said: {SECRET}"
TOOL: Json = {
    "type": "function",
    "name": SECRET,
    "description": SECRET,
    "parameters": {"type": "object", "properties": {SECRET: {"type": "string"}}},
}
SAID: Json = {
    "model": "m",
    "input": f"The password is {SECRET}.",
    "instructions": SECRET,
    "metadata": {"a": SECRET},
    "user": SECRET,
    "tools": [TOOL],
}
KEYS = {"authorization": f"Bearer {SECRET}", "x-mine": SECRET, "cookie": SECRET}
BAD = ({"input": [{"type": SECRET}]}, {"tool_choice": {"type": "function", "name": "no"}}, {"temperature": SECRET})
OVERFLOW = refused(400, f"{ECHO} maximum context length is 1024 tokens", code="context_length_exceeded")
CALL = streamed_calls(call_delta(0, f'{{"a": "{SECRET}"}}', "look", "call_1"))
ANSWERS: dict[str, list[Script]] = {
    "answered": [plain(ECHO)],
    "refused": [refused(400, ECHO, code=SECRET, param=SECRET)],
    "broken inside": [refused(500, ECHO)],
    "overloaded": [refused(503, ECHO)],
    "too full": [OVERFLOW],
    "an error in a 200": [Script([json.dumps({"error": {"message": ECHO, "code": 500}}).encode()])],
    "no JSON": [Script([ECHO.encode()])],
    "cut": [Script([ECHO.encode()], end="cut")],
}
STREAMS: dict[str, list[Script]] = {
    "answered": [streamed(ECHO)],
    "called": [CALL],
    "refused": [refused(400, ECHO)],
    "broken inside": [refused(500, ECHO)],
    "too full": [OVERFLOW],
    "an error in it": [Script([chunk(content=ECHO), sse({"error": {"message": ECHO, "code": 500}})])],
    "no JSON": [Script([chunk(content=ECHO), f"data: {ECHO}\n\n".encode()])],
    "cut": [Script([chunk(content=ECHO)], end="cut")],
}


def lines_of(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """By logger: all that a line could show, its fields and exceptions too.

    Without the server's own line for each request, which the program turns off, and pytest listens to all the same.
    """
    records = [line for line in caplog.records if line.name != "uvicorn.access"]
    return [(line.name, JsonLines().format(line) + repr(vars(line).get("args"))) for line in records]


async def all_kinds_of_requests(app: App, backend: Backend) -> None:
    for scripts in ANSWERS.values():
        backend.script(*scripts)
        await read(app, SAID, headers={**KEYS, "idempotency-key": SECRET})
    for scripts in STREAMS.values():
        backend.script(*scripts)
        await read(app, {**SAID, "stream": True}, headers=KEYS)
        await ended(app, (await created(app, {**SAID, "background": True}, **KEYS))["id"])
    for body in BAD:
        assert await read(app, {**HI, **body}, headers=KEYS) == 400
    await read(app, SAID, "/v1/responses/compact", headers=KEYS)
    await read(app, {**SAID, "metadata": None}, "/v1/responses/input_tokens", headers=KEYS)
    await read(app, {"items": [{"role": "user", "content": SECRET}]}, "/v1/conversations", headers=KEYS)
    async with app.http.get(f"{app.url}/v1/responses/{SECRET}?after={SECRET}", headers=KEYS):
        pass


@pytest.fixture
async def talkative(start_app: StartApp) -> App:
    upstream = {"api_key": SECRET, "headers": {"x-more": SECRET}, "retries": 1, "retry_backoff_s": 0.0}
    return await start_app(server={"access_log": True}, upstream=upstream)


async def test_nothing_that_was_said_is_in_the_log(
    talkative: App, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await all_kinds_of_requests(talkative, backend)
    found = lines_of(caplog)
    assert len([name for name, _ in found if name.startswith("responses_proxy")]) > 30
    assert [line for _, line in found if SECRET in line] == []


async def test_at_debug_only_the_words_of_backends_are_in_the_log(
    talkative: App, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await all_kinds_of_requests(talkative, backend)
    found = lines_of(caplog)
    assert {name for name, line in found if SECRET in line} == {"responses_proxy.observing"}
    assert {"aiosqlite", "asyncio"} & {name for name, _ in found}


@pytest.mark.parametrize("status", [400, 500])
async def test_a_compaction_that_fails_tells_nothing_of_it(
    start_app: StartApp, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.INFO)
    async with Talker().running() as talker:
        app = await start_app(compaction=LOW, upstream={"base_url": talker.url})
        first = await chain(app)
        talker.record = lambda body: refused(status, ECHO)
        assert await read(app, {"model": "m", "input": LONG, "previous_response_id": first["id"]}) == 200
        assert await read(app, {"model": "m", "previous_response_id": first["id"]}, "/v1/responses/compact") == 502
    assert "the turn goes on as it is" in caplog.text
    assert SECRET not in caplog.text


async def test_the_client_is_told_what_the_log_is_not(
    app: App, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend.script(refused(500, ECHO))
    async with app.post(STREAM) as answer:
        assert SECRET in await answer.text()
    assert "answered 500" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("cls", [UpstreamRefused, WindowExceeded])
def test_a_refusal_is_logged_without_the_backends_words(cls: type[UpstreamRefused]) -> None:
    full = "maximum context length is 1024 tokens" if cls is WindowExceeded else ""
    error = refusal(400, {"error": {"message": f"{ECHO} {full}", "code": SECRET}}, "one")
    assert (type(error), error.logged) == (cls, "Upstream 'one' answered 400.")
    assert failed(error.message, error.logged).logged == f"The conversation could not be compacted: {error.logged}"


def test_a_mistake_of_a_client_is_logged_as_its_place() -> None:
    error = InvalidRequest(f"Invalid value: '{SECRET}'.", param="input[0].type", code="invalid_value")
    assert error.logged == "InvalidRequest invalid_value 'input[0].type'"
