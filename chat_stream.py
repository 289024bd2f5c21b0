"""One streamed answer of a backend: bytes as they come, chunks out, and how long it may be silent.

May not know what a chunk says, but for errors, nor how the answer was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from gates import Hold
from observing import Call
from refusals import raise_if_error
from silence import Silence, StreamLimits
from sse import SSEDecoder
from upstream_errors import UpstreamBroken, UpstreamError, UpstreamGarbled, UpstreamTimeout

Json = dict[str, Any]

# How long the end of a body may take after `[DONE]`, so that the connection can be used again.
DRAIN_S = 0.1


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
        self._failure: UpstreamError | None = None
        self._silence = Silence(limits, limits.first_byte_timeout_s, answer.close)

    async def __aiter__(self) -> AsyncIterator[list[Json]]:
        try:
            async for data in self._answer.content.iter_any():
                if chunks := self._chunks(self._decoder.feed(data)):
                    self._call.heard(chunks)
                    self._silence.pause()
                    yield chunks
                    self._silence.heard()
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

    def _failed(self, error: UpstreamError) -> UpstreamError:
        self._call.failed(error)
        self._hold.end(error)
        return error

    def cut_short(self) -> UpstreamError:
        """The failure of an answer that ended without a word of it, for who has read that there was none."""
        return self._failed(self._broken())

    def _broken(self) -> UpstreamError:
        if self._silence.verdict:
            return UpstreamTimeout(
                f"Upstream '{self._limits.name}' {self._silence.verdict} in the middle of its answer."
            )
        return UpstreamBroken(f"Upstream '{self._limits.name}' closed its stream before the answer was finished.")

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(DRAIN_S):
                while not self._answer.content.at_eof():
                    await self._answer.content.readany()

    def close(self) -> None:
        """Ends the request; an answer that was not read to its end closes the connection, and so stops the backend."""
        self._silence.end()
        self._answer.close()
        self._call.ended(is_whole=self.done)
        if self.done or self._is_read:
            self._hold.end()
        else:
            self._hold.give_up()
