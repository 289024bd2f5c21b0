"""Who sees what, through the running proxy: each owner its own data, and another's id is like one that never was."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import App, StartApp, both_stores
from scripted import Backend, Script, chunk, plain, refused, streamed
from store_places import FilePlace, Place
from test_proxy import Blocks, error_of, events_in

from stored import STORED_ROUTES
from windows import WINDOW_ROUTES

pytestmark = both_stores
Json = dict[str, Any]

ALICE, BOB = "rp-alice-4f1c9d27", "rp-bob-83ab52e0"
KEYS = {name: f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in (("alice", ALICE), ("bob", BOB))}
AUTH = {"mode": "keys", "keys": KEYS}
PASSTHROUGH = {"mode": "passthrough"}
MISSING = "Missing API key: send it in the header 'Authorization: Bearer <key>'."
INCORRECT = "Incorrect API key provided."
HI: Json = {"model": "m", "input": "Hi"}
RUN: Json = {**HI, "background": True}
USER: Json = {"type": "message", "role": "user", "content": "Hi"}
# Headers that differ from one answer to the next, whatever was asked.
FRESH = ("x-request-id", "date")


@dataclass
class Client:
    """One client of the proxy, with its key."""

    app: App
    key: str | None

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        sent = {"authorization": f"Bearer {self.key}", **headers} if self.key else headers
        async with self.app.http.request(method, self.app.url + path, json=body, headers=sent) as answer:
            return Answer(answer.status, await answer.text(), {k.lower(): v for k, v in answer.headers.items()})

    async def made(self, path: str, body: Json, **headers: str) -> Json:
        answer = await self.ask("POST", path, body, **headers)
        assert answer.status == 200, answer.text
        return answer.body

    async def respond(self, **changes: Any) -> Json:
        return await self.made("/v1/responses", {**HI, **changes})


@dataclass
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def body(self) -> Json:
        body: Json = json.loads(self.text)
        return body

    def without(self, given_id: str) -> tuple[int, str, dict[str, str]]:
        """What a client sees of it, the id that it asked for and what is fresh in every answer aside."""
        headers = {name: value for name, value in self.headers.items() if name not in FRESH}
        return self.status, self.text.replace(given_id, "<id>"), headers


@pytest.fixture
async def app(start_app: StartApp) -> App:
    return await start_app(auth=AUTH)


@pytest.fixture
def alice(app: App) -> Client:
    return Client(app, ALICE)


@pytest.fixture
def bob(app: App) -> Client:
    return Client(app, BOB)


# -- 401 ---------------------------------------------------------------------------------------------------------------

ROUTES = [("POST", "/responses"), *STORED_ROUTES, *WINDOW_ROUTES]
each_route = pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda text: text)


@each_route
@pytest.mark.parametrize(("key", "message"), [(None, MISSING), ("rp-mallory", INCORRECT)], ids=["none", "wrong"])
async def test_no_route_is_open_without_a_known_key(
    app: App, backend: Backend, method: str, path: str, key: str | None, message: str
) -> None:
    answer = await Client(app, key).ask(method, f"/v1{path}", HI if method == "POST" else None)
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert (answer.status, answer.body, backend.requests) == (401, {"error": error}, [])
    assert answer.headers["x-request-id"]


async def test_a_wrong_key_is_refused_before_the_body_is_looked_at(app: App) -> None:
    headers = {"authorization": "Bearer rp-mallory"}
    async with app.post(b"{", headers=headers) as answer:
        error = await error_of(answer, 401)
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("auth", [AUTH, PASSTHROUGH], ids=["keys", "passthrough"])
async def test_health_needs_no_key(start_app: StartApp, auth: Json) -> None:
    answer = await Client(await start_app(auth=auth), None).ask("GET", "/healthz")
    assert (answer.status, answer.body) == (200, {"status": "ok"})


async def test_a_known_key_may_ask_and_does_not_go_to_the_backend(alice: Client, backend: Backend) -> None:
    assert (await alice.respond())["status"] == "completed"
    assert "authorization" not in (await backend.received()).headers


# -- an id of another owner --------------------------------------------------------------------------------------------


@dataclass
class Belongings:
    """What one owner has in the store."""

    response: str
    output: str
    input: str
    conversation: str
    item: str

    @classmethod
    async def of(cls, client: Client) -> Belongings:
        response = await client.respond()
        (asked,) = (await client.ask("GET", f"/v1/responses/{response['id']}/input_items")).body["data"]
        conversation = (await client.made("/v1/conversations", {"items": [USER]}))["id"]
        (item,) = (await client.ask("GET", f"/v1/conversations/{conversation}/items")).body["data"]
        return cls(response["id"], response["output"][0]["id"], asked["id"], conversation, item["id"])


@dataclass(frozen=True)
class Case:
    """A request that names `{id}`, which is another owner's `of`; `{own…}` are the asker's own ids."""

    method: str
    path: str
    of: str
    body: Json | None = None
    status: int = 404

    async def asked(self, client: Client, own: Belongings, given_id: str) -> Answer:
        def filled(text: str) -> str:
            text = text.replace("{id}", given_id).replace("{item}", "msg_1")
            return text.replace("{own.response}", own.response).replace("{own.conversation}", own.conversation)

        body = self.body and json.loads(filled(json.dumps(self.body)))
        return await client.ask(self.method, f"/v1{filled(self.path)}", body)

    @property
    def name(self) -> str:
        body = "" if self.body is None else f" {'+'.join(self.body)}"
        return f"{self.method} {self.path}{body} {self.of}"


def referring(of: str) -> Json:
    return {"items": [{"type": "item_reference", "id": of}]}


ROUTE_CASES = [
    Case("GET", "/responses/{id}", "response"),
    Case("DELETE", "/responses/{id}", "response"),
    Case("POST", "/responses/{id}/cancel", "response"),
    Case("GET", "/responses/{id}/input_items", "response"),
    Case("GET", "/conversations/{id}", "conversation"),
    Case("POST", "/conversations/{id}", "conversation", {"metadata": {"a": "b"}}),
    Case("DELETE", "/conversations/{id}", "conversation"),
    Case("POST", "/conversations/{id}/items", "conversation", {"items": [USER]}),
    Case("GET", "/conversations/{id}/items", "conversation"),
    Case("GET", "/conversations/{id}/items/{item}", "conversation"),
    Case("DELETE", "/conversations/{id}/items/{item}", "conversation"),
]
OTHER_CASES = [
    Case("GET", "/responses/{id}?stream=true", "response"),
    Case("GET", "/responses?after={id}", "response", status=400),
    Case("GET", "/responses?before={id}", "response", status=400),
    *(
        Case("GET", f"/{list_of}?{side}={{id}}", of, status=400)
        for list_of in ("responses/{own.response}/input_items", "conversations/{own.conversation}/items")
        for side in ("after", "before")
        for of in ("input", "output", "item")
    ),
    *(
        Case(method, "/conversations/{own.conversation}/items/{id}", of)
        for method in ("GET", "DELETE")
        for of in ("input", "output", "item")
    ),
    *(
        Case("POST", path, of, referring("{id}"))
        for path in ("/conversations", "/conversations/{own.conversation}/items")
        for of in ("input", "output", "item")
    ),
    *(
        Case("POST", "/responses", of, {**HI, "input": [{"type": "item_reference", "id": "{id}"}], **options})
        for of in ("input", "output", "item")
        for options in ({}, {"stream": True}, {"store": False})
    ),
    *(
        Case("POST", "/responses", "response", {**HI, "previous_response_id": "{id}", **options}, 400)
        for options in ({}, {"stream": True}, {"store": False})
    ),
    *(
        Case("POST", "/responses", "conversation", {**HI, "conversation": conversation, **options})
        for conversation in ("{id}", {"id": "{id}"})
        for options in ({}, {"stream": True}, {"store": False})
    ),
]
OLD_BACKGROUND_CASES = [
    *(
        Case("POST", "/responses", "conversation", {**RUN, "conversation": "{id}", **options})
        for options in ({}, {"stream": True}, {"store": False})
    ),
    *(
        Case("POST", "/responses", of, {**RUN, "input": [{"type": "item_reference", "id": "{id}"}], **options})
        for of in ("input", "output", "item")
        for options in ({}, {"stream": True})
    ),
]


def unlike(given_id: str) -> str:
    """An id of the same form and length that nobody has."""
    prefix, digits = given_id.split("_")
    return f"{prefix}_{'0' * len(digits)}"


def test_every_route_with_an_id_is_asked_for_a_foreign_one() -> None:
    asked = {(case.method, case.path) for case in ROUTE_CASES}
    assert asked == {(method, path) for method, path in STORED_ROUTES if "{id}" in path}


@pytest.mark.parametrize("case", ROUTE_CASES + OTHER_CASES + OLD_BACKGROUND_CASES, ids=lambda case: case.name)
async def test_a_foreign_id_is_answered_byte_for_byte_like_an_unknown_one(
    alice: Client, bob: Client, backend: Backend, case: Case
) -> None:
    foreign, own = await Belongings.of(alice), await Belongings.of(bob)
    asked_so_far = len(backend.requests)
    given_id = getattr(foreign, case.of)
    to_foreign = await case.asked(bob, own, given_id)
    to_unknown = await case.asked(bob, own, unlike(given_id))
    assert to_foreign.without(given_id) == to_unknown.without(unlike(given_id))
    assert (to_foreign.status, len(backend.requests)) == (case.status, asked_so_far), to_foreign.text


async def test_what_another_owner_asks_for_changes_nothing(alice: Client, bob: Client) -> None:
    belongings, own = await Belongings.of(alice), await Belongings.of(bob)
    paths = [f"/v1/responses/{belongings.response}", f"/v1/conversations/{belongings.conversation}"]
    paths += [f"{paths[0]}/input_items", f"{paths[1]}/items"]
    before = [(await alice.ask("GET", path)).text for path in paths]
    for case in ROUTE_CASES + OTHER_CASES:
        await case.asked(bob, own, getattr(belongings, case.of))
    assert [(await alice.ask("GET", path)).text for path in paths] == before


async def test_a_foreign_conversation_is_not_waited_for(start_app: StartApp, backend: Backend) -> None:
    """How long an answer takes tells nothing either."""
    app = await start_app(auth=AUTH, turns={"conversation_wait_s": 3600.0})
    alice, bob = Client(app, ALICE), Client(app, BOB)
    conversation = (await alice.made("/v1/conversations", {}))["id"]
    goes_on = asyncio.Event()
    held = plain()
    held.before = goes_on
    backend.script(held)
    running = asyncio.create_task(alice.respond(conversation=conversation))
    await backend.received()
    for path, body in (("/responses", {**HI, "conversation": conversation}), ("", {"items": [USER]})):
        path = path or f"/conversations/{conversation}/items"
        assert (await bob.ask("POST", f"/v1{path}", body)).status == 404
    goes_on.set()
    assert (await running)["status"] == "completed"


# -- lists, keys and blobs of another owner ----------------------------------------------------------------------------


async def test_each_owner_lists_its_own_responses(alice: Client, bob: Client) -> None:
    own = {client.key: (await client.respond())["id"] for client in (alice, bob)}
    found = {client.key: (await client.ask("GET", "/v1/responses")).body for client in (alice, bob)}
    assert {key: [each["id"] for each in listed["data"]] for key, listed in found.items()} == {
        key: [response_id] for key, response_id in own.items()
    }


async def test_a_list_of_nothing_tells_nothing_of_others(alice: Client, bob: Client) -> None:
    await alice.respond()
    empty = {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
    answers = [await bob.ask("GET", f"/v1/responses{query}") for query in ("", "?model=m", "?order=asc&limit=100")]
    assert [answer.body for answer in answers] == [empty] * 3


@pytest.mark.parametrize("changes", [{}, {"input": "Other"}], ids=["same body", "other body"])
async def test_a_key_that_another_owner_used_is_fresh(
    alice: Client, bob: Client, backend: Backend, changes: Json
) -> None:
    key = {"Idempotency-Key": "k-1"}
    first = await alice.made("/v1/responses", HI, **key)
    answer = await bob.ask("POST", "/v1/responses", {**HI, **changes}, **key)
    assert (answer.status, answer.headers.get("idempotent-replayed"), len(backend.requests)) == (200, None, 2)
    assert answer.body["id"] != first["id"]


async def test_a_key_that_another_owner_uses_just_now_is_free(alice: Client, bob: Client, backend: Backend) -> None:
    goes_on = asyncio.Event()
    held = plain()
    held.before = goes_on
    backend.script(held, plain())
    running = asyncio.create_task(alice.made("/v1/responses", HI, **{"Idempotency-Key": "k-1"}))
    await backend.received()
    assert (await bob.made("/v1/responses", HI, **{"Idempotency-Key": "k-1"}))["status"] == "completed"
    goes_on.set()
    assert (await running)["status"] == "completed"


async def test_foreign_reasoning_is_answered_like_a_blob_that_nobody_made(
    start_app: StartApp, backend: Backend
) -> None:
    app = await start_app(auth=AUTH, upstream={"dialect": "deepseek"}, reasoning={"expose": "none"})
    backend.script(plain(reasoning_content="A secret thought."), plain())
    alice, bob = Client(app, ALICE), Client(app, BOB)
    reasoning, _ = (await alice.respond(store=False))["output"]
    blob = reasoning["encrypted_content"]
    answers = []
    for given in (blob, f"{blob[:-1]}{'A' if blob[-1] != 'A' else 'B'}"):
        items = [USER, {**reasoning, "encrypted_content": given}, USER]
        answers.append(await bob.ask("POST", "/v1/responses", {**HI, "input": items}))
    left_out = [answer.headers["x-responses-proxy-ignored"] for answer in answers]
    assert ([answer.status for answer in answers], left_out) == ([200] * 2, ["input[1].encrypted_content"] * 2)
    first, *others = backend.requests
    assert {request.raw for request in others} == {others[0].raw}
    assert all(b"secret" not in request.raw for request in (first, *others))


# -- passthrough -------------------------------------------------------------------------------------------------------

TOKEN, OTHER_TOKEN = "sk-client-Zq81xW0v", "sk-client-Jm26tR9c"
CONFIGURED = "sk-configured-Hd73"


async def passing(start_app: StartApp, **sections: Json) -> App:
    return await start_app(auth=PASSTHROUGH, upstream={"api_key": CONFIGURED}, **sections)


@pytest.mark.parametrize("options", [{}, {"stream": True}], ids=["plain", "stream"])
async def test_the_clients_token_reaches_the_backend_and_ours_does_not(
    start_app: StartApp, backend: Backend, options: Json
) -> None:
    backend.script(streamed("Hi") if options else plain())
    answer = await Client(await passing(start_app), TOKEN).ask("POST", "/v1/responses", {**HI, **options})
    received = await backend.received()
    assert (answer.status, received.headers["authorization"]) == (200, f"Bearer {TOKEN}")
    assert CONFIGURED not in repr(received)


async def test_two_tokens_are_two_owners(start_app: StartApp) -> None:
    app = await passing(start_app)
    one, other = Client(app, TOKEN), Client(app, OTHER_TOKEN)
    response_id = (await one.respond())["id"]
    answers = [await client.ask("GET", f"/v1/responses/{response_id}") for client in (one, other)]
    assert [answer.status for answer in answers] == [200, 404]


@pytest.mark.stores("file", "postgres")
async def test_a_token_is_the_same_owner_after_a_restart(start_app: StartApp) -> None:
    response_id = (await Client(await passing(start_app), TOKEN).respond())["id"]
    again = Client(await passing(start_app), TOKEN)
    assert (await again.ask("GET", f"/v1/responses/{response_id}")).body["id"] == response_id


async def test_a_missing_token_is_a_401(start_app: StartApp, backend: Backend) -> None:
    answer = await Client(await passing(start_app), None).ask("POST", "/v1/responses", HI)
    error = {"message": MISSING, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert (answer.status, answer.body, backend.requests) == (401, {"error": error}, [])


async def test_a_backends_401_reaches_the_client(start_app: StartApp, backend: Backend) -> None:
    backend.script(refused(401, "Incorrect API key provided", code="invalid_api_key"))
    answer = await Client(await passing(start_app), TOKEN).ask("POST", "/v1/responses", HI)
    assert (answer.status, answer.body["error"]["code"]) == (401, "invalid_api_key")


async def everything(client: Client, backend: Backend) -> None:
    """Turns of each kind, some of which fail, and reads and writes of what they left."""
    backend.script(plain(), streamed("Hi"), plain(), refused(500, "no"), refused(401, "no"), streamed("Hi"))
    response = await client.respond()
    async with client.app.post(
        {**HI, "stream": True, "previous_response_id": response["id"]},
        headers={"authorization": f"Bearer {client.key}"},
    ) as answer:
        assert events_in(await Blocks(answer).rest())[-1]["type"] == "response.completed"
    conversation = (await client.made("/v1/conversations", {"items": [USER]}))["id"]
    await client.made("/v1/responses", {**HI, "conversation": conversation}, **{"Idempotency-Key": "k-1"})
    for body in (HI, {**HI, "stream": True}, {**HI, "temperature": "hot"}):
        await client.ask("POST", "/v1/responses", body)
    for path in (f"/responses/{response['id']}", "/responses", f"/conversations/{conversation}/items", "/nowhere"):
        await client.ask("GET", f"/v1{path}")
    await client.ask("DELETE", f"/v1/responses/{response['id']}")


@pytest.mark.parametrize(
    ("auth", "token"), [(PASSTHROUGH, TOKEN), (AUTH, ALICE)], ids=["token of passthrough", "key of keys"]
)
async def test_a_clients_key_is_nowhere_in_the_store_or_the_log(
    start_app: StartApp, backend: Backend, place: Place, caplog: pytest.LogCaptureFixture, auth: Json, token: str
) -> None:
    caplog.set_level(logging.DEBUG)
    app = await start_app(auth=auth)
    await everything(Client(app, token), backend)
    if isinstance(place, FilePlace):
        assert place.holding("") == ["responses.db", "responses.db-shm", "responses.db-wal", "responses.db.key"]
    assert place.holding("Hello there.") == (["responses.db-wal"] if isinstance(place, FilePlace) else ["item"])
    assert (place.holding(token), place.holding(hashlib.sha256(token.encode()).hexdigest())) == ([], [])
    assert [record.msg for record in caplog.records if token in f"{record.getMessage()}{record.args}"] == []


async def test_what_clients_say_is_not_in_the_log_at_any_level(
    start_app: StartApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await Client(await start_app(), None).respond(input="something very private")
    private = [record for record in caplog.records if "very private" in record.getMessage()]
    assert [f"{record.name}: {record.msg}" for record in private] == []


# -- background responses of another owner -----------------------------------------------------------------------------

BACKGROUND_CASES = [
    Case("GET", "/responses/{id}", "run"),
    Case("GET", "/responses/{id}/input_items", "run"),
    Case("DELETE", "/responses/{id}", "run"),
    Case("POST", "/responses/{id}/cancel", "run"),
    *(Case("GET", f"/responses/{{id}}?stream=true{more}", "run") for more in ("", "&starting_after=0")),
    Case("GET", "/responses/{id}?stream=true&starting_after=1000000", "run"),
    Case("GET", "/responses?after={id}", "run", status=400),
    *(
        Case("POST", "/responses", "run", {**HI, "previous_response_id": "{id}", **options}, 400)
        for options in (
            {},
            {"stream": True},
            {"store": False},
            {"background": True},
            {"background": True, "stream": True},
            {"background": True, "store": False},
        )
    ),
]


@pytest.fixture(params=["queued", "in_progress", "completed"])
async def run_of_alice(
    request: pytest.FixtureRequest, start_app: StartApp, backend: Backend, place: Place
) -> tuple[Client, Client, str]:
    """A streamed background response of hers in each status; with bob, at another process."""
    workers = 0 if request.param == "queued" else 1
    app = await start_app(auth=AUTH, background={"workers": workers})
    bobs = await start_app(auth=AUTH, background={"workers": 0})
    backend.script(Script([chunk(content="Hel")], end="silent") if request.param == "in_progress" else streamed("Hi"))
    alice, bob = Client(app, ALICE), Client(bobs, BOB)
    headers = {"authorization": f"Bearer {ALICE}"}
    async with app.post({**RUN, "stream": True}, headers=headers) as answer:
        blocks = Blocks(answer)
        first = json.loads((await blocks.next()).partition("data: ")[2])["response"]
        if request.param == "in_progress":
            await blocks.until("event: response.output_text.delta")
        if request.param == "completed":
            await blocks.rest()
    return alice, bob, first["id"]


@pytest.mark.parametrize("case", BACKGROUND_CASES, ids=lambda case: case.name)
async def test_a_foreign_run_is_answered_byte_for_byte_like_an_unknown_one(
    run_of_alice: tuple[Client, Client, str], backend: Backend, case: Case
) -> None:
    alice, bob, given_id = run_of_alice
    own, asked_so_far = Belongings("", "", "", "", ""), len(backend.requests)
    before = await alice.ask("GET", f"/v1/responses/{given_id}")
    to_foreign = await case.asked(bob, own, given_id)
    to_unknown = await case.asked(bob, own, unlike(given_id))
    assert to_foreign.without(given_id) == to_unknown.without(unlike(given_id))
    assert (to_foreign.status, len(backend.requests)) == (case.status, asked_so_far), to_foreign.text
    assert (await alice.ask("GET", f"/v1/responses/{given_id}")).text == before.text


async def test_a_foreign_run_is_not_waited_for(start_app: StartApp, backend: Backend) -> None:
    """How long an answer takes tells nothing either."""
    app = await start_app(auth=AUTH, turns={"parent_wait_s": 3600.0}, background={"workers": 0})
    alice, bob = Client(app, ALICE), Client(app, BOB)
    parent = (await alice.respond(background=True))["id"]
    for options in ({}, {"stream": True}):
        answer = await bob.ask("POST", "/v1/responses", {**HI, **options, "previous_response_id": parent})
        assert answer.status == 400


async def test_each_owner_has_its_own_queue(start_app: StartApp) -> None:
    app = await start_app(auth=AUTH, background={"workers": 0, "queue_per_owner": 1})
    alice, bob = Client(app, ALICE), Client(app, BOB)
    await alice.respond(background=True)
    assert (await alice.ask("POST", "/v1/responses", RUN)).status == 429
    assert (await bob.respond(background=True))["status"] == "queued"


async def test_owners_are_served_in_turns(start_app: StartApp, backend: Backend, place: Place) -> None:
    app = await start_app(auth=AUTH, background={"workers": 0})
    for key, count in ((ALICE, 4), (BOB, 2)):
        for number in range(count):
            await Client(app, key).respond(background=True, input=f"{key} {number}")
    backend.script(streamed("Hi"))
    await start_app(auth=AUTH, background={"workers": 1})
    asked = [(await backend.received()).body["messages"][0]["content"] for _ in range(6)]
    in_turns = [(ALICE, 0), (BOB, 0), (ALICE, 1), (BOB, 1), (ALICE, 2), (ALICE, 3)]
    assert asked == [f"{key} {number}" for key, number in in_turns]


async def test_a_background_response_is_its_owners_after_it_was_carried_out(
    alice: Client, bob: Client, backend: Backend
) -> None:
    backend.script(streamed("Hi"))
    response_id = (await alice.respond(background=True))["id"]
    await backend.received()
    assert (await bob.ask("GET", f"/v1/responses/{response_id}")).status == 404
    listed = {client.key: (await client.ask("GET", "/v1/responses")).body["data"] for client in (alice, bob)}
    assert {key: [each["id"] for each in found] for key, found in listed.items()} == {ALICE: [response_id], BOB: []}


async def test_a_key_of_a_background_request_is_another_owners_too(alice: Client, bob: Client) -> None:
    key = {"Idempotency-Key": "k-1"}
    first = await alice.made("/v1/responses", RUN, **key)
    answer = await bob.ask("POST", "/v1/responses", RUN, **key)
    assert (answer.status, answer.headers.get("idempotent-replayed")) == (200, None)
    assert answer.body["id"] != first["id"]


async def test_a_run_carries_the_token_of_its_own_client(start_app: StartApp, backend: Backend) -> None:
    app = await passing(start_app, background={"workers": 1})
    backend.script(streamed("Hi"))
    for token in (TOKEN, OTHER_TOKEN):
        await Client(app, token).respond(background=True, input=token[-8:])
    found = [await backend.received() for _ in range(2)]
    assert {each.body["messages"][0]["content"]: each.headers["authorization"] for each in found} == {
        token[-8:]: f"Bearer {token}" for token in (TOKEN, OTHER_TOKEN)
    }


@pytest.mark.parametrize(
    ("auth", "token"), [(PASSTHROUGH, TOKEN), (AUTH, ALICE)], ids=["token of passthrough", "key of keys"]
)
async def test_the_key_of_a_background_request_is_nowhere_in_the_store_or_the_log(
    start_app: StartApp, backend: Backend, place: Place, caplog: pytest.LogCaptureFixture, auth: Json, token: str
) -> None:
    caplog.set_level(logging.DEBUG)
    app = await start_app(auth=auth)
    backend.script(streamed("Hi"), refused(401, "no"), Script([chunk(content="Hel")], end="silent"))
    client = Client(app, token)
    last = ""
    for _ in range(3):
        last = (await client.respond(background=True))["id"]
        await backend.received()
        assert place.holding(token) == []
    await client.ask("POST", f"/v1/responses/{last}/cancel")
    assert (place.holding(token), place.holding(hashlib.sha256(token.encode()).hexdigest())) == ([], [])
    assert [record.msg for record in caplog.records if token in f"{record.getMessage()}{record.args}"] == []
