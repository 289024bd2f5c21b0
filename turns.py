"""One turn, the same code for plain and streamed: render the window, call the backend, translate its answer.

May not know the HTTP framework. The clock and ids are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import orjson

from errors import InvalidRequest, ProxyError, UpstreamBroken
from request import TurnRequest, echo, refuse_unused
from streaming import Event, Json, ReasoningSettings, ResponseStream, StreamPlan
from translation import Rendered, has_files, render
from upstream import ChatStream, Upstream, Upstreams

log = logging.getLogger("responses_proxy.turns")

# Rough size of a token, for usage that no backend gave.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class TurnSettings:
    """The section `[turns]`."""

    created_after_ms: int = 100
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Sources:
    """Where time and ids come from."""

    clock: Callable[[], float]
    new_id: Callable[[str], str]


class Turns:
    """Makes turns out of validated requests."""

    def __init__(
        self, upstreams: Upstreams, settings: TurnSettings, reasoning: ReasoningSettings, sources: Sources
    ) -> None:
        self._upstreams = upstreams
        self._settings = settings
        self._reasoning = reasoning
        self._sources = sources

    async def prepare(self, request: TurnRequest) -> Turn:
        """A turn ready to be run. Raises: InvalidRequest."""
        upstream, model = self._upstreams.route(request.model)
        dialect = await upstream.dialect()
        items = request.items
        if has_files(request):
            rendered = await asyncio.to_thread(render, request, items, dialect, model)
        else:
            rendered = render(request, items, dialect, model)
        if not rendered.body["messages"]:
            raise InvalidRequest("Invalid 'input': nothing in it is for the model.", param="input")
        if rendered.ignored and self._settings.strict:
            raise refuse_unused(rendered.ignored)
        if request.stream:
            rendered.body["stream"] = True
            if dialect.stream_usage:
                rendered.body["stream_options"] = {"include_usage": True}
        return Turn(upstream, rendered, self._machine(request, rendered, upstream), self._settings)

    def _machine(self, request: TurnRequest, rendered: Rendered, upstream: Upstream) -> ResponseStream:
        plan = StreamPlan(
            refs=rendered.refs,
            taken_call_ids=rendered.call_ids,
            logprobs=request.wants_logprobs,
            parallel=request.parallel_tool_calls is not False,
            expose=self._reasoning.expose,
            think=upstream.settings.think,
            estimate_input_tokens=lambda: len(orjson.dumps(rendered.body)) // BYTES_PER_TOKEN,
        )
        response: Json = {
            "id": self._sources.new_id("resp"),
            "object": "response",
            "created_at": int(self._sources.clock()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **echo(request),
        }
        return ResponseStream(response, plan, self._sources.new_id, self._sources.clock)


class Turn:
    """One call of a backend and the response it becomes; `ignored` names what was left out of the request."""

    def __init__(self, upstream: Upstream, rendered: Rendered, machine: ResponseStream, settings: TurnSettings) -> None:
        self.ignored = rendered.ignored
        self._upstream = upstream
        self._body = rendered.body
        self._machine = machine
        self._settings = settings
        self._accepting: asyncio.Task[ChatStream] | None = None
        self._is_told = False

    async def run(self) -> Json:
        """The finished response of a plain turn. Raises: UpstreamError."""
        self._machine.feed(await self._upstream.complete(self._body))
        self._machine.close()
        return self._machine.snapshot()

    async def accept(self) -> None:
        """Calls the backend and waits for its word, but no longer than `created_after_ms`.

        Raises: UpstreamError when the backend refuses at once. After that, failures are events.
        """
        self._accepting = asyncio.create_task(self._upstream.stream(self._body))
        try:
            done, _ = await asyncio.wait({self._accepting}, timeout=self._settings.created_after_ms / 1000)
        except asyncio.CancelledError:
            await self.close()
            raise
        if done and self._accepting.exception():
            self._accepting.result()

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The events of an accepted turn in batches; the last one is terminal, whatever happens."""
        try:
            yield self._machine.start()
            async with contextlib.aclosing(self._answer()) as batches:
                async for batch in batches:
                    yield batch
        except ProxyError as error:
            log.warning("turn failed: %s", error.message)
            yield self.fail(error)
        except Exception:
            log.exception("turn failed on a fault of this proxy")
            yield self.fail(ProxyError("The proxy failed while it translated the answer."))
        finally:
            await self.close()

    async def _answer(self) -> AsyncGenerator[list[Event], None]:
        assert self._accepting is not None
        machine = self._machine
        stream = await self._accepting
        async for chunks in stream:
            events: list[Event] = []
            for chunk in chunks:
                events += machine.feed(chunk)
            if events:
                yield events
        if not stream.done and not machine.ended:
            raise UpstreamBroken("The backend closed its stream before the answer was finished.")
        last = machine.close() + machine.finish()
        self._is_told = True
        yield last

    def fail(self, error: ProxyError) -> list[Event]:
        """The terminal event of a turn that cannot go on; nothing when one was given before."""
        if self._is_told:
            return []
        self._is_told = True
        return self._machine.fail(error)

    async def close(self) -> None:
        """Lets go of the backend; one that is still generating sees its request closed."""
        accepting, self._accepting = self._accepting, None
        if accepting is None:
            return
        accepting.cancel()
        await asyncio.wait({accepting})
        if not accepting.cancelled() and accepting.exception() is None:
            accepting.result().close()
