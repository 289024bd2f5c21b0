"""One streamed answer of a backend: bytes as they come, chunks out, and how long it may be silent.

May not know what a chunk says, but for errors, nor how the answer was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import orjson

from gates import Hold
from observing import Call
from refusals import raise_if_error
from sse import SSEDecoder
from upstream_errors import UpstreamBroken, UpstreamError, UpstreamGarbled, UpstreamTimeout

Json = dict[str, Any]

# How long the end of a body may take after `[DONE]`, so that the connection can be used again.
DRAIN_S = 0.1
# Timers are not set closer together than this.
TIMER_STEP_S = 0.01


class StreamLimits(NamedTuple):
    """Whose answer it is, and how long it may take to its first chunk, between two, and in all."""

    name: str
    first_byte_timeout_s: float
    idle_timeout_s: float
    total_timeout_s: float


class ChatStream:
    """The chunks of one streamed answer, a batch for every read of the network that held any.

    `done` tells whether the backend said `[DONE]`. Raises on the way: UpstreamError.
    """

    def __init__(self, answer: aiohttp.ClientResponse, limits: StreamLimits, hold: Hold, call: Call) -> None:
        self.done = False
        self._is_read = False
        self._hold = hold
        self._answer = answer
        self._limits = limits
        self._call = call
        self._decoder = SSEDecoder()
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._total_ends_at = self._heard_at + limits.total_timeout_s
        self._silence_s = limits.first_byte_timeout_s
        self._failure: UpstreamError | None = None
        self._timed_out: str | None = None
        self._timer = self._next_check()

    async def __aiter__(self) -> AsyncIterator[list[Json]]:
        try:
            async for data in self._answer.content.iter_any():
                if chunks := self._chunks(self._decoder.feed(data)):
                    self._call.heard(chunks)
                    self._heard_at, self._silence_s = self._loop.time(), self._limits.idle_timeout_s
                    yield chunks
                if self._failure:
                    raise self._failed(self._failure)
                if self.done:
                    await self._drain()
                    self._hold.end()
                    return
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise self._failed(self._broken()) from error
        if chunks := self._chunks(self._decoder.flush()):
            self._call.heard(chunks)
            yield chunks
        if self._failure:
            raise self._failed(self._failure)
        self._is_read = True

    def _chunks(self, payloads: list[bytes]) -> list[Json]:
        """What can be used; the failure that ends it is raised after that has been seen."""
        chunks: list[Json] = []
        try:
            for payload in payloads:
                if payload == b"[DONE]":
                    self.done = True
                    break
                chunks.append(self._chunk(payload))
        except UpstreamError as error:
            self._failure = error
        return chunks

    def _chunk(self, payload: bytes) -> Json:
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise UpstreamGarbled(f"Upstream '{self._limits.name}' sent a chunk that is not JSON.") from error
        if not isinstance(chunk, dict):
            raise UpstreamGarbled(f"Upstream '{self._limits.name}' sent a chunk that is not a JSON object.")
        raise_if_error(chunk, self._limits.name)
        return chunk

    def _ends_at(self) -> float:
        return min(self._total_ends_at, self._heard_at + self._silence_s)

    def _next_check(self) -> asyncio.TimerHandle:
        """Not later than `idle_timeout_s`, which may have begun to count by then."""
        now = self._loop.time()
        next_at = min(self._ends_at(), now + self._limits.idle_timeout_s)
        return self._loop.call_at(max(next_at, now + TIMER_STEP_S), self._check_silence)

    def _check_silence(self) -> None:
        """Closes an answer that is silent or runs on for too long; comments do not count as an answer."""
        now = self._loop.time()
        if now < self._ends_at():
            self._timer = self._next_check()
            return
        total = f"ran for {self._limits.total_timeout_s:g} s"
        self._timed_out = total if now >= self._total_ends_at else f"sent nothing for {self._silence_s:g} s"
        self._answer.close()

    def _failed(self, error: UpstreamError) -> UpstreamError:
        self._call.failed(error)
        self._hold.end(error)
        return error

    def cut_short(self) -> UpstreamError:
        """The failure of an answer that ended without a word of it, for who has read that there was none."""
        return self._failed(self._broken())

    def _broken(self) -> UpstreamError:
        if self._timed_out:
            return UpstreamTimeout(f"Upstream '{self._limits.name}' {self._timed_out} in the middle of its answer.")
        return UpstreamBroken(f"Upstream '{self._limits.name}' closed its stream before the answer was finished.")

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(DRAIN_S):
                while not self._answer.content.at_eof():
                    await self._answer.content.readany()

    def close(self) -> None:
        """Ends the request; an answer that was not read to its end closes the connection, and so stops the backend."""
        self._timer.cancel()
        self._answer.close()
        self._call.ended(is_whole=self.done)
        if self.done or self._is_read:
            self._hold.end()
        else:
            self._hold.give_up()
