"""The exceptions as a drawn tree; each knows its wire body.

ProxyError                    500  server_error: anything that a client is told about
├── InvalidRequest            400  invalid_request_error: the request cannot be carried out as it stands
│   ├── MissingParameter           missing_required_parameter: a parameter that has to be there is not
│   ├── UnsupportedItem            invalid_value: an item, part, tool or choice of a type nobody here can render
│   ├── UnsupportedParameter       unsupported_parameter: it would change the answer and cannot be honoured
│   ├── BodyTooLarge          413  request_too_large: more than the settings allow
│   ├── Unauthorized          401  invalid_api_key: no key, or one that is not known
│   ├── ConversationLocked         conversation_locked: another turn is writing it
│   ├── NotFound              404  no such object for this owner, or no such route
│   ├── MethodNotAllowed      405  the route is there, the method is not
│   ├── StillRunning          409  what it needs is being answered; clients try again by themselves
│   ├── QueueFull             429  rate_limit_exceeded: too many responses wait already
│   ├── RateLimited           429  rate_limit_exceeded: its owner asks for more than the settings allow
│   └── ForeignOrigin         403  origin_not_allowed: a web page that is not welcome
├── StoreError                503  store_unavailable: nothing can be read from the store, or written to it, just now
│   ├── UnfinishedCopy             what a store holds is a part of another one: the copy into it has not ended
│   └── Unheard                    of a database: what was to be written may have been: postgres_errors.py
└── UpstreamError             502  the backend's fault, or the way to it: upstream_errors.py

Two vocabularies, those of the openai SDK: an HTTP error body, and `ResponseError` of a failed response.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

Json = dict[str, Any]

# Codes of HTTP errors -> `response.error.code`: the SDK's literals, and the three more that clients act on.
KEPT_CODES = "rate_limit_exceeded context_length_exceeded insufficient_quota server_is_overloaded invalid_image_url"
RESPONSE_ERROR_CODE_OF = {code: code for code in KEPT_CODES.split()} | {"invalid_base64": "invalid_base64_image"}
RESPONSE_ERROR_CODE_OF_STATUS = {429: "rate_limit_exceeded", **dict.fromkeys((400, 413, 422), "invalid_prompt")}


class ProxyError(Exception):
    """`status`, `type` and `code` are the class's unless given."""

    status: ClassVar[int] = 500
    type: str = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.http_status = self.status
        self.retry_after_s: float | None = None
        # What a log may hold of a message that quotes a client or a backend.
        self.log_message: str | None = None
        self.log_level = logging.WARNING

    @property
    def logged(self) -> str:
        """The message without anybody else's words."""
        return self.log_message or self.message

    def to_wire(self) -> Json:
        """The HTTP body: all four keys always present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.error_code}}

    def to_response_error(self) -> Json:
        """The `error` of a failed response; the code is one that clients know."""
        by_status = RESPONSE_ERROR_CODE_OF_STATUS.get(self.http_status, "server_error")
        return {"code": RESPONSE_ERROR_CODE_OF.get(self.error_code or "", by_status), "message": self.message}


class InvalidRequest(ProxyError):
    status, type = 400, "invalid_request_error"

    @property
    def logged(self) -> str:
        """Messages quote what was wrong."""
        return self.log_message or f"{type(self).__name__} {self.error_code or ''} '{self.param or ''}'"


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class UnsupportedItem(InvalidRequest):
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class BodyTooLarge(InvalidRequest):
    status, code = 413, "request_too_large"


class Unauthorized(InvalidRequest):
    status, code = 401, "invalid_api_key"


class ConversationLocked(InvalidRequest):
    code = "conversation_locked"


class NotFound(InvalidRequest):
    status = 404


class MethodNotAllowed(InvalidRequest):
    status = 405


class StillRunning(InvalidRequest):
    status = 409


class QueueFull(InvalidRequest):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class RateLimited(InvalidRequest):
    """`headers` say what is left, and until when."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    headers: list[tuple[bytes, bytes]]


class ForeignOrigin(InvalidRequest):
    status, type, code = 403, "permission_error", "origin_not_allowed"


class StoreError(ProxyError):
    """`is_passing`: it may be gone by itself after a while. `is_unsure`: what was to be written may have been."""

    status, code = 503, "store_unavailable"
    is_passing = False
    is_unsure = False


class UnfinishedCopy(StoreError):
    """`what`: the store, as messages name it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"a copy into {what} has not ended: run 'responses-proxy copy' with the same --from and --to again, or "
            "empty it"
        )
