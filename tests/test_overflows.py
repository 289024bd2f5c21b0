"""What the overflows of backends say: real words in, the window and the size of the prompt out."""

from __future__ import annotations

from typing import Any

import pytest

from overflows import Overflow, overflow_of

Json = dict[str, Any]


# The words are those of tests/wire and of the threads and sources that overflows.py names.
@pytest.mark.parametrize(
    ("said", "window", "prompt"),
    [
        (
            "This model's maximum context length is 131072 tokens. However, you requested 131134 tokens (122942 in the "
            "messages, 8192 in the completion). Please reduce the length of the messages or completion.",
            131072,
            122942,
        ),
        (
            "This model's maximum context length is 4097 tokens, however you requested 4162 tokens (1090 in your "
            "prompt; 3072 for the completion). Please reduce your prompt; or completion length.",
            4097,
            1090,
        ),
        (
            "This endpoint's maximum context length is 131072 tokens. However, you requested about 141607 tokens "
            "(10535 of text input, 131072 in the output). Please reduce the length of either one",
            131072,
            10535,
        ),
        (
            "This endpoint's maximum context length is 128000 tokens. However, you requested about 132888 tokens "
            "(132733 of text input, 155 of tool input). Please reduce the length of either one, or use",
            128000,
            132888,
        ),
        (
            "This model's maximum context length is 128000 tokens. However, your messages resulted in 173172 tokens. "
            "Please reduce the length of the messages.",
            128000,
            173172,
        ),
        (
            "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 509178 tokens.",
            272000,
            509178,
        ),
        ("Input tokens exceed the configured limit of 922000 tokens", 922000, None),
        (
            "This model's maximum context length is 16384 tokens. However, you requested 17000 tokens in the messages, "
            "Please reduce the length of the messages.",
            16384,
            17000,
        ),
        (
            "This model's maximum context length is 8192 tokens. However, you requested 64 output tokens and your "
            "prompt contains 10000 input tokens, for a total of 10064 tokens. Please reduce the length",
            8192,
            10000,
        ),
        (
            "This model's maximum context length is 202752 tokens. However, you requested 64000 output tokens and your "
            "prompt contains at least 138753 input tokens, for a total of at least 202753 tokens. Please reduce",
            202752,
            138753,
        ),
        (
            "This model's maximum context length is 8192 tokens. However, your request has 9000 input tokens. Please",
            8192,
            9000,
        ),
        ("this model's maximum context length is 8192 tokens, but the prompt contains 9000 input tokens", 8192, 9000),
        (
            "This model's maximum context length is 1024 tokens. However, your prompt contains 30108 characters (more "
            "than 28672 characters, which is the upper bound for 1024 input tokens). Please reduce the length",
            1024,
            None,
        ),
        (
            "You passed 1025 input tokens and requested 4 output tokens. However, the model's context length is only "
            "1024 tokens, resulting in a maximum input length of 1020 tokens. Please reduce the length",
            1024,
            1025,
        ),
        (
            "You passed 30108 input characters and requested 4 output tokens. However, the model's context length is "
            "only 1024 tokens, resulting in a maximum input length of 1020 tokens (at most 28560 characters).",
            1024,
            None,
        ),
        ("The decoder prompt (length 2430) is longer than the maximum model length of 1024. Make sure", 1024, 2430),
        (
            "Requested token count exceeds the model's maximum context length of 131072 tokens. You requested a total "
            "of 254837 tokens: 123765 tokens from the input messages and 131072 tokens for the completion. Please",
            131072,
            123765,
        ),
        (
            "The input (516368 tokens) is longer than the model's context length (262144 tokens).",
            262144,
            516368,
        ),
        ("Input length (9000 tokens) exceeds the maximum allowed length (8186 tokens). Use a shorter", 8186, 9000),
        ("request (12030 tokens) exceeds the available context size (1024 tokens), try increasing it", 1024, 12030),
        ("input (12030 tokens) is larger than the max context size (1024 tokens). skipping", 1024, 12030),
        ("Cannot truncate prompt with n_keep (15028) >= n_ctx (7424)", 7424, 15028),
        (
            "The number of tokens to keep from the initial prompt is greater than the context length (n_keep: 4166>= "
            "n_ctx: 4096). Try to load the model with a larger context length, or provide a shorter input.",
            4096,
            4166,
        ),
        (
            "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with "
            "context length of only 4096 tokens, which is not enough.",
            4096,
            9000,
        ),
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1512. Given: 1000 `inputs` tokens "
            "and 1024 `max_new_tokens`",
            1512,
            1000,
        ),
        ("Input validation error: `inputs` must have less than 1024 tokens. Given: 1872", 1024, 1872),
        ("The input token count (1200293) exceeds the maximum number of tokens allowed (1048576).", 1048576, 1200293),
        (
            "Prompt contains 159202 tokens and 0 draft tokens, too large for model with 131072 maximum context length",
            131072,
            159202,
        ),
        (
            "Please reduce the length of the messages or completion. Current length is 42328 while limit is 40000",
            40000,
            42328,
        ),
        ("This model's maximum prompt length is 131072 but the request contains 537812 tokens.", 131072, 537812),
        ("prompt is too long: 202609 tokens > 200000 maximum", 200000, 202609),
        (
            "input length and `max_tokens` exceed context limit: 199759 + 8192 > 200000, decrease input length or",
            200000,
            199759,
        ),
        ("This model's maximum context length is 128 tokens.", 128, None),
        ("Please reduce the length of the messages or completion.", None, None),
        ("the input length exceeds the context length", None, None),
    ],
)
def test_an_overflow_tells_the_window_and_the_prompt(said: str, window: int | None, prompt: int | None) -> None:
    assert overflow_of({"message": said}) == Overflow(window, prompt)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_ctx": 1024, "n_prompt_tokens": 12030}, Overflow(1024, 12030)),
        ({"n_ctx": 1024}, Overflow(1024, None)),
        ({"n_ctx": "1024", "n_prompt_tokens": None}, None),
        ({"n_ctx": 0, "n_prompt_tokens": True}, None),
        ({"code": "context_length_exceeded"}, Overflow()),
        ({"type": "exceed_context_size_error", "code": ["odd"]}, Overflow()),
    ],
)
def test_an_overflow_may_be_told_in_fields(fields: Json, told: Overflow | None) -> None:
    assert overflow_of({**fields, "message": "full"}) == told


TOO_LARGE = "'max_tokens' or 'max_completion_tokens' is too large: {}. This model's maximum context length is 1024 tokens and your request has {} input tokens"  # noqa: E501


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens", None, ["odd"]])
@pytest.mark.parametrize(("prompt", "told"), [(200, None), (1024, Overflow(1024, 1024))])
def test_too_much_output_is_no_overflow_unless_the_input_fills_the_window(
    param: Any, prompt: int, told: Overflow | None
) -> None:
    assert overflow_of({"message": TOO_LARGE.format(900, prompt), "param": param}) == told


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens=50000 cannot be greater than max_model_len=1024. Please request fewer output tokens.",
        "max_tokens is too large: 5000. This model supports at most 4096 completion tokens.",
        "",
    ],
)
def test_other_errors_are_no_overflows(said: str) -> None:
    assert overflow_of({"message": said}) is None
