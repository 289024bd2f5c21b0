"""The only outbound HTTP: how a backend is called, and what its failures mean.

May not know the Responses vocabulary, nor the store. Failures of every backend become the tree in errors.py.
Source: tests/wire, and the backends' own sources where a table names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, cast

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

import dialects
from capacity import TOKENIZERS, WINDOW_SOURCES, Probe, ToldWindows, entries, listed, windows_told
from chat_stream import ChatStream
from circuits import Circuit
from dialects import Dialect
from gates import NO_TERMS, Gate, Guard, Hold, Terms
from logs import REQUEST_ID
from looks import Look
from observing import Call, Observer, Place
from refusals import LATER, NEVER_LATER_CODES, Mend, mend_for, raise_if_error, refusal, retry_after_s
from relaying import CLOSED_WITHIN_S, LARGE_BODY_BYTES, Outgoing, Relay, Relayed
from silence import StreamLimits
from upstream_errors import UpstreamBroken, UpstreamError, UpstreamGarbled, UpstreamTimeout, UpstreamUnreachable

Json = dict[str, Any]
Headers = Mapping[str, str]
NOTHING_PASSED: Headers = MappingProxyType({})
NO_MENDS: frozenset[Mend] = frozenset()
log = logging.getLogger("responses_proxy.upstream")

# How long after a look that found nothing the next one is made, and after one that found something.
DETECTION_PAUSE_S, FOUND_KEPT_S = 10.0, 300.0
# How long an endpoint that did not answer in time is left alone, so that not every turn waits for it.
SILENT_PAUSE_S = 30.0
# How long an endpoint beside the chat may take, the status of one that took longer, and those that say there is none.
ASIDE_S = 5.0
NOT_IN_TIME = 408
NO_SUCH_ENDPOINT = frozenset({404, 405, 501})
# How long an idle connection is kept: less than the 5 s after which uvicorn and llama.cpp close theirs.
KEEP_IDLE_S = 4.0
# The largest part of an error body that is read.
ERROR_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class UpstreamSettings:
    """One `[[upstream]]` table."""

    name: str = "default"
    base_url: str = ""
    api_key: str = ""
    api_key_env: str = ""
    models: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    dialect: str = "auto"
    think: Literal["auto", "open", "off"] = "auto"
    window_tokens: int = 0
    tokenizer: Literal["auto", "off"] = "auto"
    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    total_timeout_s: float = 3600.0
    retries: int = 2
    retry_backoff_s: float = 0.5
    retry_wait_max_s: float = 5.0
    max_in_flight: int = 0
    max_waiting: int = 100
    queue_wait_s: float = 30.0
    fallback: tuple[str, ...] = ()
    circuit_failures: int = 5
    circuit_open_s: float = 15.0
    send_request_id: bool = False

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"upstream '{self.name}': base_url must be an http(s) URL, got {self.base_url!r}")
        if self.dialect != "auto" and self.dialect not in dialects.DIALECTS:
            raise ValueError(f"upstream '{self.name}': dialect must be auto or one of {', '.join(dialects.DIALECTS)}")

    @property
    def stream_limits(self) -> StreamLimits:
        return StreamLimits(self.name, self.first_byte_timeout_s, self.idle_timeout_s, self.total_timeout_s)


def settings_for(base_url: str) -> UpstreamSettings:
    """The settings of a single backend given by its URL alone."""
    return replace(UpstreamSettings(base_url=base_url), name=URL(base_url).host or "default")


class Upstream:
    """One chat-completions backend.

    Whoever calls it by other means than `complete` and `stream` does so inside `async with upstream.held(): ...`.
    """

    def __init__(self, settings: UpstreamSettings, session: aiohttp.ClientSession, observer: Observer) -> None:
        self.settings = settings
        self._session = session
        self._base_url = settings.base_url.rstrip("/")
        self._root = self._base_url.removesuffix("/v1")
        self._host = URL(settings.base_url)
        self._place = Place(observer, settings.name, self._host.host or "", self._host.port or 0)
        self._headers = self._make_headers()
        self._stream_limits = settings.stream_limits
        self._guard = guard_of(settings, observer)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s)
        self._relay = Relay(session, self._base_url, self._stream_limits, settings.connect_timeout_s)
        self._told_dialect = settings.dialect if settings.dialect != "auto" else dialects.of_host(self._host.host or "")
        self._probe = Probe(dialects.DIALECTS[self._told_dialect]) if self._told_dialect else None
        self._place.dialect = self._told_dialect or dialects.GENERIC.name
        self._looks = Look(self._look)
        self._told_windows = ToldWindows()
        self._count_again_at = 0.0
        # Model -> spellings that it was found to want; only models that the backend has answered for.
        self._mends: dict[str, frozenset[Mend]] = {}

    def _make_headers(self) -> CIMultiDict[str]:
        headers = CIMultiDict({"Content-Type": "application/json"})
        headers.update(self.settings.headers)
        if key := self.settings.api_key or os.environ.get(self.settings.api_key_env or "", ""):
            headers.setdefault("Authorization", f"Bearer {key}")
        return headers

    def _headers_for(self, passed: Headers) -> CIMultiDict[str]:
        if not passed and not self.settings.send_request_id:
            return self._headers
        headers = self._headers.copy()
        headers.update(passed)
        if self.settings.send_request_id:
            headers["X-Request-Id"] = REQUEST_ID.get()
        return headers

    # -- what it is ----------------------------------------------------------------------------------------------------

    async def dialect(self) -> Dialect:
        """The backend's dialect, looked at once; generic for as long as the backend cannot be reached."""
        if self._probe is None:
            self._looks.again(DETECTION_PAUSE_S)
            await self._looks.wait()
        return self._probe.dialect if self._probe else dialects.GENERIC

    def lists(self, model: str) -> bool:
        """Whether its list held that name at the last look; one whose settings name models serves no others."""
        return not self.settings.models and self._probe is not None and model in self._probe.models

    def look_again(self) -> None:
        """Looks at its list of models beside requests, unless that was done not long ago."""
        is_listed = self._probe is not None and self._probe.models
        self._looks.again(FOUND_KEPT_S if is_listed else DETECTION_PAUSE_S)

    async def looked(self) -> None:
        """When the look that is under way has been made; it is not waited for long."""
        await self._looks.wait()

    async def models(self, passed: Headers = NOTHING_PASSED) -> list[Json]:
        """The entries of its list of models, as they are. Raises: UpstreamError."""
        asking = self._send("GET", "/models", None, self._headers_for(passed))
        _, told = await self._read_json(asking, self.settings.connect_timeout_s)
        return entries(told, "data")

    async def _look(self) -> None:
        with contextlib.suppress(UpstreamError):
            await self.probe()

    async def probe(self) -> Probe:
        """Asks the backend for its models and their windows. Raises: UpstreamError."""
        self._looks.begun()
        asking = self._send("GET", "/models", None, self._headers)
        answer, told = await self._read_json(asking, self.settings.connect_timeout_s)
        models = entries(told, "data")
        dialect = self._dialect_of(models, answer.headers)
        before = self._probe = self._probe or Probe(dialect)
        self._place.dialect = dialect.name
        windows = windows_told(listed(told)) | await self._loaded_windows(dialect)
        self._probe = Probe(dialect, tuple(str(model.get("id")) for model in models), windows)
        self._told_windows.forget_changed(before, self._probe)
        return self._probe

    def _dialect_of(self, models: list[Json], headers: Headers) -> Dialect:
        """The dialect that is set or that the host tells; else what the models tell, or told before."""
        name = self._told_dialect or dialects.of_models({"data": models}, headers, self._host.port)
        if name == dialects.GENERIC.name and self._probe is not None:
            return self._probe.dialect
        if self._probe is None or self._probe.dialect.name != name:
            log.info("upstream '%s' speaks %s", self.settings.name, name)
        return dialects.DIALECTS[name]

    async def _loaded_windows(self, dialect: Dialect) -> dict[str, int]:
        """What the backend tells elsewhere than in its list of models."""
        for path, words in WINDOW_SOURCES.get(dialect.window_source, ()):
            _, answer = await self._ask_aside(path)
            if windows := windows_told(words(answer)):
                return windows
        return {}

    async def close(self) -> None:
        await self._looks.close()

    # -- what it holds -------------------------------------------------------------------------------------------------

    async def window_tokens(self, model: str) -> int | None:
        """The window of a model, as it is set, as an overflow told it, or as the backend tells; None while none does.

        What is known is told at once, and looked at again beside requests: backends are restarted with other windows.
        """
        if self.settings.window_tokens:
            return self.settings.window_tokens
        found = self._probe.window_tokens(model) if self._probe else None
        is_due_soon = found is None and (self._probe is None or self._probe.may_tell_more)
        self._looks.again(DETECTION_PAUSE_S if is_due_soon else FOUND_KEPT_S)
        if known := self._told_windows.get(model) or found:
            return known
        await self._looks.wait()
        return self._probe.window_tokens(model) if self._probe else None

    def told_window(self, model: str, tokens: int) -> None:
        """Remembers the window that an overflow told, until the backend itself tells another one than before."""
        self._told_windows.remember(model, tokens)

    async def count_tokens(self, body: Json, passed: Headers = NOTHING_PASSED) -> int | None:
        """What the backend would report as `usage.prompt_tokens` for this chat request; None where it cannot tell."""
        now = asyncio.get_running_loop().time()
        if self.settings.tokenizer == "off" or now < self._count_again_at:
            return None
        tokenizer = TOKENIZERS.get((await self.dialect()).tokenizer)
        if tokenizer is None:
            return None
        status, answer = await self._ask_aside(tokenizer.path, tokenizer.body(body), passed)
        if status in NO_SUCH_ENDPOINT:
            self._count_again_at = now + FOUND_KEPT_S
        elif status == NOT_IN_TIME:
            self._count_again_at = now + SILENT_PAUSE_S
        return tokenizer.read(answer)

    async def _ask_aside(
        self, path: str, body: Json | None = None, passed: Headers = NOTHING_PASSED
    ) -> tuple[int, Any]:
        """The status of an endpoint beside the chat, 0 without an answer, and its JSON when that is 200."""
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        try:
            async with asyncio.timeout(ASIDE_S):
                answer = await self._request(method, self._root + path, data, self._headers_for(passed))
                if answer.status == 200:
                    return 200, orjson.loads(await answer.read())
        except TimeoutError:
            return NOT_IN_TIME, None
        except (aiohttp.ClientError, OSError, orjson.JSONDecodeError, UpstreamBroken):
            return 0, None
        answer.close()
        return answer.status, None

    # -- calls ---------------------------------------------------------------------------------------------------------

    def held(self, terms: Terms = NO_TERMS) -> Hold:
        """The right to make one call, to its end: a place at the gate, where the circuit lets it through.

        `async with upstream.held() as hold: ...` takes an UpstreamError that leaves the block for the call's failure,
        and a block that ends for its success; a failure that is not raised is told by `hold.failed(error)`.
        Raises: UpstreamBusy and CircuitOpen, before the block begins.
        """
        return Hold(self._guard, terms)

    async def complete(self, body: Json, passed: Headers = NOTHING_PASSED, terms: Terms = NO_TERMS) -> Json:
        """The whole answer as one chat completion; `passed` replaces headers of the settings. Raises: UpstreamError."""
        async with self.held(terms):
            with self._place.call(body, passed) as call:
                _, completion = await self._read_json(self._post(body, call), self.settings.total_timeout_s)
                call.heard((self._checked(completion),))
                return cast(Json, completion)

    async def _read_json(
        self, asking: Awaitable[aiohttp.ClientResponse], timeout_s: float
    ) -> tuple[aiohttp.ClientResponse, Any]:
        """An answer, asked for and read in time, and the JSON in it. Raises: UpstreamError."""
        name = self.settings.name
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asking
                return answer, orjson.loads(await answer.read())
        except TimeoutError as error:
            raise UpstreamTimeout(f"Upstream '{name}' did not answer in time.") from error
        except aiohttp.ClientError as error:
            raise UpstreamBroken(f"Upstream '{name}' closed the connection in its answer.") from error
        except orjson.JSONDecodeError as error:
            raise UpstreamGarbled(f"Upstream '{name}' did not answer with JSON.") from error

    def _checked(self, completion: Any) -> Json:
        if not isinstance(completion, dict):
            raise UpstreamGarbled(f"Upstream '{self.settings.name}' did not answer with a JSON object.")
        raise_if_error(completion, self.settings.name)
        if not completion.get("choices"):
            raise UpstreamGarbled(f"Upstream '{self.settings.name}' answered without a choice.")
        return completion

    async def stream(self, body: Json, passed: Headers = NOTHING_PASSED, terms: Terms = NO_TERMS) -> ChatStream:
        """The answer as chunks, once the backend has accepted the request. `close` it. Raises: UpstreamError."""
        async with self.held(terms) as hold:
            with self._place.call(body, passed) as call:
                answer = await self._accepted(body, call)
                return ChatStream(answer, self._stream_limits, hold.keep(), call.stay_open())

    async def _accepted(self, body: Json, call: Call) -> aiohttp.ClientResponse:
        try:
            async with asyncio.timeout(self.settings.first_byte_timeout_s):
                return await self._post(body, call)
        except TimeoutError as error:
            raise UpstreamTimeout(f"Upstream '{self.settings.name}' did not answer in time.") from error

    async def relay(self, asked: Outgoing, passed: Headers = NOTHING_PASSED, terms: Terms = NO_TERMS) -> Relayed:
        """A request as a client made it, with the headers of the settings, and any answer. Raises: UpstreamError."""
        headers = self._headers_for(passed).copy()
        headers.popall("Content-Type", None)
        async with self.held(terms) as hold:
            with self._place.untold(passed) as call:
                call.sent()
                return await self._relay.open(asked, headers, hold, call)

    async def _post(self, body: Json, call: Call) -> aiohttp.ClientResponse:
        attempt = 0
        headers = self._headers_for(call.passed)
        tried: list[Mend] = []
        known = self._mends.get(body.get("model", ""), NO_MENDS)
        for learned in known:
            body = learned(body)
        while True:
            call.sent()
            try:
                answer = await self._send("POST", "/chat/completions", orjson.dumps(body), headers)
                if tried:  # one that is tried again takes a learned one back
                    self._mends[body.get("model", "")] = known.symmetric_difference(tried)
                return answer
            except UpstreamError as error:
                mend = mend_for(body, error)
                if mend is not None and mend not in tried:
                    tried.append(mend)
                    body = mend(body)
                    call.failed(error)
                    continue
                wait_s = self._retry_wait_s(error, attempt)
                if wait_s is None:
                    raise
                attempt += 1
                call.failed(error)
                call.retried()
                log.warning("upstream '%s': %s; again in %.1f s", self.settings.name, type(error).__name__, wait_s)
                await asyncio.sleep(wait_s)

    def _retry_wait_s(self, error: UpstreamError, attempt: int) -> float | None:
        """How long to wait before another attempt, or None: a wait too long is the client's to decide."""
        later = error.http_status in LATER and error.error_code not in NEVER_LATER_CODES
        if attempt >= self.settings.retries or not (later or isinstance(error, UpstreamUnreachable)):
            return None
        wait_s = error.retry_after_s or self.settings.retry_backoff_s * 2**attempt
        return wait_s if wait_s <= self.settings.retry_wait_max_s else None

    async def _send(self, method: str, path: str, data: bytes | None, headers: Headers) -> aiohttp.ClientResponse:
        """One request up to its headers. Raises: UpstreamError for anything but a 200."""
        where = f"Upstream '{self.settings.name}' at {self._host.authority}"
        try:
            answer = await self._request(method, self._base_url + path, data, headers)
        except aiohttp.ConnectionTimeoutError as error:
            raise UpstreamTimeout(f"{where} cannot be reached in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamUnreachable(f"{where} cannot be reached ({type(error).__name__}).") from error
        if answer.status != 200:
            raise await self._refused(answer)
        return answer

    async def _request(self, method: str, url: str, data: bytes | None, headers: Headers) -> aiohttp.ClientResponse:
        """Asks again at once when a connection from the pool turned out to be closed by the backend.

        Raises: UpstreamBroken for one that was closed later, so that the request may have been carried out.
        """
        asked_at = loop_time()
        try:
            return await self._request_once(method, url, data, headers)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if loop_time() - asked_at > CLOSED_WITHIN_S:
                raise UpstreamBroken(f"Upstream '{self.settings.name}' broke off before it answered.") from error
            return await self._request_once(method, url, data, headers)

    async def _request_once(
        self, method: str, url: str, data: bytes | None, headers: Headers
    ) -> aiohttp.ClientResponse:
        return await self._session.request(
            method,
            url,
            data=data if data is None or len(data) < LARGE_BODY_BYTES else io.BytesIO(data),
            headers=headers,
            allow_redirects=False,
            timeout=self._timeout,
        )

    async def _refused(self, answer: aiohttp.ClientResponse) -> UpstreamError:
        raw = bytearray()
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(self.settings.connect_timeout_s):
                while len(raw) < ERROR_BODY_BYTES and not answer.content.at_eof():
                    raw += await answer.content.readany()
        answer.close()
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            body = raw.decode("utf-8", "replace").strip()
        error = refusal(answer.status, body, self.settings.name)
        error.retry_after_s = retry_after_s(answer.headers)
        return error


def guard_of(settings: UpstreamSettings, observer: Observer) -> Guard:
    """What stands before a backend, by the clock of the loop."""
    gate = Gate(settings.name, settings.max_in_flight, settings.max_waiting, settings.queue_wait_s)
    circuit = Circuit(settings.name, settings.circuit_failures, settings.circuit_open_s, loop_time)
    return Guard(settings.name, gate, circuit, observer)


def loop_time() -> float:
    return asyncio.get_running_loop().time()


def new_session() -> aiohttp.ClientSession:
    """The connection pool that all backends share."""
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=KEEP_IDLE_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
