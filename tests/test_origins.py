"""Web pages: which may send requests, what browsers are told of it, and that programs are asked nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import App, StartApp
from scripted import Backend, plain, streamed
from socket_client import connected, handshake_refused
from test_listening import Wire
from test_owners import ALICE, AUTH, HI
from test_proxy import error_of

from errors import ForeignOrigin
from origins import Origins, is_loopback, origins_of
from settings import ServerSettings

CHAT = "https://chat.example"
LOOPBACK, LAN = "127.0.0.1", "192.168.1.5"
ALLOW = "access-control-allow-origin"


def refused_by(origins: Origins, origin: str | None, host: str = "127.0.0.1:8080", listens_on: str = LOOPBACK) -> bool:
    headers = {b"host": host.encode()} | ({b"origin": origin.encode()} if origin is not None else {})
    try:
        origins.check(headers, listens_on)
    except ForeignOrigin:
        return True
    return False


# -- the decision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://evil.example:8080", "null", "http://127.evil.example", "HTTPS://EVIL.EXAMPLE"],
)
@pytest.mark.parametrize("named", [(), (CHAT,)])
def test_a_page_of_another_site_is_refused(named: tuple[str, ...], origin: str) -> None:
    assert refused_by(Origins(named), origin)


@pytest.mark.parametrize(
    "origin",
    [
        *(None, "http://127.0.0.1:8080", "http://127.0.0.1:3000", "http://localhost:5173", "http://[::1]:3000"),
        *("https://app.localhost", "app://obsidian.md", "tauri://localhost", "vscode-webview://x", "file://"),
        "chrome-extension://abcdefghijklmnop",
    ],
)
def test_programs_and_pages_of_this_machine_are_not(origin: str | None) -> None:
    assert not refused_by(Origins(()), origin)


@pytest.mark.parametrize("origin", [CHAT, "HTTPS://Chat.Example", "null"])
def test_a_page_that_is_named_is_not_refused(origin: str) -> None:
    assert not refused_by(Origins((CHAT, "null")), origin)


def test_who_was_welcome_before_makes_nobody_else_welcome() -> None:
    origins = Origins(())
    told = [refused_by(origins, None) for _ in range(2)] + [refused_by(origins, None, "evil.example", LAN)]
    others = [("https://evil.example", "127.0.0.1:8080"), (None, "evil.example"), ("null", "127.0.0.1:8080")]
    assert told + [refused_by(origins, origin, host) for origin, host in others] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("origin", [f"{CHAT}:444", "http://chat.example", "https://x.chat.example"])
def test_a_page_is_named_whole(origin: str) -> None:
    assert refused_by(Origins((CHAT,)), origin)


def test_a_page_of_the_proxys_own_address_is_not_refused() -> None:
    assert not refused_by(Origins(()), "http://llm.lan:8080", "llm.lan:8080", LAN)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "EVIL.example.:80", "127.0.0.1.evil.example"])
@pytest.mark.parametrize("origin", [None, "same"])
def test_a_name_of_the_internet_that_leads_to_loopback_is_refused(host: str, origin: str | None) -> None:
    assert refused_by(Origins(()), origin and f"http://{host}", host)
    assert refused_by(Origins(()), origin and f"http://{host}", host, "::1")


@pytest.mark.parametrize(
    "host",
    [
        *("", "localhost", "LOCALHOST:8080", "127.0.0.1", "[::1]:8080", "192.168.1.5:8080", "proxy:8080"),
        *("host.docker.internal:8080", "Mac.LOCAL", "app.localhost", "nas.home.arpa", "proxy.ns.svc.cluster.local"),
    ],
)
def test_a_name_that_no_page_can_have_is_not_refused(host: str) -> None:
    assert not refused_by(Origins(()), None, host)


@pytest.mark.parametrize("listens_on", [LAN, "", "/run/proxy.sock"])
def test_names_are_looked_at_on_loopback_only(listens_on: str) -> None:
    assert not refused_by(Origins(()), None, "llm.corp.example", listens_on)


@pytest.mark.parametrize("host", ["chat.example", "chat.example:8080"])
def test_the_name_of_a_page_that_is_named_is_the_proxys_own(host: str) -> None:
    assert not refused_by(Origins((CHAT,)), CHAT, host)


@pytest.mark.parametrize(
    ("named", "mode", "is_checked"),
    [
        ((), "none", True),
        ((), "keys", False),
        ((), "passthrough", False),
        ((CHAT,), "none", True),
        ((CHAT,), "keys", True),
        (("*",), "none", False),
        ((CHAT, "*"), "keys", False),
    ],
)
def test_pages_are_checked_where_no_key_is_or_where_some_are_named(
    named: tuple[str, ...], mode: str, is_checked: bool
) -> None:
    assert (origins_of(named, mode) is not None) == is_checked


@pytest.mark.parametrize(
    "origin",
    ["", "chat.example", f"{CHAT}/", f"{CHAT}/chat", "https://*.example", "https://Chat.example", "https://", "**"],
)
def test_an_origin_that_no_browser_sends_is_refused_in_the_settings(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins: expected"):
        ServerSettings(cors_origins=(origin,))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "a.localhost"])
def test_loopback_is_known(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["", "[2001:db8::1]", "0.0.0.0", "127.evil.example", "notlocalhost", "10.0.0.1"])
def test_other_names_are_not_loopback(name: str) -> None:
    assert not is_loopback(name)


# -- the running proxy -------------------------------------------------------------------------------------------------


async def test_a_page_cannot_have_a_local_backend_work(app: App, backend: Backend) -> None:
    simple = {"origin": "https://evil.example", "content-type": "text/plain"}  # needs no preflight
    async with app.post(b'{"model":"m","input":"Hi"}', headers=simple) as answer:
        error = await error_of(answer, 403)
    message = "Requests of web pages from 'https://evil.example' are not allowed: see server.cors_origins."
    expected = {"message": message, "type": "permission_error", "param": None, "code": "origin_not_allowed"}
    assert (error, backend.requests) == (expected, [])


async def test_a_name_that_was_pointed_to_this_machine_reads_nothing(app: App) -> None:
    async with app.http.get(f"{app.url}/v1/responses", headers={"host": "evil.example"}) as answer:
        error = await error_of(answer, 403)
    assert error["message"].startswith("'evil.example' is not known as a name of this proxy")


async def test_with_keys_pages_need_a_key_and_no_more(start_app: StartApp) -> None:
    app = await start_app(auth=AUTH)
    key = {"authorization": f"Bearer {ALICE}", "origin": "https://anywhere.example", "host": "llm.example"}
    async with app.post(HI, headers=key) as answer:
        assert (answer.status, ALLOW in answer.headers) == (200, False)


async def test_a_preflight_is_refused_where_no_page_is_named(app: App) -> None:
    async with app.http.options(f"{app.url}/v1/responses", headers=preflight(CHAT)) as answer:
        await error_of(answer, 403)
    assert ALLOW not in answer.headers


# -- CORS --------------------------------------------------------------------------------------------------------------

SDK_HEADERS = "authorization,content-type,idempotency-key,openai-beta,openai-organization,x-request-id,x-stainless-arch"


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    asked = {"access-control-request-method": method, "access-control-request-headers": SDK_HEADERS}
    return {"origin": origin, **asked}


@pytest.fixture
async def open_app(start_app: StartApp) -> App:
    return await start_app(server={"cors_origins": (CHAT,)}, auth=AUTH, limits={"body_bytes": 1000})


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/conversations", "/responses/resp_1"])
async def test_a_preflight_needs_no_key_and_allows_what_sdks_send(open_app: App, path: str, method: str) -> None:
    async with open_app.http.options(open_app.url + path, headers=preflight(CHAT, method)) as answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
    assert (answer.status, headers[ALLOW]) == (200, CHAT)
    assert method in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == SDK_HEADERS
    assert "access-control-allow-credentials" not in headers


async def test_a_public_page_may_be_let_onto_a_private_network(open_app: App) -> None:
    asked = {**preflight(CHAT), "access-control-request-private-network": "true"}
    async with open_app.http.options(f"{open_app.url}/v1/responses", headers=asked) as answer:
        assert (answer.status, answer.headers["access-control-allow-private-network"]) == (200, "true")


async def test_a_preflight_of_another_page_is_refused(open_app: App) -> None:
    async with open_app.http.options(f"{open_app.url}/v1/responses", headers=preflight("https://x.example")) as answer:
        assert (answer.status, ALLOW in answer.headers) == (400, False)


@pytest.mark.parametrize(
    ("body", "key", "status"),
    [
        (HI, ALICE, 200),
        ({**HI, "stream": True}, ALICE, 200),
        (b"{", ALICE, 400),
        (HI, "x", 401),
        (b" " * 2000, ALICE, 413),
    ],
    ids=["plain", "stream", "400", "401", "413"],
)
async def test_a_page_may_read_every_answer(open_app: App, backend: Backend, body: Any, key: str, status: int) -> None:
    backend.script(streamed("Hi") if isinstance(body, dict) and body.get("stream") else plain())
    async with open_app.post(body, headers={"origin": CHAT, "authorization": f"Bearer {key}"}) as answer:
        await answer.read()
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert (answer.status, answer.headers[ALLOW], answer.headers["vary"]) == (status, CHAT, "Origin")
    assert {"x-request-id", "retry-after", "x-responses-proxy-ignored", "x-ratelimit-reset-requests"} <= exposed


async def test_a_page_may_read_a_fault_of_the_proxy(open_app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr("edge.parse_request", fails)
    async with open_app.post(HI, headers={"origin": CHAT, "authorization": f"Bearer {ALICE}"}) as answer:
        assert (answer.status, answer.headers[ALLOW]) == (500, CHAT)


async def test_a_page_that_is_not_named_is_refused_with_a_key_too(open_app: App) -> None:
    headers = {"origin": "https://x.example", "authorization": f"Bearer {ALICE}"}
    async with open_app.post(HI, headers=headers) as answer:
        await error_of(answer, 403)
    assert ALLOW not in answer.headers


async def test_every_page_may_be_let_in(start_app: StartApp) -> None:
    app = await start_app(server={"cors_origins": ("*",)})
    async with app.post(HI, headers={"origin": "https://anywhere.example", "host": "llm.example"}) as answer:
        assert (answer.status, answer.headers[ALLOW]) == (200, "*")


# -- WebSocket ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://evil.example", "host": "evil.example"},
        {"host": "evil.example"},
    ],
)
async def test_a_page_of_another_site_opens_no_websocket(app: App, headers: dict[str, str]) -> None:
    refusal = await handshake_refused(app, headers=headers)
    assert refusal.status == 403


@pytest.mark.parametrize("headers", [{"origin": "http://127.0.0.1:8080"}, {"origin": "app://chat"}, {}])
async def test_a_page_of_this_machine_and_programs_open_websockets(app: App, headers: dict[str, str]) -> None:
    async with connected(app, headers=headers) as client:
        await client.turn("Hi")


async def test_a_page_that_is_named_opens_a_websocket(open_app: App) -> None:
    key = {"authorization": f"Bearer {ALICE}"}
    async with connected(open_app, headers={"origin": CHAT, **key}) as client:
        await client.turn("Hi")
    assert (await handshake_refused(open_app, headers={"origin": "https://x.example", **key})).status == 403


# -- methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/healthz", "/metrics", "/v1/responses", "/v1/responses/{id}", "/v1/responses/{id}/input_items"]
)
async def test_head_is_get_without_the_body(app: App, path: str) -> None:
    made = await app.openai.responses.create(model="m", input="Hi")
    url = app.url + path.format(id=made.id)
    async with app.http.get(url) as get, app.http.head(url) as head:
        assert (head.status, head.headers["content-type"]) == (get.status, get.headers["content-type"])
        assert await head.read() == b""


async def test_head_of_a_stream_does_not_wait_for_its_end(app: App, backend: Backend) -> None:
    goes_on = asyncio.Event()
    script = streamed("Hello")
    script.before = goes_on
    backend.script(script)
    async with app.post({**HI, "background": True, "stream": True}) as streaming:
        first = await streaming.content.readuntil(b"\n\n")
        response_id = first.partition(b'"id":"')[2].partition(b'"')[0]
        async with Wire(app) as wire:
            await wire.say(b"HEAD /v1/responses/%b?stream=true HTTP/1.1\r\nhost: x\r\n\r\n" % response_id)
            assert await wire.status() == b"200"
            await wire.say(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await wire.status() == b"200"
        goes_on.set()
        await streaming.read()


@pytest.mark.parametrize("path", ["/v1/responses", "/healthz"])
async def test_options_without_cors_is_a_method_like_any_other(app: App, path: str) -> None:
    async with app.http.options(app.url + path) as answer:
        await error_of(answer, 405)
