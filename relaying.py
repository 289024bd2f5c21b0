"""One request that goes through as it is: opened at a backend, and its answer poured out read by read.

May not know what is asked or answered, nor try anything again that a backend may have begun to carry out.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from gates import Hold
from observing import Call
from refusals import retry_after_s
from silence import Silence, StreamLimits
from upstream_errors import (
    UpstreamBroken,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)

Body = bytes | AsyncIterator[bytes] | None
# A body from this size on goes out in pieces, so that it does not hold up the others.
LARGE_BODY_BYTES = 1024 * 1024
# That a connection from the pool was closed shows at once; what breaks later may have been carried out.
CLOSED_WITHIN_S = 1.0
SWITCHING_PROTOCOLS, LAST_STATUS = 101, 599
FIRST_REFUSAL, FIRST_FAULT = 400, 500
# Of a backend that does not have this endpoint; it may do everything else as well as ever.
NOT_THERE = 501
# What the HTTP client would add where a client of ours sent nothing.
NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class Outgoing(NamedTuple):
    """What is asked; `target` is the path and the query below the base URL, with everything in it encoded."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: Body


class Relay:
    """The way to one backend."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, limits: StreamLimits, connect_timeout_s: float
    ) -> None:
        self._session = session
        self._base_url = str(URL(base_url)).rstrip("/")  # with the host as it is on the wire
        self._limits = limits
        self._where = f"Upstream '{limits.name}' at {URL(base_url).authority.rpartition('@')[2]}"
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)

    async def open(self, asked: Outgoing, headers: Mapping[str, str], hold: Hold, call: Call) -> Relayed:
        """The answer from its headers on, whatever its status; `headers` replace those asked. Raises: UpstreamError.

        `hold` and `call` are the answer's until its end.
        """
        try:
            async with asyncio.timeout(self._limits.first_byte_timeout_s) as timer:
                answer = await self._answer(asked, headers, timer)
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamTimeout(f"{self._where} cannot be reached in time.") from error
        except TimeoutError as error:
            raise UpstreamTimeout(f"Upstream '{self._limits.name}' did not answer in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamUnreachable(f"{self._where} cannot be reached ({type(error).__name__}).") from error
        if answer.status == SWITCHING_PROTOCOLS or answer.status > LAST_STATUS:
            answer.close()
            raise UpstreamGarbled(f"Upstream '{self._limits.name}' answered with the status {answer.status}.")
        return Relayed(answer, self._limits, hold.keep(), call.stay_open())

    async def _answer(
        self, asked: Outgoing, headers: Mapping[str, str], timer: asyncio.Timeout
    ) -> aiohttp.ClientResponse:
        """Asks again at once when a connection from the pool turned out to be closed, and nothing is lost by it."""
        if asked.body is not None and not isinstance(asked.body, bytes):
            upload = Upload(asked.body, timer, self._limits.first_byte_timeout_s)
            return await self._answer_once(asked._replace(body=upload), headers)
        time_of = asyncio.get_running_loop().time
        began_at = time_of()
        try:
            return await self._answer_once(asked, headers)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if time_of() - began_at > CLOSED_WITHIN_S:
                raise
            return await self._answer_once(asked, headers)

    async def _answer_once(self, asked: Outgoing, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        sent = CIMultiDict(asked.headers)
        sent.update(headers)
        body: Any = asked.body
        if isinstance(body, bytes) and len(body) >= LARGE_BODY_BYTES:
            body = io.BytesIO(body)
        return await self._session.request(
            asked.method,
            URL(self._base_url + asked.target, encoded=True),
            data=body,
            headers=sent,
            skip_auto_headers=NOT_ADDED,
            auto_decompress=False,
            allow_redirects=False,
            timeout=self._timeout,
        )


class Upload:
    """A body that is still coming in: for what its client takes, the backend need not answer for.

    No generator: one that is left in the middle would have to be closed by somebody.
    """

    def __init__(self, pieces: AsyncIterator[bytes], timer: asyncio.Timeout, limit_s: float) -> None:
        self._pieces = pieces
        self._timer = timer
        self._limit_s = limit_s

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._end_at(None)
        try:
            return await anext(self._pieces)
        finally:
            self._end_at(asyncio.get_running_loop().time() + self._limit_s)

    def _end_at(self, at: float | None) -> None:
        with contextlib.suppress(RuntimeError):  # answered before the body was in
            self._timer.reschedule(at)


class Relayed:
    """An answer from its headers on. `close` it in every case.

    `refusal`: what its status says, where it is an error of the backend's own.
    """

    def __init__(self, answer: aiohttp.ClientResponse, limits: StreamLimits, hold: Hold, call: Call) -> None:
        self.status = answer.status
        self.headers = answer.raw_headers
        self._hold = hold
        self._call = call
        self._is_read = False
        self._answer = answer
        self._limits = limits
        # Never while the client is awaited.
        self._silence = Silence(limits, limits.idle_timeout_s, answer.close)
        self.refusal = refusal_of(answer, limits.name)
        self._has_failed = False
        if self.refusal is not None and self.status >= FIRST_FAULT:
            self._failed(self.refusal)
        elif self.refusal is not None:
            hold.failed(self.refusal)  # who refuses is alive, be the rest of it read or not

    async def pour(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """One write for each read of the network, to the end. Raises: UpstreamError for an end that came too early."""
        while data := await self._read():
            self._silence.pause()
            await write(data)
            self._silence.heard()
        self._is_read = True

    async def _read(self) -> bytes:
        try:
            return await self._answer.content.readany()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise self._failed(self._broken()) from error

    def _failed(self, error: UpstreamError) -> UpstreamError:
        """Tells it once: what breaks off after a fault is the same failure."""
        if not self._has_failed:
            self._has_failed = True
            self._call.failed(error)
            self._hold.failed(error)
        return error

    def _broken(self) -> UpstreamError:
        name = self._limits.name
        if self._silence.verdict:
            return UpstreamTimeout(f"Upstream '{name}' {self._silence.verdict} in the middle of its answer.")
        return UpstreamBroken(f"Upstream '{name}' closed the connection in its answer.")

    def close(self) -> None:
        """An answer that was not read to its end closes the connection, and so stops the backend."""
        self._silence.end()
        self._answer.close()
        self._call.ended(is_whole=self._is_read)
        if self._is_read:
            self._hold.end()
        else:
            self._hold.give_up()


def refusal_of(answer: aiohttp.ClientResponse, name: str) -> UpstreamRefused | None:
    """None where the status is no error, or says that the backend does not have what was asked for."""
    if answer.status < FIRST_REFUSAL or answer.status == NOT_THERE:
        return None
    error = UpstreamRefused(f"Upstream '{name}' answered with the status {answer.status}.", status=answer.status)
    error.retry_after_s = retry_after_s(answer.headers)
    return error
