"""The HTTP client: scripted answers where only the answer matters, real sockets where bytes and time matter."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from aioresponses import aioresponses
from conftest import llamacpp_server
from scripted import DEADLINE_S, DONE, END, Backend, Script, chunk, plain, refused, sse, streamed
from wire_reader import transcript
from yarl import URL

from chat_stream import ChatStream
from routing import Upstreams
from upstream import Upstream, UpstreamSettings, settings_for
from upstream_errors import (
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    WindowExceeded,
)

Json = dict[str, Any]
Connect = Callable[..., Upstream]
BASE = "http://backend/v1"
CHAT, MODELS = f"{BASE}/chat/completions", f"{BASE}/models"
BODY: Json = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}


class Answer(aiohttp.ClientResponse):
    """aioresponses 0.7.9 does not know the newest argument of aiohttp 3.14."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", SimpleNamespace(output_size=0))
        super().__init__(*args, **kwargs)


class Answers(aioresponses):
    """Scripted answers of the HTTP client: `with Answers() as http: http.post(CHAT, payload=...)`."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, response_class=Answer, **kwargs)


def error_of(message: str, **fields: Any) -> Json:
    return {"error": {"message": message, **fields}}


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes an upstream: `connect(url, retries=1)`; retries are immediate unless told otherwise."""
    async with contextlib.AsyncExitStack() as stack:

        def make(base_url: str = BASE, **settings: Any) -> Upstream:
            defaults = {"dialect": "generic", "retry_backoff_s": 0.0}
            upstreams = Upstreams((UpstreamSettings(base_url=base_url, **(defaults | settings)),))
            stack.push_async_callback(upstreams.close)
            return next(iter(upstreams))

        yield make


def asked(http: Answers, url: str = CHAT) -> list[Json]:
    """The bodies of the requests that were made."""
    return [orjson.loads(call.kwargs["data"]) for call in http.requests[("POST", URL(url))]]


async def said(stream: ChatStream) -> str:
    """The text of an answer, read to its end or failure."""
    try:
        return "".join([c["choices"][0]["delta"].get("content", "") async for batch in stream for c in batch])
    finally:
        stream.close()


async def said_by(backend: Backend, connect: Connect, script: Script, **settings: Any) -> str:
    backend.script(script)
    return await said(await connect(backend.url, **settings).stream({**BODY, "stream": True}))


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503, 529])
async def test_a_status_that_says_later_is_tried_again(connect: Connect, status: int) -> None:
    with Answers() as http:
        http.post(CHAT, status=status, payload=error_of("Wait."))
        http.post(CHAT, payload=COMPLETION)
        assert await connect().complete(BODY) == COMPLETION
        assert asked(http) == [BODY, BODY]


async def test_a_refused_connection_is_tried_again(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, exception=aiohttp.ClientConnectionError("no"))
        http.post(CHAT, payload=COMPLETION)
        assert await connect().complete(BODY) == COMPLETION


async def test_retries_come_to_an_end(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, exception=aiohttp.ClientConnectionError("no"), repeat=True)
        with pytest.raises(UpstreamUnreachable):
            await connect(retries=3).complete(BODY)
        assert len(asked(http)) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500, 502, 504])
async def test_a_status_that_says_never_is_not_tried_again(connect: Connect, status: int) -> None:
    with Answers() as http:
        http.post(CHAT, status=status, payload=error_of("No."), repeat=True)
        with pytest.raises(UpstreamRefused, match="No"):
            await connect().complete(BODY)
        assert len(asked(http)) == 1


async def test_a_spent_quota_is_not_tried_again(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=429, payload=error_of("Pay.", code="insufficient_quota"), repeat=True)
        with pytest.raises(UpstreamRefused) as caught:
            await connect().complete(BODY)
        assert (caught.value.error_code, len(asked(http))) == ("insufficient_quota", 1)


async def test_retry_after_wins_over_the_backoff(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=429, headers={"Retry-After": "0.001"})
        http.post(CHAT, payload=COMPLETION)
        assert await connect(retry_backoff_s=1e9).complete(BODY) == COMPLETION


async def test_a_wait_that_is_too_long_is_left_to_the_client(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=503, headers={"Retry-After": "6"}, repeat=True)
        with pytest.raises(UpstreamRefused) as caught:
            await connect(retry_wait_max_s=5.0).complete(BODY)
        assert (caught.value.retry_after_s, len(asked(http))) == (6.0, 1)


async def test_the_backoff_doubles(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=503, repeat=True)
        with pytest.raises(UpstreamRefused):
            await connect(retries=9, retry_backoff_s=0.001, retry_wait_max_s=0.003).complete(BODY)
        assert len(asked(http)) == 3  # waits of 1 and 2 ms; one of 4 is too long


@pytest.mark.parametrize("listed", [{"data": 5}, {"data": ["m"]}, {}, [], 5])
async def test_a_list_of_models_in_no_known_form_is_the_generic_dialect(connect: Connect, listed: Any) -> None:
    with Answers() as http:
        http.get(f"{BASE}/models", payload=listed)
        probe = await connect(dialect="auto").probe()
    assert (probe.dialect.name, probe.models) == ("generic", ())


# -- another spelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "mended"), [("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")]
)
@pytest.mark.parametrize("status", [400, 422])
async def test_the_other_name_of_max_tokens_is_tried(connect: Connect, sent: str, mended: str, status: int) -> None:
    with Answers() as http:
        http.post(CHAT, status=status, payload=error_of(f"Unsupported parameter: '{sent}'."))
        http.post(CHAT, payload=COMPLETION)
        assert await connect().complete({**BODY, sent: 7}) == COMPLETION
        assert asked(http)[1] == {**BODY, mended: 7}


async def test_stream_options_are_dropped_for_a_backend_without_them(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=400, payload=error_of("Unknown field stream_options."))
        http.post(CHAT, payload=COMPLETION)
        await connect().complete({**BODY, "stream_options": {"include_usage": True}})
        assert asked(http)[1] == BODY


async def test_the_spelling_that_was_taken_is_used_from_then_on(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=400, payload=error_of("Unsupported parameter: 'max_tokens'."))
        http.post(CHAT, payload=COMPLETION, repeat=True)
        upstream = connect()
        for _ in range(2):
            await upstream.complete({**BODY, "max_tokens": 7})
        assert asked(http)[2] == {**BODY, "max_completion_tokens": 7}


async def test_each_model_of_a_backend_has_its_own_spelling(connect: Connect) -> None:
    both = ["max_tokens", "max_completion_tokens"]
    with Answers() as http:
        for name in both:
            http.post(CHAT, status=400, payload=error_of(f"Unsupported parameter: '{name}'."))
            http.post(CHAT, payload=COMPLETION)
        http.post(CHAT, payload=COMPLETION, repeat=True)
        upstream = connect()
        for model, sent in zip("abab", both * 2, strict=True):
            await upstream.complete({**BODY, "model": model, sent: 7})
        assert asked(http)[4:] == [
            {**BODY, "model": "a", "max_completion_tokens": 7},
            {**BODY, "model": "b", "max_tokens": 7},
        ]


async def test_two_requests_that_learn_a_spelling_at_once_learn_it_once(connect: Connect, backend: Backend) -> None:
    goes_on = asyncio.Event()
    refusals = [refused(400, "Unsupported parameter: 'max_tokens'.") for _ in range(2)]
    for refusal in refusals:
        refusal.before = goes_on
    backend.script(*refusals, plain())
    upstream = connect(backend.url)
    asking = [asyncio.create_task(upstream.complete({**BODY, "max_tokens": 7})) for _ in range(2)]
    for _ in asking:
        await backend.received()
    goes_on.set()
    await asyncio.gather(*asking)
    await upstream.complete({**BODY, "max_tokens": 7})
    assert len(backend.requests) == 5
    assert backend.requests[-1].body == {**BODY, "max_completion_tokens": 7}


async def test_two_spellings_of_one_request_are_both_tried(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=400, payload=error_of("Unsupported parameter: 'max_tokens'."))
        http.post(CHAT, status=400, payload=error_of("Unknown field stream_options."))
        http.post(CHAT, payload=COMPLETION)
        await connect().complete({**BODY, "max_tokens": 7, "stream_options": {}})
        assert asked(http)[2] == {**BODY, "max_completion_tokens": 7}


async def test_another_spelling_is_tried_once_only(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, status=400, payload=error_of("max_tokens: unexpected"), repeat=True)
        with pytest.raises(UpstreamRefused):
            await connect().complete({**BODY, "max_tokens": 7})
        assert len(asked(http)) == 2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "status", "code"),
    [
        ("llamacpp/ctx-overflow", WindowExceeded, 400, "context_length_exceeded"),
        ("vllm/ctx-overflow", WindowExceeded, 400, "context_length_exceeded"),
        ("litellm/ctx-overflow", WindowExceeded, 400, "context_length_exceeded"),
        ("aimock/ctx-error", WindowExceeded, 400, "context_length_exceeded"),
        ("aimock/ratelimit", UpstreamRefused, 429, "rate_limit_exceeded"),
        ("aimock/http500", UpstreamRefused, 502, "upstream_error"),
        ("aimock/unknown-model", UpstreamRefused, 404, "model_not_found"),
        ("vllm/unknown-model", UpstreamRefused, 404, "upstream_error"),
        ("llamacpp/image-data-url", UpstreamRefused, 400, "upstream_error"),
        ("transformers/unknown-param", UpstreamRefused, 422, "upstream_error"),
        ("transformers/system-late", UpstreamRefused, 502, "upstream_error"),
    ],
)
async def test_a_recorded_refusal_is_the_right_failure(
    connect: Connect, name: str, kind: type[UpstreamError], status: int, code: str
) -> None:
    recorded = transcript(name)
    with Answers() as http:
        http.post(CHAT, status=recorded.status, body=recorded.body)
        with pytest.raises(kind) as caught:
            await connect(retries=0).stream(BODY)
    assert (caught.value.http_status, caught.value.error_code) == (status, code)


async def test_a_refusal_that_arrives_in_pieces_is_read_whole(connect: Connect, backend: Backend) -> None:
    body, rest = orjson.dumps(error_of("No way.", code="no_way")), asyncio.Event()
    backend.script(Script([body[:20], rest, body[20:]], status=400))
    answer = asyncio.create_task(connect(backend.url).complete(BODY))
    await backend.received()
    for _ in range(50):  # turns of the loop, in which the client reads the first piece
        await asyncio.sleep(0)
    rest.set()
    with pytest.raises(UpstreamRefused, match="No way") as caught:
        await answer
    assert caught.value.error_code == "no_way"


async def test_a_refusal_without_end_is_read_in_part(connect: Connect, backend: Backend) -> None:
    backend.script(Script(itertools.repeat(b"no " * 1000), status=400))
    with pytest.raises(UpstreamRefused, match="no no no"):
        await connect(backend.url).complete(BODY)


async def test_a_redirect_is_not_followed(connect: Connect, backend: Backend) -> None:
    backend.script(Script(status=307, headers={"location": f"{backend.url}/chat/completions"}), plain())
    with pytest.raises(UpstreamRefused) as caught:
        await connect(backend.url).complete(BODY)
    assert (caught.value.http_status, len(backend.requests)) == (502, 1)


# -- plain answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["<html>", "", "[]", "{}", '{"choices":[]}', '{"choices":null}'])
async def test_an_answer_that_is_no_completion_is_garbled(connect: Connect, body: str) -> None:
    with Answers() as http:
        http.post(CHAT, body=body)
        with pytest.raises(UpstreamGarbled):
            await connect().complete(BODY)


async def test_an_error_with_status_200_is_raised(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, payload=error_of("Too fast.", code=429))
        with pytest.raises(UpstreamRefused, match="Too fast") as caught:
            await connect().complete(BODY)
    assert caught.value.http_status == 429


async def test_blank_lines_before_a_plain_answer_are_skipped(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, body=b"\n\n\n" + orjson.dumps(COMPLETION))
        assert await connect().complete(BODY) == COMPLETION


async def test_a_plain_answer_that_takes_too_long_is_given_up(connect: Connect, backend: Backend) -> None:
    backend.script(Script([b'{"choices"'], end="silent"))
    with pytest.raises(UpstreamTimeout):
        await connect(backend.url, total_timeout_s=0.05).complete(BODY)
    assert await (await backend.received()).is_let_go()


async def test_a_plain_answer_that_breaks_off_is_broken(connect: Connect, backend: Backend) -> None:
    backend.script(Script([b'{"choices"'], end="cut"))
    with pytest.raises(UpstreamBroken):
        await connect(backend.url).complete(BODY)


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_a_stream_is_read_to_its_end(connect: Connect, backend: Backend) -> None:
    backend.script(streamed("Hel", "lo"))
    stream = await connect(backend.url).stream({**BODY, "stream": True})
    assert (await said_without_usage(stream), stream.done) == ("Hello", True)


async def said_without_usage(stream: ChatStream, *, is_closed: bool = True) -> str:
    try:
        chunks = [c for batch in [batch async for batch in stream] for c in batch]
    finally:
        if is_closed:
            stream.close()
    return "".join(choice["delta"].get("content") or "" for c in chunks for choice in c["choices"])


async def test_lines_may_end_in_crlf_and_reads_in_the_middle_of_a_letter(connect: Connect, backend: Backend) -> None:
    body = 'data: {"choices":[{"delta":{"content":"né"}}]}\r\n\r\ndata:[DONE]\r\n\r\n'.encode()
    pieces = [body[n : n + 1] for n in range(len(body))]
    assert await said_by(backend, connect, Script(pieces)) == "né"


async def test_a_stream_may_lack_its_done(connect: Connect, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hi"), chunk("stop").rstrip()]))
    stream = await connect(backend.url).stream(BODY)
    chunks = [c for batch in [batch async for batch in stream] for c in batch]
    stream.close()
    assert (len(chunks), chunks[-1]["choices"][0]["finish_reason"], stream.done) == (2, "stop", False)


async def test_a_stream_that_is_cut_is_broken_after_what_it_said(connect: Connect, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hi")], end="cut"))
    stream = await connect(backend.url).stream(BODY)
    batches = aiter(stream)
    assert (await anext(batches))[0]["choices"][0]["delta"] == {"content": "Hi"}
    with pytest.raises(UpstreamBroken):
        await anext(batches)
    stream.close()


async def test_a_backend_that_does_not_stream_is_read_as_one_chunk(connect: Connect, backend: Backend) -> None:
    backend.script(plain("Hello"))
    stream = await connect(backend.url).stream({**BODY, "stream": True})
    ((only,),) = [batch async for batch in stream]
    stream.close()
    assert only["choices"][0]["message"]["content"] == "Hello"


ERRORS: dict[str, tuple[bytes, int]] = {
    "OpenAI": (sse(error_of("Oh.", type="server_error")), 502),
    "vLLM": (sse(error_of("Oh.", type="BadRequestError", code=400)) + DONE, 400),
    "TGI": (sse(error_of("Oh.", http_status_code=422)), 422),
    "transformers": (sse({"error": "Oh."}), 502),
    "LM Studio": (b"event: error\n" + sse({"error": {"message": "Oh."}, "message": "Oh."}), 502),
    "old vLLM": (sse({"object": "error", "message": "Oh.", "code": 400}), 400),
    "OpenRouter": (sse({**error_of("Oh.", code=429), "choices": [{"finish_reason": "error", "delta": {}}]}), 429),
    "only the event tells": (b"event: error\n" + sse({"message": "Oh."}) + DONE, 502),
    "not a stream": (orjson.dumps(error_of("Oh.", code=429)), 429),
}


@pytest.mark.parametrize("form", ERRORS)
async def test_an_error_object_in_a_stream_is_raised(connect: Connect, backend: Backend, form: str) -> None:
    body, status = ERRORS[form]
    with pytest.raises(UpstreamRefused, match=r"Oh\.") as caught:
        await said_by(backend, connect, Script([body]))
    assert caught.value.http_status == status


async def test_an_error_object_is_raised_although_the_backend_stays(connect: Connect, backend: Backend) -> None:
    with pytest.raises(UpstreamRefused):
        await said_by(backend, connect, Script([sse(error_of("Oh."))], end="silent"))


async def test_a_full_window_in_a_stream_is_told_as_one(connect: Connect, backend: Backend) -> None:
    body = sse(error_of("Cannot truncate prompt with n_keep (9) >= n_ctx (4)"))
    with pytest.raises(WindowExceeded):
        await said_by(backend, connect, Script([body]))


@pytest.mark.parametrize("last", [sse(error_of("Oh.")), b"data: {oops\n\n"])
async def test_what_came_with_an_error_in_one_read_is_given_first(
    connect: Connect, backend: Backend, last: bytes
) -> None:
    backend.script(Script([chunk(content="Hi") + last]))
    stream = await connect(backend.url).stream(BODY)
    batches = aiter(stream)
    assert (await anext(batches))[0]["choices"][0]["delta"] == {"content": "Hi"}
    with pytest.raises(UpstreamError):
        await anext(batches)
    stream.close()


@pytest.mark.parametrize("body", [b"data: {oops\n\n", b"data: 1\n\n", b"data: []\n\n", b"data: \xff\n\n", b"{oops"])
async def test_a_chunk_that_is_no_json_object_is_garbled(connect: Connect, backend: Backend, body: bytes) -> None:
    with pytest.raises(UpstreamGarbled):
        await said_by(backend, connect, Script([body]))


# -- silence -----------------------------------------------------------------------------------------------------------

TINY_S = 0.05


async def test_no_headers_in_time_is_a_timeout(connect: Connect, backend: Backend) -> None:
    with pytest.raises(UpstreamTimeout):
        await said_by(backend, connect, Script(before=asyncio.Event()), first_byte_timeout_s=TINY_S)


async def test_headers_alone_do_not_count_as_the_first_byte(connect: Connect, backend: Backend) -> None:
    with pytest.raises(UpstreamTimeout, match="sent nothing"):
        await said_by(backend, connect, Script(end="silent"), first_byte_timeout_s=TINY_S)


async def test_the_first_byte_may_take_longer_than_the_next(connect: Connect, backend: Backend) -> None:
    late = asyncio.Event()
    backend.script(Script([b": \n\n", late, chunk(content="Hi"), DONE]))
    stream = await connect(backend.url, idle_timeout_s=TINY_S).stream(BODY)
    asyncio.get_running_loop().call_later(3 * TINY_S, late.set)
    assert await said(stream) == "Hi"


async def test_silence_between_chunks_is_a_timeout(connect: Connect, backend: Backend) -> None:
    with pytest.raises(UpstreamTimeout, match="sent nothing"):
        await said_by(backend, connect, Script([chunk(content="Hi")], end="silent"), idle_timeout_s=TINY_S)
    assert await (await backend.received()).is_let_go()


async def test_comments_do_not_count_as_data(connect: Connect, backend: Backend) -> None:
    steps = itertools.chain([chunk(content="Hi")], itertools.repeat(b": keep-alive\n\n"))
    with pytest.raises(UpstreamTimeout, match="sent nothing"):
        await said_by(backend, connect, Script(steps), idle_timeout_s=TINY_S)


async def test_an_answer_without_end_is_a_timeout(connect: Connect, backend: Backend) -> None:
    endless = Script(itertools.repeat(chunk(content="on ")))
    with pytest.raises(UpstreamTimeout, match="ran for"):
        await said_by(backend, connect, endless, total_timeout_s=TINY_S)


async def test_a_stream_that_was_read_to_its_end_has_no_place_any_more(connect: Connect, backend: Backend) -> None:
    backend.script(streamed("Hi"), plain())
    upstream = connect(backend.url, max_in_flight=1, max_waiting=0)
    stream = await upstream.stream(BODY)
    with pytest.raises(UpstreamBusy):
        await upstream.complete(BODY)
    assert await said_without_usage(stream, is_closed=False) == "Hi"
    assert await upstream.complete(BODY)
    stream.close()


async def test_closing_lets_go_of_a_silent_backend(connect: Connect, backend: Backend) -> None:
    backend.script(Script([chunk(content="Hi")], end="silent"))
    stream = await connect(backend.url).stream(BODY)
    await anext(aiter(stream))
    stream.close()
    assert await (await backend.received()).is_let_go()


# -- connections -------------------------------------------------------------------------------------------------------


def current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


@dataclass
class Server:
    """Answers every request with the same bytes and keeps the connection."""

    answer: Sequence[bytes] = ()
    url: str = ""
    connections: int = 0
    requests: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.append(current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
                self.requests += 1
                for piece in self.answer:
                    writer.write(piece)
                    for _ in range(20):  # turns of the loop, in which the client reads the piece
                        await asyncio.sleep(0)
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    yield server
    listener.close()
    for task in server.tasks:
        task.cancel()
    await asyncio.gather(*server.tasks, return_exceptions=True)
    await listener.wait_closed()


def answer_of(body: bytes, status: int = 200) -> list[bytes]:
    return [
        b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (status, len(body), body),
        b"0\r\n\r\n",
    ]


async def test_a_connection_is_used_again_after_done(connect: Connect, server: Server) -> None:
    server.answer = answer_of(chunk(content="Hi") + DONE)
    upstream = connect(server.url)
    for _ in range(3):
        assert await said(await upstream.stream(BODY)) == "Hi"
    assert (server.requests, server.connections) == (3, 1)


async def test_a_connection_that_the_backend_closed_meanwhile_is_replaced_at_once(connect: Connect) -> None:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"hi")
        for piece in answer_of(orjson.dumps(COMPLETION)):
            writer.write(piece)
        await reader.readuntil(b"\r\n\r\n")  # the next request finds the connection closed
        writer.close()

    listener = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        upstream = connect(base_url=f"http://127.0.0.1:{port}/v1", retries=0)
        body = {**BODY, "last": "hi"}
        assert [await upstream.complete(body) for _ in range(2)] == [COMPLETION, COMPLETION]


async def test_what_breaks_off_later_may_have_been_carried_out_and_is_not_asked_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    monkeypatch.setattr("upstream.CLOSED_WITHIN_S", 0.0)
    async with await asyncio.start_server(break_off, "127.0.0.1", 0) as listener:
        upstream = connect(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1", retries=2)
        with pytest.raises(UpstreamBroken, match="broke off before it answered"):
            await upstream.complete(BODY)
    assert len(calls) == 1


async def test_a_reader_who_takes_its_time_is_no_silence_of_the_backend(connect: Connect, backend: Backend) -> None:
    goes_on = asyncio.Event()
    backend.script(Script([chunk(content="Hi"), goes_on, chunk(content="!"), *END]))
    stream = await connect(backend.url, idle_timeout_s=TINY_S).stream(BODY)
    batches = aiter(stream)
    assert await anext(batches)
    await asyncio.sleep(3 * TINY_S)  # what the backend would not have been given
    goes_on.set()
    assert [batch async for batch in batches]
    assert stream.done
    stream.close()


async def test_a_connection_is_used_again_after_a_refusal(connect: Connect, server: Server) -> None:
    server.answer = answer_of(orjson.dumps(error_of("No.")), 400)
    upstream = connect(server.url)
    for _ in range(3):
        with pytest.raises(UpstreamRefused):
            await upstream.complete(BODY)
    assert (server.requests, server.connections) == (3, 1)


async def test_silence_in_a_body_without_a_length_is_a_timeout(connect: Connect, server: Server) -> None:
    server.answer = [b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n" + chunk(content="Hi")]
    with pytest.raises(UpstreamTimeout, match="sent nothing"):
        await said(await connect(server.url, idle_timeout_s=TINY_S).stream(BODY))


async def test_a_backend_that_says_done_and_stays_is_not_waited_for(connect: Connect, backend: Backend) -> None:
    assert await said_by(backend, connect, Script([chunk(content="Hi"), DONE], end="silent")) == "Hi"
    assert await (await backend.received()).is_let_go()


@pytest.fixture
def mute() -> Iterator[str]:
    """The base URL of a machine that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


async def test_nobody_listening_is_unreachable(connect: Connect, unused_tcp_port: int) -> None:
    with pytest.raises(UpstreamUnreachable, match=str(unused_tcp_port)):
        await connect(f"http://127.0.0.1:{unused_tcp_port}/v1").complete(BODY)


async def test_a_connection_that_is_not_made_in_time_is_a_timeout(connect: Connect) -> None:
    with Answers() as http:
        http.post(CHAT, exception=aiohttp.ConnectionTimeoutError("late"))
        with pytest.raises(UpstreamTimeout, match="cannot be reached in time"):
            await connect().complete(BODY)


# -- dialects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "dialect", "windows"),
    [
        ("llamacpp", "llamacpp", {"tiny-demo": 1024}),
        ("vllm", "vllm", {"tiny-demo": 1024}),
        ("transformers", "generic", {}),
        ("litellm", "generic", {}),
        ("aimock", "generic", {}),
    ],
)
async def test_a_dialect_is_told_from_the_recorded_models(
    connect: Connect, source: str, dialect: str, windows: Json
) -> None:
    recorded = transcript(f"{source}/models")
    with Answers() as http:
        http.get(MODELS, body=recorded.body, headers={"Server": recorded.headers.get("server", "")}, repeat=True)
        upstream = connect(dialect="auto")
        assert (await upstream.dialect()).name == dialect
        probe = await upstream.probe()
    assert (probe.dialect.name, probe.windows) == (dialect, windows)
    assert list(probe.models) == [model["id"] for model in orjson.loads(recorded.body)["data"]]


async def test_a_dialect_by_setting_asks_nobody(connect: Connect) -> None:
    with Answers() as http:
        assert (await connect(dialect="mistral").dialect()).name == "mistral"
        assert http.requests == {}


async def test_a_well_known_host_is_not_asked(connect: Connect) -> None:
    with Answers() as http:
        assert (await connect("https://api.groq.com/openai/v1", dialect="auto").dialect()).name == "groq"
        assert http.requests == {}


async def test_a_backend_is_looked_at_once_however_many_ask(connect: Connect) -> None:
    with Answers() as http:
        http.get(MODELS, payload={"data": [{"id": "m", "owned_by": "vllm"}]}, repeat=True)
        upstream = connect(dialect="auto")
        found = [*await asyncio.gather(*(upstream.dialect() for _ in range(3))), await upstream.dialect()]
        assert [dialect.name for dialect in found] == ["vllm"] * 4
        assert len(http.requests[("GET", URL(MODELS))]) == 1


async def test_a_backend_that_cannot_be_reached_is_generic_and_left_in_peace(connect: Connect) -> None:
    with Answers() as http:
        http.get(MODELS, exception=aiohttp.ClientConnectionError("no"), repeat=True)
        upstream = connect(dialect="auto")
        assert [(await upstream.dialect()).name for _ in range(3)] == ["generic"] * 3
        assert len(http.requests[("GET", URL(MODELS))]) == 1


async def test_a_mute_backend_is_generic_and_the_look_ends_with_the_upstream(connect: Connect, mute: str) -> None:
    upstream = connect(mute, dialect="auto")
    assert (await upstream.dialect()).name == "generic"
    (look,) = [task for task in asyncio.all_tasks() if "Upstream._look" in repr(task)]
    await upstream.close()
    assert look.cancelled()


async def test_every_backend_is_looked_at() -> None:
    urls = [f"http://{name}/v1" for name in ("one", "two")]
    upstreams = Upstreams(tuple(UpstreamSettings(base_url=url) for url in urls))
    with Answers() as http:
        for url in urls:
            http.get(f"{url}/models", payload={"data": []})
        await upstreams.look()
        assert len(http.requests) == 2
    await upstreams.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"status": 404}, UpstreamRefused),
        ({"body": "<html>"}, UpstreamGarbled),
        ({"exception": aiohttp.ClientConnectionError("no")}, UpstreamUnreachable),
    ],
)
async def test_a_probe_tells_what_is_wrong(connect: Connect, answer: Json, kind: type[UpstreamError]) -> None:
    with Answers() as http:
        http.get(MODELS, **answer)
        with pytest.raises(kind):
            await connect().probe()


async def test_a_probe_of_a_mute_backend_is_a_timeout(connect: Connect, mute: str) -> None:
    with pytest.raises(UpstreamTimeout):
        await connect(mute, connect_timeout_s=TINY_S).probe()


async def test_a_probe_that_breaks_off_is_broken(connect: Connect) -> None:
    ended = asyncio.Event()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
        writer.close()
        ended.set()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    with pytest.raises(UpstreamBroken):
        await connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}").probe()
    await ended.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("models", [[], {}, {"data": None}, {"data": [1, {"id": 5}]}])
async def test_an_odd_list_of_models_is_generic(connect: Connect, models: Any) -> None:
    with Answers() as http:
        http.get(MODELS, payload=models)
        assert (await connect(dialect="auto").dialect()).name == "generic"


# -- windows -----------------------------------------------------------------------------------------------------------

Later = Callable[[float], None]
LLAMACPP: Json = {"data": [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 1024}}]}
VLLM: Json = {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 1024}]}
OLLAMA: Json = {"data": [{"id": "m:latest", "owned_by": "library"}, {"id": "n", "owned_by": "library"}]}


@pytest.fixture
async def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Sets the clock of the loop forward: `later(300.0)`."""
    loop = asyncio.get_running_loop()
    read, ahead_s = loop.time, [0.0]
    monkeypatch.setattr(loop, "time", lambda: read() + sum(ahead_s))
    return ahead_s.append


def looks_of(http: Answers, url: str = MODELS) -> int:
    return len(http.requests.get(("GET", URL(url)), ()))


async def looked(upstream: Upstream) -> None:
    """Until the look that is under way has been made."""
    if tasks := {task for task in asyncio.all_tasks() if "Upstream._look" in repr(task)}:
        await asyncio.wait(tasks, timeout=DEADLINE_S)


async def test_the_window_of_the_settings_asks_nobody(connect: Connect) -> None:
    with Answers() as http:
        assert await connect(window_tokens=77).window_tokens("m") == 77
        assert http.requests == {}


@pytest.mark.parametrize("dialect", ["auto", "llamacpp"])
async def test_a_window_is_asked_of_the_backend_once(connect: Connect, dialect: str) -> None:
    with Answers() as http:
        http.get(MODELS, payload=LLAMACPP, repeat=True)
        upstream = connect(dialect=dialect)
        assert await asyncio.gather(*(upstream.window_tokens(name) for name in ("m", "any"))) == [1024, 1024]
        assert await upstream.window_tokens("m") == 1024
        assert looks_of(http) == 1


async def test_the_window_that_an_overflow_told_wins_over_the_list(connect: Connect) -> None:
    with Answers() as http:
        http.get(MODELS, payload=VLLM, repeat=True)
        upstream = connect()
        assert await upstream.window_tokens("m") == 1024
        upstream.told_window("m", 512)
        assert [await upstream.window_tokens(model) for model in ("m", "other")] == [512, 1024]


async def test_the_window_of_the_settings_wins_over_an_overflow(connect: Connect) -> None:
    upstream = connect(window_tokens=77)
    upstream.told_window("m", 512)
    assert await upstream.window_tokens("m") == 77


async def test_a_window_is_looked_at_again_beside_requests(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, payload=VLLM)
        http.get(MODELS, payload={"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
        upstream = connect()
        assert await upstream.window_tokens("m") == 1024
        later(299.0)
        assert (await upstream.window_tokens("m"), looks_of(http)) == (1024, 1)
        later(2.0)
        assert await upstream.window_tokens("m") == 1024
        await looked(upstream)
        assert (await upstream.window_tokens("m"), looks_of(http)) == (4096, 2)


async def test_a_backend_with_another_window_ends_what_an_overflow_told(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, payload=VLLM)
        http.get(MODELS, payload={"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
        upstream = connect()
        await upstream.window_tokens("m")
        upstream.told_window("m", 512)
        later(301.0)
        assert await upstream.window_tokens("m") == 512
        await looked(upstream)
        assert await upstream.window_tokens("m") == 4096


async def test_an_unreachable_backend_is_looked_at_again_soon(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, exception=aiohttp.ClientConnectionError("no"))
        http.get(MODELS, payload=VLLM)
        upstream = connect()
        assert [await upstream.window_tokens("m") for _ in range(2)] == [None, None]
        later(11.0)
        assert (await upstream.window_tokens("m"), looks_of(http)) == (1024, 2)


async def test_an_old_window_is_told_while_the_backend_is_away(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, payload=VLLM)
        http.get(MODELS, exception=aiohttp.ClientConnectionError("no"), repeat=True)
        upstream = connect()
        await upstream.window_tokens("m")
        later(301.0)
        await upstream.window_tokens("m")
        await looked(upstream)
        assert await upstream.window_tokens("m") == 1024


async def test_a_backend_that_tells_no_windows_is_left_in_peace(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, payload={"data": [{"id": "m"}]}, repeat=True)
        upstream = connect()
        assert await upstream.window_tokens("m") is None
        later(11.0)
        assert (await upstream.window_tokens("m"), looks_of(http)) == (None, 1)


async def test_a_mute_backend_holds_nobody(connect: Connect, mute: str) -> None:
    upstream = connect(mute)
    began_at = asyncio.get_running_loop().time()
    assert [await upstream.window_tokens("m") for _ in range(20)] == [None] * 20
    assert asyncio.get_running_loop().time() - began_at < 1.0


async def test_a_model_tells_its_window_when_it_has_been_loaded(connect: Connect, later: Later) -> None:
    with Answers() as http:
        http.get(MODELS, payload=OLLAMA, repeat=True)
        http.get("http://backend/api/ps", payload={"models": []})
        http.get("http://backend/api/ps", payload={"models": [{"name": "m:latest", "context_length": 4096}]})
        upstream = connect(dialect="auto")
        assert await upstream.window_tokens("m") is None
        later(11.0)
        assert [await upstream.window_tokens(model) for model in ("m", "m:latest", "n")] == [4096, 4096, None]


async def test_the_next_source_is_asked_where_the_first_tells_nothing(connect: Connect) -> None:
    models = [{"key": "m", "loaded_instances": [{"id": "m", "config": {"context_length": 8192}}]}]
    with Answers() as http:
        http.get(MODELS, payload={"data": [{"id": "m"}]})
        http.get("http://backend/api/v0/models", status=404, body="gone")
        http.get("http://backend/api/v1/models", payload={"models": models})
        assert await connect(dialect="lmstudio").window_tokens("m") == 8192


async def test_a_loaded_window_wins_over_the_listed_one(connect: Connect) -> None:
    with Answers() as http:
        http.get(MODELS, payload={"data": [{"id": "m", "max_context_length": 131072}]})
        http.get("http://backend/info", payload={"model_id": "m", "max_total_tokens": 4096})
        assert (await connect(dialect="tgi").probe()).windows == {"m": 4096}


@pytest.mark.parametrize(
    "answer",
    [{"status": 500}, {"body": "<html>"}, {"payload": [1]}, {"exception": aiohttp.ClientConnectionError("no")}],
)
async def test_a_source_that_fails_leaves_the_listed_window(connect: Connect, answer: Json) -> None:
    with Answers() as http:
        http.get(MODELS, payload={"data": [{"id": "m", "context_length": 4096}]})
        http.get("http://backend/api/ps", **answer)
        assert await connect(dialect="ollama").window_tokens("m") == 4096


async def test_an_odd_list_does_not_take_the_dialect_away(connect: Connect) -> None:
    with Answers() as http:
        http.get(MODELS, payload=VLLM)
        http.get(MODELS, payload={})
        upstream = connect(dialect="auto")
        assert [(await upstream.probe()).dialect.name for _ in range(2)] == ["vllm", "vllm"]


@pytest.mark.parametrize(("slots", "total_tokens", "tokens"), [(1, 512, 512), (1, 2048, 2048), (4, 2048, 512)])
async def test_a_real_server_tells_its_window(connect: Connect, slots: int, total_tokens: int, tokens: int) -> None:
    with llamacpp_server("--slots", str(slots), "--ctx", str(total_tokens)) as url:
        upstream = connect(url, dialect="auto")
        assert await upstream.window_tokens("any") == tokens
        with pytest.raises(WindowExceeded) as caught:
            await upstream.complete({**BODY, "messages": [{"role": "user", "content": "Hello there. " * tokens}]})
        assert caught.value.window_tokens == tokens
        assert await upstream.count_tokens(BODY) == (await upstream.complete(BODY))["usage"]["prompt_tokens"]


# -- sizes of prompts --------------------------------------------------------------------------------------------------

COUNT, TOKENIZE = f"{CHAT}/input_tokens", "http://backend/tokenize"
QUESTION: Json = {"role": "user", "content": "What is the weather in Paris?"}
WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED: Json = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [QUESTION]},
        {"messages": [{"role": "system", "content": "Be brief and kind."}, QUESTION]},
        {"messages": [QUESTION], "tools": [WEATHER]},
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "Sunny, 21 degrees"},
            ],
            "tools": [WEATHER],
        },
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": "Sunny.", "reasoning_content": "The user asks about Paris."},
                {"role": "user", "content": "And tomorrow?"},
            ]
        },
        {"messages": [QUESTION], "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "none"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Héllo, wörld! 你好"}]}]},
        {"messages": [QUESTION], "tools": [WEATHER], "tool_choice": "required"},
        {"messages": [QUESTION], "response_format": {"type": "json_object"}},
    ],
)
async def test_a_real_server_counts_what_it_reports(connect: Connect, llamacpp: str, body: Json) -> None:
    upstream = connect(llamacpp, dialect="auto")
    whole = {"model": "any", "temperature": 0, "max_tokens": 2, **body}
    counted = await upstream.count_tokens({**whole, "stream": True, "stream_options": {"include_usage": True}})
    assert counted == (await upstream.complete(whole))["usage"]["prompt_tokens"]


async def test_vllm_is_asked_at_its_tokenizer(connect: Connect) -> None:
    with Answers() as http:
        http.post(TOKENIZE, body=transcript("vllm/tokenize").body)
        assert await connect(dialect="vllm").count_tokens({**BODY, "stream": True}) == 4
        assert asked(http, TOKENIZE) == [{**BODY, "add_generation_prompt": True}]


async def test_a_tokenizer_is_asked_with_the_clients_key(connect: Connect) -> None:
    with Answers() as http:
        http.post(TOKENIZE, payload={"count": 4})
        await connect(dialect="vllm", api_key="ours").count_tokens(BODY, {"Authorization": "Bearer theirs"})
        (call,) = http.requests[("POST", URL(TOKENIZE))]
        assert call.kwargs["headers"]["Authorization"] == "Bearer theirs"


async def test_a_base_url_may_lack_its_v1(connect: Connect) -> None:
    with Answers() as http:
        http.post(COUNT, payload={"input_tokens": 32})
        assert await connect("http://backend/", dialect="llamacpp").count_tokens(BODY) == 32


@pytest.mark.parametrize("settings", [{"dialect": "sglang"}, {"dialect": "llamacpp", "tokenizer": "off"}])
async def test_where_nobody_counts_nobody_is_asked(connect: Connect, settings: Json) -> None:
    with Answers() as http:
        assert await connect(**settings).count_tokens(BODY) is None
        assert http.requests == {}


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_tokenizer_that_is_not_there_is_left_in_peace(connect: Connect, later: Later, status: int) -> None:
    with Answers() as http:
        http.post(COUNT, status=status, body="no such page")
        http.post(COUNT, payload={"input_tokens": 32})
        upstream = connect(dialect="llamacpp")
        assert [await upstream.count_tokens(BODY) for _ in range(2)] == [None, None]
        later(299.0)
        assert (await upstream.count_tokens(BODY), len(asked(http, COUNT))) == (None, 1)
        later(2.0)
        assert await upstream.count_tokens(BODY) == 32


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 400, "payload": error_of("odd template")},
        {"status": 503},
        {"body": "<html>"},
        {"payload": {"input_tokens": None}},
        {"exception": aiohttp.ClientPayloadError("cut")},
    ],
)
async def test_a_tokenizer_that_fails_is_asked_again(connect: Connect, answer: Json) -> None:
    with Answers() as http:
        http.post(COUNT, **answer)
        http.post(COUNT, payload={"input_tokens": 32})
        upstream = connect(dialect="llamacpp")
        assert [await upstream.count_tokens(BODY) for _ in range(2)] == [None, 32]


async def test_a_slow_tokenizer_is_given_up(connect: Connect, mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.ASIDE_S", TINY_S)
    assert await connect(mute, dialect="llamacpp").count_tokens(BODY) is None


# -- headers and routes ------------------------------------------------------------------------------------------------


async def sent_headers(connect: Connect, backend: Backend, **settings: Any) -> list[str | None]:
    await connect(backend.url, **settings).complete(BODY)
    headers = (await backend.received()).headers
    return [headers.get("authorization"), headers.get("x-more")]


async def test_the_key_of_the_settings_is_sent(connect: Connect, backend: Backend) -> None:
    assert await sent_headers(connect, backend, api_key="k1", headers={"X-More": "1"}) == ["Bearer k1", "1"]


async def test_the_key_may_come_from_the_environment(
    connect: Connect, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND_KEY", "k2")
    assert await sent_headers(connect, backend, api_key_env="BACKEND_KEY") == ["Bearer k2", None]


async def test_without_a_key_no_authorization_is_sent(connect: Connect, backend: Backend) -> None:
    assert await sent_headers(connect, backend, api_key_env="NOT_SET_ANYWHERE") == [None, None]


async def test_a_header_of_the_settings_wins_over_the_key_in_any_case(connect: Connect, backend: Backend) -> None:
    found = await sent_headers(connect, backend, api_key="k1", headers={"authorization": "Basic x"})
    assert found == ["Basic x", None]


async def test_a_cookie_of_one_answer_is_not_sent_with_the_next_request(connect: Connect, backend: Backend) -> None:
    first = plain()
    first.headers = {"set-cookie": "who=me; Path=/"}
    backend.script(first, plain())
    upstream = connect(backend.url.replace("127.0.0.1", "localhost"))  # an address alone never gets cookies
    await upstream.complete(BODY)
    await upstream.complete(BODY)
    assert [request.headers.get("cookie") for request in backend.requests] == [None, None]


@pytest.mark.parametrize(
    ("model", "name", "renamed"),
    [
        ("exact", "one", "exact"),
        ("qwen3:8b", "two", "qwen3:8b"),
        ("gpt-5", "two", "qwen3:30b"),
        ("shared", "one", "shared"),
        ("Exact", "one", "Exact"),
        ("unknown", "one", "unknown"),
    ],
)
async def test_a_model_goes_to_the_backend_that_names_it(model: str, name: str, renamed: str) -> None:
    one = UpstreamSettings("one", BASE, models=("exact", "shared"))
    two = UpstreamSettings("two", BASE, models=("qwen3:*", "shared"), aliases={"gpt-5": "qwen3:30b"})
    upstreams = Upstreams((one, two))
    upstream, there = upstreams.route(model)
    await upstreams.close()
    assert (upstream.settings.name, there) == (name, renamed)


@pytest.mark.parametrize("wrong", [{"base_url": "localhost:8000"}, {"base_url": BASE, "dialect": "klingon"}])
def test_settings_that_cannot_work_are_refused(wrong: Json) -> None:
    with pytest.raises(ValueError, match="upstream 'default'"):
        UpstreamSettings(**wrong)


def test_a_url_alone_names_its_upstream() -> None:
    assert settings_for("http://gpu-1:8000/v1").name == "gpu-1"
