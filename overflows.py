"""What says that a window is full: the words, codes and numbers of every backend's overflow.

May not do I/O. Source: tests/wire where a server was run, else the source files and threads named beside a row, read in
November 2026.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

OVERFLOW_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})
# Words without numbers in them.
OVERFLOW_TEXT = re.compile(
    r"maximum context length|exceeds? the (available )?context|context size has been exceeded|context window"
    r"|(greater|longer) than the context length|input length exceeds|`inputs` tokens \+ `max_new_tokens`"
    r"|exceeds the maximum number of tokens|prompt is too long|reduce the length of the (messages|input)",
    re.IGNORECASE,
)
# Too much output was asked for: no overflow of the input, unless the input alone fills the window.
OUTPUT_PARAMS = ("max_tokens", "max_completion_tokens")
OUTPUT_TEXT = re.compile(r"max_(completion_)?tokens['`]? is too large", re.IGNORECASE)

# Tokens of the window, and of the prompt; some backends stop counting at the window, and say "at least".
W, P = r"(?P<window>\d+)", r"(?P<prompt>\d+)"
# What overflows say, the most telling form first. Characters are no tokens.
OVERFLOW_FORMS: tuple[re.Pattern[str], ...] = tuple(
    re.compile(form, re.IGNORECASE | re.DOTALL)
    for form in (
        # OpenAI, DeepSeek, vLLM before 0.11; OpenRouter counts tools apart.
        rf"context length is {W} tokens.{{1,60}}? tokens \({P} (?:in|of)(?:[^)]*?, (?P<tools>\d+) of tool input)?",
        rf"(?:context length is|limit of) {W} tokens.{{1,40}}? resulted in {P} tokens",
        rf"context length is {W} tokens.{{1,40}}? requested {P} tokens in the",
        # vLLM: renderers/params.py, and its engine.
        rf"context length is {W} tokens.{{1,80}}? (?:contains|has)(?: at least)? {P} input tokens",
        rf"passed {P} input tokens.{{1,80}}? context length is only {W} tokens",
        rf"prompt \(length {P}\).{{1,90}}? maximum model length of {W}",
        # SGLang: tokenizer_manager.py, and its scheduler.
        rf"context length of {W} tokens.{{1,60}}?: {P} tokens from the input",
        rf"input \({P} tokens\) is longer than the model's context length \({W} tokens",
        rf"input length \({P} tokens\) exceeds the maximum allowed length \({W} tokens",
        # llama.cpp; also where LiteLLM hands its words on.
        rf"\({P} tokens\) (?:exceeds the available|is larger than the max) context size \({W} tokens",
        # LM Studio: anomalyco/opencode#11141, continuedev/continue#11279.
        rf"n_keep:? \(?{P}\)? ?>= n_ctx:? \(?{W}",
        rf"keep the first {P} tokens.{{1,90}}? context length of only {W} tokens",
        # TGI: router/src/validation.rs.
        rf"`max_new_tokens` must be <= {W}\. Given: {P} `inputs`",
        rf"`inputs` must have less than {W} tokens\. Given: {P}",
        # Gemini: google-gemini/gemini-cli#6678. Mistral. Cerebras: cline/cline#5140. xAI. Anthropic.
        rf"input token count \({P}\) exceeds the maximum number of tokens allowed \({W}\)",
        rf"prompt contains {P} tokens.{{1,60}}? too large for model with {W} maximum context length",
        rf"current length is {P} while limit is {W}",
        rf"maximum prompt length is {W} but the request contains {P} tokens",
        rf"prompt is too long: {P} tokens > {W} maximum",
        rf"exceed context limit: {P} \+ \d+ > {W}",
        # The window alone: vLLM where it counted characters, and whoever else begins like OpenAI.
        rf"context length (?:is|of)(?: only)? {W} tokens",
        rf"tokens exceed the configured limit of {W} tokens",
    )
)


@dataclass(frozen=True, slots=True)
class Overflow:
    """What was told of a full window; the prompt is at least so large."""

    window_tokens: int | None = None
    prompt_tokens: int | None = None

    @property
    def is_of_input(self) -> bool:
        return (self.prompt_tokens or 0) >= (self.window_tokens or math.inf)


def overflow_of(fields: Json) -> Overflow | None:
    """What an error tells of a full window; None when it is about something else.

    fields: the error's own, with a `message`.
    """
    told = _told_in_fields(fields) or _told_in_words(fields["message"])
    if fields.get("param") in OUTPUT_PARAMS or OUTPUT_TEXT.search(fields["message"]):
        return told if told and told.is_of_input else None
    is_named = not OVERFLOW_CODES.isdisjoint((str(fields.get("code")), str(fields.get("type"))))
    is_said = is_named or OVERFLOW_TEXT.search(fields["message"])
    return told or (Overflow() if is_said else None)


def _told_in_fields(fields: Json) -> Overflow | None:
    """Source: llama.cpp, tests/wire/llamacpp/ctx-overflow.txt."""
    told = [value if type(value) is int else None for value in (fields.get("n_ctx"), fields.get("n_prompt_tokens"))]
    return Overflow(*told) if any(told) else None


def _told_in_words(message: str) -> Overflow | None:
    found = next((match for form in OVERFLOW_FORMS if (match := form.search(message))), None)
    if found is None:
        return None
    told = {name: int(digits) for name, digits in found.groupdict().items() if digits}
    return Overflow(told["window"], told.get("prompt", 0) + told.get("tools", 0) or None)
