"""What goes through to a backend as it is: which path, which headers, and where a body names its model.

May not do I/O, nor know a route of ours beyond its first word. Source: RFC 9110, sections 7.6.1 and 10.1.1; RFC 7578.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from errors import InvalidRequest, MethodNotAllowed, NotFound

Pair = tuple[bytes, bytes]

# -- paths -------------------------------------------------------------------------------------------------------------

PREFIX = b"/v1"
# What goes through without the prefix too, for clients whose base URL leaves it out.
WITHOUT_PREFIX = frozenset((b"/chat/completions", b"/completions", b"/embeddings", b"/rerank"))
# Those that keep nothing: it does no harm when two backends are asked. Each is told apart in what is counted.
ENDPOINTS = frozenset(path.decode() for path in WITHOUT_PREFIX) | {
    *("/audio/speech", "/audio/transcriptions", "/audio/translations"),
    *("/images/edits", "/images/generations", "/images/variations", "/moderations", "/score"),
}
# A backend's own would be about things that it does not have: what is stored is stored here.
OURS = frozenset((b"responses", b"conversations"))
# They are about the way to a server, and a tunnel through this one leads anywhere.
REFUSED_METHODS = frozenset(("CONNECT", "TRACE"))
DOTS = frozenset((b".", b".."))
SEPARATORS = re.compile(rb"[/\\]")
NOT_IN_PATH, NOT_IN_QUERY = re.compile(rb"[^\x21-\x7e]|[?#]"), re.compile(rb"[^\x21-\x7e]|#")
# How often a path may have been encoded before it is given up as one that hides something.
DECODED_TIMES = 3


@dataclass(frozen=True)
class PassthroughSettings:
    """The section `[passthrough]`; `paths` are globs, and every path begins with `/v1/` for them."""

    paths: tuple[str, ...] = ("/v1/*",)

    def __post_init__(self) -> None:
        for glob in self.paths:
            if not glob.startswith("/v1/"):
                raise ValueError(f"paths: expected globs that begin with '/v1/', got {glob!r}")


class Allowed:
    """Which paths go through."""

    def __init__(self, settings: PassthroughSettings) -> None:
        self._globs = [re.compile(translate(glob)) for glob in settings.paths]

    def check(self, target: str) -> None:
        """Raises: NotFound."""
        path = f"/v1{path_of(target)}"
        if not any(glob.match(path) for glob in self._globs):
            raise unknown_url()


def path_of(target: str) -> str:
    return target.partition("?")[0]


def keeps_nothing(method: str, target: str) -> bool:
    """Whether another backend may be asked too, be it that the first one has carried it out."""
    return method == "POST" and path_of(target) in ENDPOINTS


def template_of(target: str) -> str:
    """What stands for a path in what is counted: one of few, whatever a client has thought of."""
    path = path_of(target)
    return f"/v1{path}" if path in ENDPOINTS else "/v1/*"


def unknown_url() -> NotFound:
    return NotFound("Unknown request URL or method.")


def target_of(method: str, raw_path: bytes, query: bytes) -> str:
    """What to ask for below a backend's base URL. Raises: NotFound, MethodNotAllowed, InvalidRequest."""
    if method in REFUSED_METHODS:
        raise MethodNotAllowed(f"The method {method} does not go through.")
    path = raw_path if raw_path in WITHOUT_PREFIX else _without_prefix(raw_path)
    for segments in _readings(path):
        if not DOTS.isdisjoint(segments):
            raise InvalidRequest("The path must not have segments of dots.")
        if next(filter(None, segments), b"").lower() in OURS:
            raise unknown_url()
    return _escaped(NOT_IN_PATH, path) + (f"?{_escaped(NOT_IN_QUERY, query)}" if query else "")


def _without_prefix(raw_path: bytes) -> bytes:
    if not raw_path.startswith(PREFIX + b"/"):
        raise unknown_url()
    return raw_path.removeprefix(PREFIX)


def _readings(path: bytes) -> Iterable[list[bytes]]:
    """The segments of a path as servers may read it: decoded or not, cut at either slash, without parameters."""
    for _ in range(DECODED_TIMES + 1):
        yield [segment.partition(b";")[0] for segment in SEPARATORS.split(path)]
        before, path = path, unquote_to_bytes(path)
        if path == before:
            return
    raise InvalidRequest("The path is encoded too many times.")


def _escaped(unsafe: re.Pattern[bytes], text: bytes) -> str:
    return unsafe.sub(lambda found: b"%%%02X" % ord(found[0]), text).decode("ascii")


# -- headers -----------------------------------------------------------------------------------------------------------

# Headers between two neighbours, and with them all that begin with PROXY and all that `Connection` names.
HOP_BY_HOP = frozenset(
    (b"connection", b"http2-settings", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
PROXY = b"proxy-"
# What is written anew (the length), answered or judged here (Expect, the page that asks), or meant for this host and
# no other (cookies).
NOT_SENT = frozenset((b"content-length", b"cookie", b"expect", b"host", b"origin", b"referer"))
CREDENTIALS = frozenset((b"api-key", b"authorization", b"x-api-key", b"x-goog-api-key"))
# What the server writes itself, and what a backend says of its own host.
NOT_GIVEN = frozenset((b"alt-svc", b"date", b"set-cookie"))
# An answer carries the request id of this program; the backend's own is of use when its makers are asked.
RENAMED = {b"x-request-id": b"x-upstream-request-id"}
# What a header may consist of; a server that met anything else would break off the answer.
HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-zA-Z-]+")
HEADER_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
NO_LENGTH_OF_ITS_OWN = 304


def sent_headers(given: Iterable[Pair], *, with_credentials: bool) -> list[tuple[str, str]]:
    """A client's headers for a backend; names are lower case. Credentials are the client's for this program, or not."""
    given = list(given)
    left_out = NOT_SENT | _named_in_connection(given)
    if not with_credentials:
        left_out |= CREDENTIALS
    return [(name.decode("ascii"), _text(value)) for name, value in given if _is_end_to_end(name, left_out)]


def given_headers(status: int, told: Iterable[Pair], own: Iterable[Pair] = ()) -> list[Pair]:
    """A backend's headers for the client, but for those of which this program has its `own`."""
    pairs = [
        (name.lower(), value) for name, value in told if HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(value)
    ]
    left_out = NOT_GIVEN | _named_in_connection(pairs)
    # Of a 304 it is the length of what is not sent, of a chunked answer none at all.
    if status == NO_LENGTH_OF_ITS_OWN or any(name == b"transfer-encoding" for name, _ in pairs):
        left_out |= {b"content-length"}
    told_here = {name for name, _ in own}
    renamed = ((RENAMED.get(name, name), value) for name, value in pairs if _is_end_to_end(name, left_out))
    return [(name, value) for name, value in renamed if name not in told_here]


def _named_in_connection(pairs: list[Pair]) -> frozenset[bytes]:
    return frozenset(
        token.strip().lower() for name, value in pairs if name == b"connection" for token in value.split(b",")
    )


def _is_end_to_end(name: bytes, left_out: frozenset[bytes]) -> bool:
    return name not in HOP_BY_HOP and name not in left_out and not name.startswith(PROXY)


def _text(value: bytes) -> str:
    """The HTTP client writes headers as UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


# -- models ------------------------------------------------------------------------------------------------------------


class Named(msgspec.Struct):
    """All that is looked at of a JSON body."""

    model: Any = None


NAMED = msgspec.json.Decoder(Named)
FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
# A key and its colon; what stands behind a value.
KEY = re.compile(rb'[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
AFTER_VALUE = re.compile(rb"[ \t\r\n]*([,}])")
BOUNDARY = re.compile(r'^multipart/[^;]*;(?:.*;)?\s*boundary=(?:"([^"]+)"|([^;\s]+))', re.IGNORECASE)
PARAMETER = rb'[ \t]*;[ \t]*[^=;\s]+=(?:"(?:[^"\\\r\n]|\\.)*"|[^";\s][^;\s]*)'
MODEL_PART = re.compile(
    rb'^content-disposition[ \t]*:[ \t]*form-data(?:%b)*?[ \t]*;[ \t]*name=(?:"model"|model)[ \t]*(?:;|\r|$)'
    % PARAMETER,
    re.IGNORECASE | re.MULTILINE,
)
# How many parts of a form are looked at, and how far the headers of one may go.
FORM_PARTS, PART_HEADERS_BYTES = 1000, 8192


def model_in(raw: bytes, content_type: str) -> str | None:
    """The model that a body names, JSON or a form; None where it names none. Raises: InvalidRequest for two."""
    if boundary := _boundary(content_type):
        place = _place_in_form(raw, boundary)
        return raw[place].decode(errors="replace").strip() if place else None
    try:
        model = NAMED.decode(raw).model
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # the backend says what is wrong with it
        return None
    return model if isinstance(model, str) else None


def with_model(raw: bytes, content_type: str, model: str) -> bytes:
    """The same bytes with another model in them. Raises: InvalidRequest where a key stands twice."""
    if boundary := _boundary(content_type):
        place, value = _place_in_form(raw, boundary), model.encode()
    else:
        place, value = _place_in_json(raw), msgspec.json.encode(model)
    assert place is not None, "only called for a model that was found"
    return b"".join((memoryview(raw)[: place.start], value, memoryview(raw)[place.stop :]))


def _place_in_json(raw: bytes) -> slice:
    """Goes from key to key with the lengths of the values: of a key that stands twice, only one is known."""
    place: slice | None = None
    fields = FIELDS.decode(raw)
    at = raw.index(b"{") + 1
    for name, value in fields.items():
        key = KEY.match(raw, at)
        start = key.end() if key else at
        end = start + memoryview(value).nbytes
        after = AFTER_VALUE.match(raw, end)
        if key is None or after is None or msgspec.json.decode(key[1]) != name:
            raise _stands_twice()
        if name == "model":
            place = slice(start, end)
        at = after.end()
    if place is None or raw[at:].strip() or raw[place] != bytes(fields["model"]):
        raise _stands_twice()
    return place


def _stands_twice() -> InvalidRequest:
    return InvalidRequest("A key stands twice in the body, so its model cannot be replaced.", param="model")


def _boundary(content_type: str) -> bytes | None:
    found = BOUNDARY.match(content_type)
    return (found[1] or found[2]).encode("latin-1", "replace") if found else None


def _place_in_form(raw: bytes, boundary: bytes) -> slice | None:
    delimiter = b"\r\n--" + boundary
    places = []
    at = 0 if raw.startswith(delimiter[2:]) else raw.find(delimiter)
    for _ in range(FORM_PARTS):
        head_end = raw.find(b"\r\n\r\n", at) if at >= 0 else -1
        next_at = raw.find(delimiter, head_end + 2) if head_end >= 0 else -1
        if next_at < 0:
            break
        if head_end - at <= PART_HEADERS_BYTES and MODEL_PART.search(raw, at, head_end + 2):
            places.append(slice(head_end + 4, next_at))
        at = next_at
    if len(places) > 1:
        raise InvalidRequest("The form names more than one model.", param="model")
    return places[0] if places else None
