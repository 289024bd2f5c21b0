"""What a backend's refusal means: every error body seen, one tree of failures, and what may be tried once more.

May not do I/O. Source: tests/wire, and the backends' own sources where a table names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from overflows import overflow_of
from upstream_errors import UpstreamError, UpstreamRefused, WindowExceeded

Json = dict[str, Any]

# Faults of a request that llama.cpp answers with a 500 (tests/wire/edges.txt).
CLIENT_FAULT_TEXT = re.compile(
    r"image input is not supported|Failed to parse tool|not a multimodal model|audio input is not supported"
)
# Statuses that say "later", and not "never".
LATER = frozenset({429, 503, 529})
NEVER_LATER_CODES = frozenset({"insufficient_quota"})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode() if value else ""


def error_fields(body: Any) -> Json:
    """`message`, `type`, `code` and `param` out of every error body seen.

    Source: a list around it (Gemini), nested (OpenAI, llama.cpp, vLLM), text (transformers, Ollama), top level
    (SGLang, old vLLM), `detail` (FastAPI), `metadata.raw` (OpenRouter).
    """
    if isinstance(body, list):
        body = body[0] if body else {}
    if not isinstance(body, dict):
        return {"message": _text(body)}
    inner = body.get("error")
    if isinstance(inner, dict):
        raw = (inner.get("metadata") or {}).get("raw") if isinstance(inner.get("metadata"), dict) else None
        message = " ".join(_text(part) for part in (inner.get("message"), raw) if part)
        return {**inner, "message": message or _text(inner)}
    return {**body, "message": _text(inner or body.get("message") or body.get("detail") or body)}


def refusal(status: int, body: Any, where: str) -> UpstreamError:
    """The failure that an error answer of a backend stands for."""
    fields = error_fields(body)
    fields["message"] = message = fields["message"][:2000]
    said = f"Upstream '{where}' answered {status}: {message}" if message else f"Upstream '{where}' answered {status}."
    error = _refused(status, said, fields)
    error.log_message = f"Upstream '{where}' answered {status}."
    return error


def _refused(status: int, said: str, fields: Json) -> UpstreamRefused:
    message = fields["message"]
    if status in (400, 413, 422, 500) and (full := overflow_of(fields)):
        return WindowExceeded(said, window_tokens=full.window_tokens, prompt_tokens=full.prompt_tokens)
    if status == 500 and CLIENT_FAULT_TEXT.search(message):
        status = 400
    elif status < 400 or (status >= 500 and status not in LATER and status != 504):
        status = 502
    param, code = fields.get("param"), str(fields.get("code"))
    return UpstreamRefused(
        said,
        status=status,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(fields.get("code"), str) and not code.isdigit() else None,
    )


def _error_status(fields: Json) -> int:
    """The status that an error inside a 200 answer names."""
    for key in ("code", "http_status_code", "status"):
        value = fields.get(key)
        if isinstance(value, int | str) and str(value).isdecimal() and 400 <= int(value) <= 599:
            return int(value)
    named = {"rate_limit_exceeded": 429, "insufficient_quota": 429, "context_length_exceeded": 400}
    return named.get(str(fields.get("code")), 500)


def raise_if_error(chunk: Json, where: str) -> None:
    """Raises what an error object inside an answer stands for."""
    if chunk.get("error") or chunk.get("object") == "error":
        raise refusal(_error_status(error_fields(chunk)), chunk, where)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds that a `Retry-After` header asks for; its date form is not read."""
    value = headers.get("Retry-After", "")
    return float(value) if value.replace(".", "", 1).isdecimal() else None


# -- another spelling --------------------------------------------------------------------------------------------------

UNKNOWN_WORDS = (
    r"unsupported|not supported|unknown|unexpected|unrecognized|not permitted|extra|forbidden|only be defined"
)


def _rename_max_tokens(body: Json) -> Json:
    old, new = ("max_tokens", "max_completion_tokens")
    if old not in body:
        old, new = new, old
    return {new if key == old else key: value for key, value in body.items()}


def _drop_stream_options(body: Json) -> Json:
    return {key: value for key, value in body.items() if key != "stream_options"}


# What a 400 or 422 may say of a field, and the body to try once more with.
Mend = Callable[[Json], Json]
MENDS: tuple[tuple[re.Pattern[str], str, Mend], ...] = (
    (
        re.compile(
            rf"max(_completion)?_tokens.*({UNKNOWN_WORDS})|({UNKNOWN_WORDS}).*max(_completion)?_tokens", re.I | re.S
        ),
        "max",
        _rename_max_tokens,
    ),
    (
        re.compile(rf"stream_options.*({UNKNOWN_WORDS})|({UNKNOWN_WORDS}).*stream_options", re.I | re.S),
        "stream_options",
        _drop_stream_options,
    ),
)


def mend_for(body: Json, error: UpstreamError) -> Mend | None:
    """What turns the body into the other spelling, when the refusal names a field that backends spell differently."""
    if error.http_status not in (400, 422):
        return None
    for pattern, prefix, mend in MENDS:
        if pattern.search(error.message) and any(key.startswith(prefix) for key in body):
            return mend
    return None
