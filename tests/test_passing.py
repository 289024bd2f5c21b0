"""What goes through: paths that stay below a base URL, headers that are for a backend, and the model in a body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InvalidRequest, MethodNotAllowed, NotFound
from passing import given_headers, model_in, sent_headers, target_of, with_model

JSON = "application/json"
FORM = "multipart/form-data; boundary=cut"


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_path", "query", "target"),
    [
        (b"/v1/chat/completions", b"", "/chat/completions"),
        (b"/chat/completions", b"", "/chat/completions"),
        (b"/completions", b"a=1", "/completions?a=1"),
        (b"/embeddings", b"", "/embeddings"),
        (b"/rerank", b"", "/rerank"),
        (b"/v1/files/file-1/content", b"a=1&b=%2F&b=..", "/files/file-1/content?a=1&b=%2F&b=.."),
        (b"/v1/models/meta-llama%2FLlama-3", b"", "/models/meta-llama%2FLlama-3"),
        (b"/v1//evil.example/x", b"", "//evil.example/x"),
        (b"/v1/http://evil.example/x", b"", "/http://evil.example/x"),
        (b"/v1/@evil.example", b"", "/@evil.example"),
        (b"/v1/", b"", "/"),
        (b"/v1/a..b/...", b"", "/a..b/..."),
        (b"/v1/caf\xc3\xa9 #?", b"q=\xff#?", "/caf%C3%A9%20%23%3F?q=%FF%23?"),
        (b"/v1/responsesque", b"", "/responsesque"),
    ],
)
def test_a_target_is_what_stands_behind_the_prefix(raw_path: bytes, query: bytes, target: str) -> None:
    assert target_of("GET", raw_path, query) == target


@pytest.mark.parametrize(
    "path",
    [
        *("..", "a/..", "a/../b", "../../etc", ".", "a/./b", "..;/b", "..;x=1/b"),
        *("%2e%2e/b", "%2E%2E", ".%2e/b", "%2e/b", "a%2f..%2fb", "..%2fb", "..\\b", "..%5cb", "a%5c..%5cb"),
        *("%252e%252e/b", "..%252fb", "%25252e%25252e/b", "%2525252e"),
    ],
)
def test_no_spelling_of_dots_goes_through(path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        target_of("GET", b"/v1/" + path.encode(), b"")
    assert caught.value.http_status == 400


@pytest.mark.parametrize("path", ["/", "/v1", "/files", "/v2/files", "/%76%31/files", "//v1/files", "/admin", "*", ""])
def test_what_has_no_prefix_is_no_route(path: str) -> None:
    with pytest.raises(NotFound):
        target_of("GET", path.encode(), b"")


@pytest.mark.parametrize(
    "path",
    [
        *("responses", "responses/", "responses/x/y", "conversations", "conversations/x/y/z", "Responses/x"),
        *("/responses", "//conversations", "%72esponses", "responses%2fx", "responses;a=b/x", "%5cresponses"),
    ],
)
def test_stored_objects_are_never_asked_of_a_backend(path: str) -> None:
    with pytest.raises(NotFound):
        target_of("GET", b"/v1/" + path.encode(), b"")


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
def test_methods_about_the_way_itself_are_refused(method: str) -> None:
    with pytest.raises(MethodNotAllowed):
        target_of(method, b"/v1/files", b"")


# -- headers -----------------------------------------------------------------------------------------------------------


def test_headers_between_neighbours_stay_behind() -> None:
    pairs = [
        (b"connection", b"close, X-Mine"),
        (b"x-mine", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"te", b"trailers"),
        (b"trailer", b"x"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"http2-settings", b"x"),
        (b"proxy-authorization", b"Basic eA=="),
        (b"proxy-connection", b"close"),
        (b"x-yours", b"2"),
    ]
    assert sent_headers(pairs, with_credentials=True) == [("x-yours", "2")]
    assert given_headers(200, pairs) == [(b"x-yours", b"2")]


def test_what_is_for_this_host_is_not_sent_on() -> None:
    pairs = [(b"host", b"h"), (b"content-length", b"3"), (b"expect", b"100-continue"), (b"cookie", b"a=b")]
    pairs += [(b"origin", b"https://page.example"), (b"referer", b"https://page.example/chat")]
    assert sent_headers(pairs, with_credentials=True) == []


def test_credentials_go_on_only_where_they_are_the_backends() -> None:
    pairs = [(name, b"s") for name in (b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key")]
    assert sent_headers([*pairs, (b"openai-project", b"p")], with_credentials=False) == [("openai-project", "p")]
    assert len(sent_headers(pairs, with_credentials=True)) == 4


def test_headers_keep_their_order_and_repetitions_and_bytes() -> None:
    pairs = [(b"x-a", b"1"), (b"accept-encoding", b"gzip"), (b"x-a", b"2"), (b"x-b", "é".encode()), (b"x-c", b"\xff")]
    expected = [("x-a", "1"), ("accept-encoding", "gzip"), ("x-a", "2"), ("x-b", "é"), ("x-c", "ÿ")]
    assert sent_headers(pairs, with_credentials=False) == expected


def test_an_answer_loses_what_this_server_says_itself() -> None:
    told = [(b"Date", b"x"), (b"Set-Cookie", b"a=b"), (b"Alt-Svc", b"h3"), (b"X-Request-Id", b"r"), (b"X-B", b"\xff")]
    assert given_headers(200, told) == [(b"x-upstream-request-id", b"r"), (b"x-b", b"\xff")]


def test_a_header_that_would_break_the_answer_is_left_out() -> None:
    assert given_headers(200, [(b"x-a", b"a\x01b"), (b"x(b)", b"1"), (b"x-c", b"a\tb")]) == [(b"x-c", b"a\tb")]


@pytest.mark.parametrize(
    ("status", "told", "lengths"),
    [
        (200, [(b"Content-Length", b"5")], 1),
        (304, [(b"Content-Length", b"5")], 0),
        (200, [(b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")], 0),
    ],
)
def test_a_length_is_given_where_it_is_that_of_the_body(status: int, told: Any, lengths: int) -> None:
    assert len(given_headers(status, told)) == lengths


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"model"', b'{"model":5}', b'{"model":null}', b'{"x":{"model":"m"}}', b"\xff"],
)
def test_a_body_without_a_model_names_none(raw: bytes) -> None:
    assert model_in(raw, JSON) is None


def test_a_body_nested_without_end_names_none() -> None:
    assert model_in(b'{"x":' + b"[" * 100_000, JSON) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b/c"}'),
        (b' {\n "x" : {"model": "a"},\t"model" : "a" , "y":[1, 2.50e1] } \n', None),
        (rb'{"mod\u0065l":"a","x":"\"model\":\"a\""}', rb'{"mod\u0065l":"b/c","x":"\"model\":\"a\""}'),
        (
            rb'{"\"":1,"model":"\u0061","z":12345678901234567890123}',
            rb'{"\"":1,"model":"b/c","z":12345678901234567890123}',
        ),
    ],
)
def test_only_the_bytes_of_the_model_are_replaced(raw: bytes, expected: bytes | None) -> None:
    assert model_in(raw, JSON) == "a"
    expected = expected or raw.replace(b'"model" : "a"', b'"model" : "b/c"')
    assert with_model(raw, JSON, "b/c") == expected


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"b","model":"a"}',
        b'{"model":"a","x":1,"model":"a"}',
        b'{"x":[1,2,3],"model":"a","x":1}',
        b'{"x":1,"model":"a","x":[1,2,3]}',
        b'{"x":1,"x":1,"model":"a"}',
    ],
)
def test_a_key_that_stands_twice_is_refused_where_the_model_is_replaced(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="twice"):
        with_model(raw, JSON, "b")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=5), st.text(), st.text(), st.sampled_from([None, 1]), st.booleans())
def test_any_object_keeps_all_but_its_model(
    body: dict[str, Any], model: str, name: str, indent: int | None, is_ascii: bool
) -> None:
    whole = {**body, "model": model}
    raw = json.dumps(whole, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "replace")
    assert json.loads(with_model(raw, JSON, name.encode("utf-8", "replace").decode())) == {
        **json.loads(raw),
        "model": name.encode("utf-8", "replace").decode(),
    }


def part(disposition: str, body: bytes, *more: str) -> bytes:
    lines = [f"Content-Disposition: form-data; {disposition}", *more, "", ""]
    return b"--cut\r\n" + "\r\n".join(lines).encode() + body + b"\r\n"


FILE = part('name="file"; filename="model; name=model.wav"', b"RIFF\x00model\r\n--cu", "Content-Type: audio/wav")
END = b"--cut--\r\n"


@pytest.mark.parametrize(
    "disposition", ['name="model"', "name=model", 'name="model"; charset=utf-8', 'x="a;b"; name="model"']
)
def test_a_form_names_its_model_and_only_that_is_replaced(disposition: str) -> None:
    raw = b"preamble\r\n" + FILE + part(disposition, b"whisper") + part('name="language"', b"whisper") + END
    assert model_in(raw, FORM) == "whisper"
    assert with_model(raw, FORM, "large/v3") == raw.replace(b"whisper", b"large/v3", 1)


@pytest.mark.parametrize(
    "raw",
    [b"", END, b"--cut", FILE + END, FILE, b"--cut\r\nno end", part('name="model"', b"cut off").removesuffix(b"\r\n")],
)
def test_a_form_without_a_whole_model_names_none(raw: bytes) -> None:
    assert model_in(raw, FORM) is None


def test_the_boundary_may_be_quoted() -> None:
    raw = part('name="model"', b"m") + END
    assert model_in(raw, 'Multipart/Form-Data; charset=utf-8; boundary="cut"') == "m"


def test_two_models_in_a_form_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than one"):
        model_in(part('name="model"', b"a") * 2 + END, FORM)


def test_a_form_of_very_many_parts_is_not_looked_at_to_its_end() -> None:
    raw = part('name="x"', b"") * 2000 + part('name="model"', b"m") + END
    assert model_in(raw, FORM) is None
