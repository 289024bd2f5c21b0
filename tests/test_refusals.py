"""What a backend's error answer means: real bodies in, one of a few failures out."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from wire_reader import transcript

from refusals import error_fields, mend_for, raise_if_error, refusal, retry_after_s
from upstream_errors import UpstreamError, UpstreamRefused, WindowExceeded

Json = dict[str, Any]

VLLM_FULL = (
    "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 input tokens, "
    "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
)
LLAMACPP_FULL = "request (12030 tokens) exceeds the available context size (1024 tokens), try increasing it"
LATE_SYSTEM = "System message must be at the beginning."
NO_IMAGES = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
BAD_ARGUMENTS = "Failed to parse tool call arguments as JSON: [json.exception.parse_error.101] parse error at line 1"
GROQ_MINUTE = "Request too large for model `x` on tokens per minute (TPM): Limit 6000, Requested 8000, please reduce your message size and try again."  # noqa: E501


def nested(message: str, **fields: Any) -> Json:
    return {"error": {"message": message, **fields}}


# The bodies are those of tests/wire, edges.txt and, where no server was run, of the sources named in `refusals`.
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, nested(VLLM_FULL, type="BadRequestError", param="input_tokens", code=400)),
        (400, nested(LLAMACPP_FULL, type="exceed_context_size_error", code=400, n_prompt_tokens=12030, n_ctx=1024)),
        (400, nested(f"litellm.ContextWindowExceededError: OpenAIException - {LLAMACPP_FULL}", code="400")),
        (400, nested("This model's maximum context length is 128 tokens.", code="context_length_exceeded")),
        (400, nested("Please reduce the length of the messages or completion.", code="context_length_exceeded")),
        (400, {"object": "error", "message": VLLM_FULL, "code": 400}),
        (400, {"error": "Cannot truncate prompt with n_keep (4096) >= n_ctx (4096)"}),
        (400, nested("the input length exceeds the context length", type="invalid_request_error", code=None)),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"}),
        (400, [nested("The input token count (9) exceeds the maximum number of tokens allowed (8).", code=400)]),
        (400, nested("Provider returned error", code=400, metadata={"raw": VLLM_FULL, "provider_name": "x"})),
        (500, nested(LLAMACPP_FULL, type="server_error", code=500)),
    ],
)
def test_every_backends_sign_of_a_full_window_is_known(status: int, body: Any) -> None:
    assert isinstance(refusal(status, body, "local"), WindowExceeded)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, nested("max_tokens=50000 cannot be greater than max_model_len=1024.", param="max_tokens", code=400)),
        (413, nested(GROQ_MINUTE, type="tokens", code="rate_limit_exceeded")),
        (429, nested("Too many tokens: the maximum context length of your plan", code="rate_limit_exceeded")),
        (400, nested(LATE_SYSTEM, type="BadRequestError", param=None, code=400)),
    ],
)
def test_other_refusals_are_not_taken_for_a_full_window(status: int, body: Any) -> None:
    assert not isinstance(refusal(status, body, "local"), WindowExceeded)


def numbers(error: UpstreamError) -> tuple[int | None, int | None]:
    assert isinstance(error, WindowExceeded)
    return error.window_tokens, error.prompt_tokens


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llamacpp/ctx-overflow", (1024, 12030)),
        ("llamacpp/ctx-overflow-tokens", (1024, 2430)),
        ("vllm/ctx-overflow", (1024, None)),
        ("vllm/ctx-overflow-tokens", (1024, 1025)),
        ("litellm/ctx-overflow", (1024, 12030)),
        ("aimock/ctx-error", (128, None)),
    ],
)
def test_a_recorded_overflow_tells_the_window_and_the_prompt(name: str, told: tuple[int | None, int | None]) -> None:
    recorded = transcript(name)
    assert told == numbers(refusal(recorded.status, orjson.loads(recorded.body), "local"))


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, nested("Provider returned error", code=400, metadata={"raw": VLLM_FULL}), (1024, 1025)),
        (400, nested("Provider returned error", metadata={"raw": nested(LLAMACPP_FULL)}), (1024, 12030)),
        (400, {"object": "error", "message": VLLM_FULL, "code": 400}, (1024, 1025)),
        (400, [nested("The input token count (9) exceeds the maximum number of tokens allowed (8).")], (8, 9)),
        (422, {"error": "`inputs` must have less than 1024 tokens. Given: 1872"}, (1024, 1872)),
        (400, nested("Please reduce the length", code="context_length_exceeded", n_ctx=8), (8, None)),
    ],
)
def test_an_overflow_tells_its_numbers_in_every_shape_of_body(status: int, body: Any, told: tuple[int, int]) -> None:
    assert told == numbers(refusal(status, body, "local"))


@pytest.mark.parametrize(
    ("status", "body", "seen"),
    [
        (400, nested(LATE_SYSTEM, code=400), (400, "upstream_error", None)),
        (404, nested("No such model.", param="model", code=404), (404, "upstream_error", "model")),
        (404, nested("No such model.", code="model_not_found", param=None), (404, "model_not_found", None)),
        (400, nested("litellm.X", code="400"), (400, "upstream_error", None)),
        (429, nested("Rate limited", code="rate_limit_exceeded"), (429, "rate_limit_exceeded", None)),
        (429, nested("Pay", code="insufficient_quota"), (429, "insufficient_quota", None)),
        (503, {"error": "loading"}, (503, "server_is_overloaded", None)),
        (422, {"detail": "Unexpected fields in the request: {'x'}"}, (422, "upstream_error", None)),
        (500, "Internal Server Error", (502, "upstream_error", None)),
        (500, nested("boom", type="server_error"), (502, "upstream_error", None)),
        (500, nested(NO_IMAGES, code=500), (400, "upstream_error", None)),
        (500, nested(BAD_ARGUMENTS, code=500), (400, "upstream_error", None)),
        (504, "", (504, "upstream_error", None)),
        (301, "", (502, "upstream_error", None)),
        (400, nested("x", code=["a"], type={"b": 1}, param=5), (400, "upstream_error", None)),
    ],
)
def test_a_refusal_keeps_status_code_and_param_where_they_can_be_trusted(status: int, body: Any, seen: Any) -> None:
    error = refusal(status, body, "local")
    assert seen == (error.http_status, error.error_code, error.param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (nested("said", type="t"), "said"),
        ({"error": "said"}, "said"),
        ({"error": "said", "error_type": "validation"}, "said"),
        ({"object": "error", "message": "said"}, "said"),
        ({"object": "error", "message": {"detail": ["said"]}}, '{"detail":["said"]}'),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"msg": "said"}]}, '[{"msg":"said"}]'),
        ([nested("said", code=400)], "said"),
        ("Internal Server Error", "Internal Server Error"),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": "said"}}},
            "Provider returned error said",
        ),
        ({"error": {"code": 5}}, '{"code":5}'),
        ({"unknown": 1}, '{"unknown":1}'),
        ([], "{}"),
        (["said"], "said"),
        (None, ""),
    ],
)
def test_the_message_is_found_in_every_shape_of_error_body(body: Any, message: str) -> None:
    assert message.replace("{}", "") == error_fields(body)["message"].replace("{}", "")


def test_the_message_names_the_backend_and_its_status() -> None:
    assert refusal(404, nested("gone"), "local").message == "Upstream 'local' answered 404: gone"


def test_an_answer_without_a_word_is_told_by_its_status() -> None:
    assert refusal(403, "", "local").message == "Upstream 'local' answered 403."


@pytest.mark.parametrize(
    ("chunk", "status"),
    [
        ({"error": {"code": 429, "message": "Rate limited"}}, 429),
        ({"error": {"message": "late", "http_status_code": 422}}, 422),
        ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429),
        ({"error": {"message": "no credit", "code": "insufficient_quota"}}, 429),
        ({"error": {"message": "what", "code": "²"}}, 502),
        ({"error": "text"}, 502),
        ({"object": "error", "message": "old vLLM", "code": 400}, 400),
    ],
)
def test_an_error_inside_a_200_answer_is_raised_with_the_status_it_names(chunk: Json, status: int) -> None:
    with pytest.raises(UpstreamRefused) as caught:
        raise_if_error(chunk, "local")
    assert status == caught.value.http_status


@pytest.mark.parametrize(
    ("chunk", "told"),
    [
        ({"error": {"message": "too long", "code": "context_length_exceeded"}}, (None, None)),
        ({"error": "Cannot truncate prompt with n_keep (15028) >= n_ctx (7424)"}, (7424, 15028)),
        ({"error": {"code": 400, "message": "x", "type": "exceed_context_size_error", "n_ctx": 8}}, (8, None)),
        ({"object": "error", "message": VLLM_FULL, "code": 400}, (1024, 1025)),
    ],
)
def test_a_full_window_inside_a_200_answer_is_told_apart(chunk: Json, told: tuple[int | None, int | None]) -> None:
    with pytest.raises(WindowExceeded) as caught:
        raise_if_error(chunk, "local")
    assert told == numbers(caught.value)


def test_a_chunk_without_an_error_passes() -> None:
    raise_if_error({"error": None, "object": "chat.completion.chunk", "choices": []}, "local")


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3.0), ("0.5", 0.5), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("", None), ("²", None)]
)
def test_retry_after_is_read_in_seconds(value: str, seconds: float | None) -> None:
    assert seconds == retry_after_s({"Retry-After": value})


OPENAI_NAME = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
MISTRAL_NAME = (
    '[{"type":"extra_forbidden","loc":["body","max_completion_tokens"],"msg":"Extra inputs are not permitted"}]'
)
VLLM_STREAM = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"


@pytest.mark.parametrize(
    ("body", "message", "other"),
    [
        ({"n": 1, "max_tokens": 5}, OPENAI_NAME, {"n": 1, "max_completion_tokens": 5}),
        ({"max_completion_tokens": 5}, MISTRAL_NAME, {"max_tokens": 5}),
        ({"n": 1, "stream_options": {}}, VLLM_STREAM, {"n": 1}),
        ({"n": 1, "stream_options": {}}, "Unexpected fields in the request: {'stream_options'}", {"n": 1}),
        ({"n": 1}, OPENAI_NAME, None),
        ({"max_tokens": 5}, "max_tokens=50000 cannot be greater than max_model_len=1024.", None),
        ({"max_tokens": 5}, "Unknown model", None),
    ],
)
def test_a_refused_spelling_is_tried_in_the_other(body: Json, message: str, other: Json | None) -> None:
    mend = mend_for(body, refusal(400, nested(message), "local"))
    assert other == (mend and mend(body))


def test_only_a_400_or_422_is_mended() -> None:
    assert None is mend_for({"max_tokens": 5}, UpstreamError(OPENAI_NAME))
