"""The branch of the tree of exceptions that is the backend's fault, or that of the way to it.

UpstreamError                 502  the backend's fault, or the way to it
├── UpstreamUnreachable   502
├── UpstreamTimeout       504
├── UpstreamGarbled       502  it answered, but not with chat completions
├── UpstreamBroken        502  a stream that ended too early
├── UpstreamBusy          503  it was not asked: enough others wait for it; in streams a `server_error`, for clients
│                              (Codex) take `server_is_overloaded` and every 429 for final
├── CircuitOpen           503  it was not asked: it has failed too often just now
└── UpstreamRefused            an error of its own, with its own status
    └── WindowExceeded    400  context_length_exceeded: the input is larger than the model's window
"""

from __future__ import annotations

from errors import ProxyError


class UpstreamError(ProxyError):
    status, code = 502, "upstream_error"


class UpstreamUnreachable(UpstreamError):
    """No connection could be made."""


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class UpstreamGarbled(UpstreamError):
    """The backend answered with something that is not a chat completion."""


class UpstreamBroken(UpstreamError):
    """The stream ended before the backend said that it had finished."""


class UpstreamBusy(UpstreamError):
    status, code = 503, "upstream_busy"


class CircuitOpen(UpstreamError):
    status, code = 503, "upstream_unavailable"


REFUSAL_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
REFUSAL_CODES = {429: "rate_limit_exceeded", 503: "server_is_overloaded", 529: "server_is_overloaded"}


class UpstreamRefused(UpstreamError):
    """The backend answered with an error of its own; its status is kept."""

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code or REFUSAL_CODES.get(status))
        self.http_status = status
        self.type = REFUSAL_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


class WindowExceeded(UpstreamRefused):
    """The window and the prompt are what the backend told of them; the prompt is at least that large."""

    def __init__(self, message: str, *, window_tokens: int | None = None, prompt_tokens: int | None = None) -> None:
        super().__init__(message, status=400, param="input", code="context_length_exceeded")
        self.window_tokens, self.prompt_tokens = window_tokens, prompt_tokens
