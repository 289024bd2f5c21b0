"""docs/openapi.json says what the routes take and answer, and schemathesis finds nothing else.

OPENAPI_CASES=2000 makes the search longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from conftest import ROOT, StartApp
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckContext, CheckFunction, load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks

from edge import MODEL_PATHS, Edge, direct_routes, routes
from request import CODE_OF

Json = dict[str, Any]
DOCUMENT: Json = json.loads((ROOT / "docs" / "openapi.json").read_text())
BARE = {"/healthz", "/metrics", "/readyz"}
MODELS = {prefix + path for prefix in ("/v1", "") for path in MODEL_PATHS}
OPERATIONS = [
    f"{method.upper()} {path}" for path, place in DOCUMENT["paths"].items() for method in place if method != "servers"
]
# Other methods than POST are those of `/responses/{id}` there: these are ids to it.
ALSO_IDS, BY_ID = {"/responses/compact", "/responses/input_tokens"}, {"GET", "DELETE", "OPTIONS"}
# Any answer of a backend will do there, and another method goes through.
PASSED = {f"POST {path}" for path in ("/chat/completions", "/completions", "/embeddings", "/rerank")}
CASES = int(os.environ.get("OPENAPI_CASES", "0"))
# How many cases a route is tried with that schemathesis thinks of, and how many that it draws, of each mode.
THOUGHT_OF, DRAWN = CASES or 80, CASES or 10


def test_the_document_is_valid() -> None:
    validate(DOCUMENT)


def test_the_document_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "openapi.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stale_document_is_noticed(tmp_path: Path) -> None:
    copied = [path.name for path in ROOT.glob("*.py")] + ["pyproject.toml", "docs/openapi.py", "docs/routes.md"]
    (tmp_path / "docs").mkdir()
    for name in copied:
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "docs" / "openapi.json").write_text("{}")
    command = [sys.executable, str(tmp_path / "docs" / "openapi.py")]
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert json.loads((tmp_path / "docs" / "openapi.json").read_text()) == DOCUMENT


def test_the_document_has_the_routes_of_the_application() -> None:
    edge = object.__new__(Edge)
    found = {(method, route.path) for route in routes(edge) for method in (route.methods or {"GET"}) - {"HEAD"}}
    found |= direct_routes(edge).keys()
    found -= {(method, path) for method, path in found if path in MODELS and method != "GET"}  # these go through
    found = {(method, path.replace("{model:path}", "{id}")) for method, path in found}
    places = [(method, path) for method, path in map(str.split, OPERATIONS)]
    prefixes = {path: ("",) if path in BARE else ("/v1", "") for _, path in places}
    assert found == {(method, prefix + path) for method, path in places for prefix in prefixes[path]}


# -- what schemathesis finds -------------------------------------------------------------------------------------------

# Codes of what a schema can say. What the others are about is known only when things are looked up or tied together.
ABOUT_SHAPE = {*CODE_OF.values(), "invalid_type", "unknown_parameter"} - {"invalid_value"}


def refused_for_what_it_refers_to(context: CheckContext, response: Any, case: Case) -> None:
    """What the schemas allow may be refused, but not for its shape."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    is_whole_float = "got `float`" in error["message"]  # an integer of JSON Schema, and none of the API's
    assert error["code"] not in ABOUT_SHAPE or is_whole_float, error


CHECKS: list[CheckFunction] = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    refused_for_what_it_refers_to,
]


# Of routes that go through: what the proxy is answerable for.
PASSED_CHECKS = [not_a_server_error, checks.response_headers_conformance]


def checks_of(label: str) -> list[CheckFunction]:
    if label in PASSED:
        return PASSED_CHECKS
    goes_through = label.startswith("GET /models")  # with any other method
    return [check for check in CHECKS if not (goes_through and check is checks.unsupported_method)]


def about(response_id: str, conversation_id: str) -> Json:
    """The document about objects that exist, of a backend that refuses nothing, and with each event by itself."""
    known = json.loads(json.dumps(DOCUMENT))
    schemas = known["components"]["schemas"]
    for name in ("CreateResponse", "Compact", "CountInputTokens"):
        text = json.dumps(schemas[name]).replace('"pattern": "^resp"', f'"const": "{response_id}"')
        schemas[name] = json.loads(text.replace('"pattern": "^conv_"', f'"const": "{conversation_id}"'))
    schemas["Events"] = {"type": "object", "required": ["data"]}
    ids = {"responses": response_id, "conversations": conversation_id, "models": "m"}
    for path, place in known["paths"].items():
        for operation in place.values():
            if isinstance(operation, dict):
                operation["responses"].pop("4XX", None)
                _know(operation, {"id": ids.get(path.split("/")[1], ""), "item": "msg_1"})
    return known


def _know(operation: Json, ids: dict[str, str]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["schema"] = {"enum": [ids[parameter["name"]], "unknown", "\0", "\U0001f600"]}


def thought_of(operation: Any) -> list[Case]:
    """Cases at the bounds of the schemas, spread evenly over all there are."""
    schema = operation.schema
    generation = schema.config.generation_for(operation=operation)
    found = schema.iter_coverage_cases(operation, generation_modes=list(GenerationMode), generation_config=generation)
    cases = [case for case in found if case.path not in ALSO_IDS or case.method not in BY_ID]
    return cases[:: max(1, len(cases) // THOUGHT_OF)]


class Search:
    """Sends cases to one route of a running proxy, and holds each answer against the document."""

    def __init__(self, url: str, label: str) -> None:
        load_all_checks()
        self._url = url
        self._session = requests.Session()
        method, path = label.split()
        self._checks = checks_of(label)
        self._base_url = url if path in BARE else f"{url}/v1"
        self.operation = schemathesis.openapi.from_dict(about(*self._made()))[path][method]

    def _made(self) -> tuple[str, str]:
        """The ids of a response and a conversation."""
        response = self._session.post(f"{self._url}/v1/responses", json={"model": "m", "input": "Hi"})
        item = {"role": "user", "content": "Hi", "id": "msg_1"}
        conversation = self._session.post(f"{self._url}/v1/conversations", json={"items": [item]})
        return response.json()["id"], conversation.json()["id"]

    def at_the_bounds(self) -> None:
        for case in thought_of(self.operation):
            self._try(case)

    def at_random(self, mode: GenerationMode) -> None:
        @settings(
            max_examples=DRAWN,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(self.operation.as_strategy(generation_mode=mode))
        def search(case: Case) -> None:
            self._try(case)

        search()

    def _try(self, case: Case) -> None:
        case.call_and_validate(self._base_url, self._session, checks=self._checks, timeout=10)

    def all(self) -> None:
        with self._session:
            self.at_the_bounds()
            self.at_random(GenerationMode.POSITIVE)
            if self._can_be_wrong():
                self.at_random(GenerationMode.NEGATIVE)

    def _can_be_wrong(self) -> bool:
        return bool(self.operation.body or self.operation.query or self.operation.headers)


@pytest.mark.parametrize("label", OPERATIONS)
async def test_a_route_answers_as_documented(start_app: StartApp, label: str) -> None:
    app = await start_app()
    await asyncio.to_thread(lambda: Search(app.url, label).all())
