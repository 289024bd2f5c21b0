"""The exceptions as a drawn tree; each knows its wire body.

ProxyError                    500  server_error
├── InvalidRequest            400  invalid_request_error
│   ├── MissingParameter           missing_required_parameter
│   ├── UnsupportedItem            invalid_value: a type nobody here can render
│   ├── UnsupportedParameter       unsupported_parameter
│   └── BodyTooLarge          413
├── Unauthorized              401  invalid_api_key
├── NotFound                  404
├── MethodNotAllowed          405
└── UpstreamError             502  the backend's fault, or the way to it
    ├── UpstreamUnreachable   502
    ├── UpstreamTimeout       504
    ├── UpstreamGarbled       502  it answered, but not with chat completions
    ├── UpstreamBroken        502  a stream that ended too early
    ├── UpstreamRefused       its own status
    └── WindowExceeded        400  context_length_exceeded

Two vocabularies: the HTTP error body (`to_wire`) and `response.error` of a failed response (`to_response_error`).
Source: OpenAI error envelope and ResponseError.code of the openai SDK, read 2026-11-20.
"""

from __future__ import annotations

from typing import Any, ClassVar

Json = dict[str, Any]

# Codes of HTTP errors -> `response.error.code`: the SDK's literals, and the three more that clients act on.
RESPONSE_ERROR_CODE_OF = {
    "rate_limit_exceeded": "rate_limit_exceeded",
    "context_length_exceeded": "context_length_exceeded",
    "insufficient_quota": "insufficient_quota",
    "server_is_overloaded": "server_is_overloaded",
    "invalid_base64": "invalid_base64_image",
    "invalid_image_url": "invalid_image_url",
}


class ProxyError(Exception):
    """Anything that a client is told about; `status`, `type` and `code` are the class's unless given."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.http_status = self.status
        self.retry_after_s: float | None = None

    def to_wire(self) -> Json:
        """The HTTP body: all four keys always present."""
        body = {"message": self.message, "type": self.type, "param": self.param, "code": self.error_code}
        return {"error": body}

    def to_response_error(self) -> Json:
        """The `error` of a failed response; the code is one that clients know."""
        by_status = {429: "rate_limit_exceeded", 400: "invalid_prompt", 413: "invalid_prompt", 422: "invalid_prompt"}
        code = RESPONSE_ERROR_CODE_OF.get(self.error_code or "") or by_status.get(self.http_status, "server_error")
        return {"code": code, "message": self.message}


class InvalidRequest(ProxyError):
    """The client's request cannot be carried out as it stands."""

    status = 400
    type = "invalid_request_error"


class MissingParameter(InvalidRequest):
    """A parameter that has to be there is not."""

    code = "missing_required_parameter"


class UnsupportedItem(InvalidRequest):
    """An item, part, tool or tool choice of a type that nobody here can render."""

    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A parameter that would change the answer and that cannot be honoured."""

    code = "unsupported_parameter"


class BodyTooLarge(InvalidRequest):
    """The request is larger than the limit in the settings."""

    status = 413
    code = "request_too_large"


class Unauthorized(ProxyError):
    """No key, or one that is not known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(ProxyError):
    """No such object for this owner, or no such route."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ProxyError):
    """The route is there, the method is not."""

    status = 405
    type = "invalid_request_error"


class UpstreamError(ProxyError):
    """The backend failed, or the way to it."""

    status = 502
    type = "server_error"
    code = "upstream_error"


class UpstreamUnreachable(UpstreamError):
    """No connection could be made."""


class UpstreamTimeout(UpstreamError):
    """The backend said nothing for longer than the settings allow."""

    status = 504
    code = "upstream_timeout"


class UpstreamGarbled(UpstreamError):
    """The backend answered with something that is not a chat completion."""


class UpstreamBroken(UpstreamError):
    """The stream ended before the backend said that it had finished."""


REFUSAL_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REFUSAL_CODES = {429: "rate_limit_exceeded", 503: "server_is_overloaded", 529: "server_is_overloaded"}


class UpstreamRefused(UpstreamError):
    """The backend answered with an error of its own; its status is kept."""

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code or REFUSAL_CODES.get(status))
        self.http_status = status

    def to_wire(self) -> Json:
        default = "invalid_request_error" if self.http_status < 500 else "server_error"
        body = super().to_wire()
        body["error"]["type"] = REFUSAL_TYPES.get(self.http_status, default)
        return body


class WindowExceeded(UpstreamRefused):
    """The rendered input is larger than the model's window."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=400, param="input", code="context_length_exceeded")
