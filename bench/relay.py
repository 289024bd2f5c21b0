"""The yardstick: a bare JSON relay, raw ASGI on uvicorn with one aiohttp session, no validation and no state."""

import argparse
from typing import Any

import aiohttp
import orjson
import uvicorn
from starlette.types import Receive, Scope, Send

JSON_HEADERS = [(b"content-type", b"application/json")]
SSE_HEADERS = [(b"content-type", b"text/event-stream")]


class Relay:
    def __init__(self, upstream: str) -> None:
        self.url = f"{upstream}/chat/completions"
        self.session: aiohttp.ClientSession

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif scope["type"] == "http" and scope["path"] == "/v1/responses":
            await self.respond(orjson.loads(await read_body(receive)), send)
        elif scope["type"] == "http":
            await answer(send, {"status": "ok"})

    async def lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"content-type": "application/json"},
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def respond(self, request: dict[str, Any], send: Send) -> None:
        async with self.session.post(self.url, data=chat_body(request)) as upstream:
            if request.get("stream"):
                await relay_stream(upstream.content, send)
            else:
                chat = orjson.loads(await upstream.read())
                await answer(send, response(chat["choices"][0]["message"]["content"], "completed"))


async def read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
    return b"".join(parts)


def chat_body(request: dict[str, Any]) -> bytes:
    chat = {"model": request["model"], "messages": [{"role": "user", "content": request["input"]}]}
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if request.get("stream") else {}
    return orjson.dumps(chat | streaming)


def response(text: str, status: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": status, "content": content}
    return {"id": "resp_1", "object": "response", "status": status, "output": [message]}


async def answer(send: Send, body: dict[str, Any]) -> None:
    raw = orjson.dumps(body)
    headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(raw))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": raw, "more_body": False})


async def relay_stream(upstream: aiohttp.StreamReader, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
    created = sse("response.created", {"response": response("", "in_progress")}, 0)
    await send({"type": "http.response.body", "body": created, "more_body": True})
    texts: list[str] = []
    rest = b""
    async for data in upstream.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        events = b"".join([delta_event(text, texts) for line in lines if (text := delta_text(line))])
        if events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
    completed = sse("response.completed", {"response": response("".join(texts), "completed")}, len(texts) + 1)
    await send({"type": "http.response.body", "body": completed, "more_body": False})


def delta_text(line: bytes) -> str | None:
    if not line.startswith(b"data: ") or line == b"data: [DONE]":
        return None
    choices = orjson.loads(line[6:])["choices"]
    return choices[0]["delta"].get("content") if choices else None


def delta_event(text: str, texts: list[str]) -> bytes:
    texts.append(text)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": text}
    return sse("response.output_text.delta", place, len(texts))


def sse(kind: str, fields: dict[str, Any], number: int) -> bytes:
    event = {"type": kind, **fields, "sequence_number": number}
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(event))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--upstream", required=True)
    flags.add_argument("--port", type=int, required=True)
    given = flags.parse_args()
    uvicorn.run(
        Relay(given.upstream),
        port=given.port,
        http="httptools",
        loop="uvloop",
        ws="none",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
