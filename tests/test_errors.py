"""Every exception's wire body, and the two vocabularies that clients read."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from openai.types.responses import ResponseError

import errors
import upstream_errors
from errors import ProxyError
from upstream_errors import UpstreamError, UpstreamRefused, UpstreamTimeout, WindowExceeded

# Known to clients, though not among the SDK's literals (client-needs: Codex shows its own message for each).
KNOWN_BESIDES = {"context_length_exceeded", "insufficient_quota", "server_is_overloaded"}


def leaves(root: type[ProxyError]) -> list[type[ProxyError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in leaves(child))]


def test_the_drawn_tree_is_the_tree() -> None:
    drawing = f"{errors.__doc__}\n{upstream_errors.__doc__}"
    drawn = re.findall(r"^[│├└─ ]*([A-Z]\w+) {2,}", drawing, re.MULTILINE)
    assert {leaf.__name__ for leaf in leaves(ProxyError)} == set(drawn)


@pytest.mark.parametrize(
    ("name", "status", "type_", "code"),
    [
        ("ProxyError", 500, "server_error", None),
        ("InvalidRequest", 400, "invalid_request_error", None),
        ("MissingParameter", 400, "invalid_request_error", "missing_required_parameter"),
        ("UnsupportedItem", 400, "invalid_request_error", "invalid_value"),
        ("UnsupportedParameter", 400, "invalid_request_error", "unsupported_parameter"),
        ("BodyTooLarge", 413, "invalid_request_error", "request_too_large"),
        ("Unauthorized", 401, "invalid_request_error", "invalid_api_key"),
        ("NotFound", 404, "invalid_request_error", None),
        ("MethodNotAllowed", 405, "invalid_request_error", None),
        ("UpstreamError", 502, "server_error", "upstream_error"),
        ("UpstreamUnreachable", 502, "server_error", "upstream_error"),
        ("UpstreamTimeout", 504, "server_error", "upstream_timeout"),
        ("UpstreamGarbled", 502, "server_error", "upstream_error"),
        ("UpstreamBroken", 502, "server_error", "upstream_error"),
        ("UpstreamBusy", 503, "server_error", "upstream_busy"),
        ("CircuitOpen", 503, "server_error", "upstream_unavailable"),
    ],
)
def test_each_class_has_its_status_and_its_body(name: str, status: int, type_: str, code: str | None) -> None:
    error = getattr(upstream_errors if hasattr(upstream_errors, name) else errors, name)("said", param="input")
    body = {"error": {"message": "said", "type": type_, "param": "input", "code": code}}
    assert (status, body) == (error.http_status, error.to_wire())


@pytest.mark.parametrize(
    ("status", "type_", "code"),
    [
        (400, "invalid_request_error", "upstream_error"),
        (401, "authentication_error", "upstream_error"),
        (403, "permission_error", "upstream_error"),
        (404, "invalid_request_error", "upstream_error"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (502, "server_error", "upstream_error"),
        (503, "server_error", "server_is_overloaded"),
    ],
)
def test_a_backends_refusal_keeps_its_status(status: int, type_: str, code: str) -> None:
    error = UpstreamRefused("said", status=status)
    found = error.to_wire()["error"]
    assert (status, type_, code) == (error.http_status, found["type"], found["code"])


def test_a_full_window_is_a_400_on_input() -> None:
    body = {"message": "m", "type": "invalid_request_error", "param": "input", "code": "context_length_exceeded"}
    assert {"error": body} == WindowExceeded("m").to_wire()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WindowExceeded("m"), "context_length_exceeded"),
        (UpstreamRefused("m", status=429), "rate_limit_exceeded"),
        (UpstreamRefused("m", status=429, code="insufficient_quota"), "insufficient_quota"),
        (UpstreamRefused("m", status=422), "invalid_prompt"),
        (UpstreamRefused("m", status=404, code="model_not_found"), "server_error"),
        (UpstreamTimeout("m"), "server_error"),
        (UpstreamError("m"), "server_error"),
    ],
)
def test_a_failed_response_says_a_code_that_clients_know(error: ProxyError, code: str) -> None:
    assert {"code": code, "message": "m"} == error.to_response_error()


def test_no_failed_response_can_say_a_code_that_clients_do_not_know() -> None:
    known = set(get_args(ResponseError.model_fields["code"].annotation)) | KNOWN_BESIDES
    said = {*errors.RESPONSE_ERROR_CODE_OF.values(), *errors.RESPONSE_ERROR_CODE_OF_STATUS.values(), "server_error"}
    assert set() == said - known
