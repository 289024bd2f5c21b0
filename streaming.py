"""Chat chunk in, Responses events out: the one state machine, for streams and plain answers alike.

May not do I/O, read the clock or make ids: both are handed in. A plain answer is fed as one chunk. One item is closed
before the next is opened; `_event` alone numbers events and `_begin` alone gives indices.
Source: ResponseStreamEvent of the openai SDK 3.52; shapes of chat chunks: tests/wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from errors import ProxyError, UpstreamBroken
from tools import CALL_ID_PREFIX, CALLS_WITHOUT_STATUS, ToolRef, call_item, dumps, is_object, resolve

Json = dict[str, Any]
Event = dict[str, Any]

# Chat finish_reason -> response status and incomplete_details.reason. An unknown reason counts as `stop`.
FINISH: dict[str, tuple[str, str | None]] = {
    "stop": ("completed", None),
    "tool_calls": ("completed", None),
    "function_call": ("completed", None),
    "eos_token": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
    "max_tokens": ("incomplete", "max_output_tokens"),
    "content_filter": ("incomplete", "content_filter"),
}
# Reasons that say the backend gave up.
FAILED_FINISHES = frozenset({"error", "abort"})
# Where backends put reasoning text, best first; some send the same text under two names.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
OPEN_TAG, CLOSE_TAG = "<think>", "</think>"

Think = Literal["auto", "open", "off"]


@dataclass(frozen=True)
class ReasoningSettings:
    """How reasoning text is shown to clients."""

    expose: Literal["summary", "text", "none"] = "summary"


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What the machine has to know of the request."""

    refs: dict[str, ToolRef] = field(default_factory=dict)
    taken_call_ids: frozenset[str] = frozenset()
    logprobs: bool = False
    parallel: bool = True
    expose: Literal["summary", "text", "none"] = "summary"
    think: Think = "auto"
    # Asked only when the backend gives no usage.
    estimate_input_tokens: Callable[[], int] = int


@dataclass(slots=True)
class _Item:
    """The one item being written; text parts are joined once, at its end."""

    index: int
    item: Json
    part: str = ""
    parts: list[Json] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """One tool call as its deltas gather; only the first in line may be open."""

    call_id: str
    ref: ToolRef | None = None
    chat_id: str = ""
    pieces: list[str] = field(default_factory=list)
    sent: int = 0
    extra: Json | None = None

    def arguments(self) -> str:
        return "".join(self.pieces)


class ResponseStream:
    """One chat completion becomes one response; each method returns the events it caused."""

    def __init__(
        self, response: Json, plan: StreamPlan, new_id: Callable[[str], str], clock: Callable[[], float]
    ) -> None:
        self._response = response
        self._plan = plan
        self._new_id = new_id
        self._clock = clock
        self._sequence_number = 0
        self._events: list[Event] = []
        self._output: list[Json] = []
        self._item: _Item | None = None
        self._calls: list[_Call] = []
        self._slots: dict[int, _Call] = {}
        self._last_call: _Call | None = None
        self._call_count = 0
        self._call_ids = set(plan.taken_call_ids)
        self._after_calls: list[tuple[Callable[[str], None], str]] = []
        self._tags = _ThinkTags(plan.think)
        self._details: list[Json] = []
        self._blank = ""
        self._logprobs: list[Json] = []
        self._usage: Json | None = None
        self._finish: str | None = None
        self._handlers: tuple[tuple[str, Callable[[Any], None]], ...] = (
            ("content", self._on_content),
            ("refusal", self._on_refusal),
            ("annotations", self._on_annotations),
            ("tool_calls", self._on_tool_calls),
        )

    @property
    def ended(self) -> bool:
        """Whether the backend gave a reason for having finished."""
        return self._finish is not None

    # -- driving -------------------------------------------------------------------------------------------------------

    def start(self) -> list[Event]:
        self._events = []
        for name in ("created", "in_progress"):
            self._event(f"response.{name}", response=self.snapshot())
        return self._events

    def feed(self, chunk: Json) -> list[Event]:
        """The events of one chat chunk, or of a whole chat completion."""
        self._events = []
        if usage := chunk.get("usage"):
            self._usage = usage
        if tier := chunk.get("service_tier"):
            self._response["service_tier"] = tier
        for choice in (chunk.get("choices") or ())[:1]:
            if self._plan.logprobs:
                self._logprobs += logprobs_of(choice.get("logprobs"))
            if delta := choice.get("delta") or choice.get("message"):
                self._on_delta(delta)
            if finish := choice.get("finish_reason"):
                self._finish = finish
        return self._events

    def close(self) -> list[Event]:
        """Closes what is open and settles the response; the terminal event is still to come.

        Raises: UpstreamBroken when the backend's finish reason says that it gave up.
        """
        self._events = []
        if self._finish in FAILED_FINISHES:
            raise UpstreamBroken(f"The backend ended its answer with finish_reason '{self._finish}'.")
        status, reason = FINISH.get(self._finish or "stop", ("completed", None))
        self._flush_tags()
        self._close_calls(status)
        self._end_item(status)
        if not self._output:
            self._part("output_text")
            self._end_item(status)
        self._settle(status, reason)
        return self._events

    def finish(self) -> list[Event]:
        """The terminal event of a response that `close` has settled."""
        self._events = []
        self._event(f"response.{self._response['status']}", response=self.snapshot())
        return self._events

    def fail(self, error: ProxyError) -> list[Event]:
        """The terminal event of a response that could not be carried through; what was said so far is kept."""
        self._events = []
        if self._item is not None:
            self._output[self._item.index] = self._ended(self._item, "incomplete")
            self._item = None
        self._response |= {"status": "failed", "error": error.to_response_error(), "completed_at": None}
        self._response["usage"] = usage_of(self._usage) if self._usage else None
        self._event("response.failed", response=self.snapshot())
        return self._events

    def snapshot(self) -> Json:
        return {**self._response, "output": list(self._output)}

    def _settle(self, status: str, reason: str | None) -> None:
        response = self._response
        response["status"] = status
        response["incomplete_details"] = {"reason": reason} if reason else None
        response["completed_at"] = int(self._clock()) if status == "completed" else None
        response["usage"] = usage_of(self._usage) if self._usage else self._estimated_usage()
        if response.get("service_tier") in (None, "auto"):
            response["service_tier"] = "default"

    def _estimated_usage(self) -> Json:
        """About four bytes a token, for a backend that counts nothing."""
        output_tokens = sum(len(orjson.dumps(item)) for item in self._output) // 4
        return usage_of({"prompt_tokens": self._plan.estimate_input_tokens(), "completion_tokens": output_tokens})

    # -- one method a kind of delta ------------------------------------------------------------------------------------

    def _on_delta(self, delta: Json) -> None:
        for key in REASONING_KEYS:
            if value := delta.get(key):
                self._tags.never()
                self._later(self._reason, value if isinstance(value, str) else _details_text(value))
                break
        if isinstance(details := delta.get("reasoning_details"), list):
            self._details += details
        for key, handler in self._handlers:
            if value := delta.get(key):
                handler(value)

    def _on_content(self, content: str | list[Any]) -> None:
        if isinstance(content, str):
            for reasoning, text in self._tags.split(content, said=self._has_said()):
                self._later(self._reason if reasoning else self._say, text)
            return
        for part in content:  # Mistral: a list of parts, thinking among them
            if isinstance(part, dict) and part.get("type") == "thinking":
                self._later(self._reason, _details_text(part.get("thinking") or ()))
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                self._later(self._say, part["text"])

    def _on_refusal(self, refusal: str) -> None:
        self._part("refusal").pieces.append(refusal)
        self._at("response.refusal.delta", content_index=self._content_index(), delta=refusal)

    def _on_annotations(self, annotations: list[Any]) -> None:
        """Chat nests a citation under its type; here it is flat."""
        for annotation in annotations:
            if not isinstance(annotation, dict):
                continue
            kind = str(annotation.get("type"))
            flat = {"type": kind, **(annotation.get(kind) or {})}
            item = self._part("output_text")
            given = item.parts[-1]["annotations"]
            self._at(
                "response.output_text.annotation.added",
                content_index=self._content_index(),
                annotation_index=len(given),
                annotation=flat,
            )
            given.append(flat)

    def _on_tool_calls(self, deltas: list[Json]) -> None:
        self._tags.drop_blank()
        for position, delta in enumerate(deltas):
            call = self._call_of(delta, position)
            function = delta.get("function") or {}
            if function.get("name") and call.ref is None:
                call.ref = resolve(self._plan.refs, function["name"])
            arguments = function.get("arguments")
            if arguments:
                call.pieces.append(arguments if isinstance(arguments, str) else dumps(arguments))
            if isinstance(delta.get("extra_content"), dict):
                call.extra = delta["extra_content"]
        self._advance_calls()

    def _call_of(self, delta: Json, position: int) -> _Call:
        """The call a delta belongs to: a new one for a new id or index, or for a name without either."""
        chat_id, index = delta.get("id") or "", delta.get("index")
        name = (delta.get("function") or {}).get("name")
        call = self._last_call if index is None else self._slots.get(index)
        is_new = call is None or (chat_id and chat_id != call.chat_id) or (index is None and name and not chat_id)
        if call is not None and not is_new:
            return call
        call = _Call(self._fresh_call_id(chat_id), chat_id=chat_id)
        self._slots[position if index is None else index] = call
        self._last_call = call
        self._call_count += 1
        if self._plan.parallel or self._call_count == 1:
            self._calls.append(call)
        return call

    def _fresh_call_id(self, chat_id: str) -> str:
        call_id = chat_id if chat_id and chat_id not in self._call_ids else self._new_id("call")
        self._call_ids.add(call_id)
        return call_id

    # -- text ----------------------------------------------------------------------------------------------------------

    def _later(self, write: Callable[[str], None], text: str) -> None:
        """Text that comes while a call is half written waits until that call can be closed."""
        if self._calls:
            self._advance_calls(to_end=True)
        if self._calls:
            self._after_calls.append((write, text))
        elif text:
            write(text)

    def _has_said(self) -> bool:
        return self._item is not None and self._item.part == "output_text"

    def _say(self, text: str) -> None:
        if self._item is None or self._item.part != "output_text":
            if (self._item or self._last()).item["type"] == "reasoning" and not (text := text.lstrip()):
                return
            self._part("output_text")
        item = self._item
        assert item is not None
        item.pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        item.logprobs += logprobs
        self._events.append(
            {
                "type": "response.output_text.delta",
                "sequence_number": self._sequence_number,
                "item_id": item.item["id"],
                "output_index": item.index,
                "content_index": len(item.parts) - 1,
                "delta": text,
                "logprobs": logprobs,
            }
        )
        self._sequence_number += 1

    def _last(self) -> _Item:
        """The item closed last, or a nameless one before the first."""
        return _Item(-1, self._output[-1] if self._output else {"type": ""})

    def _reason(self, text: str) -> None:
        """White space around reasoning says nothing and differs between a backend's own plain and streamed answers."""
        is_open = self._item is not None and self._item.item["type"] == "reasoning"
        text = self._blank + text if is_open else text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if not shown:
            return
        if not is_open:
            self._open_reasoning()
        assert self._item is not None
        self._item.pieces.append(shown)
        if self._plan.expose == "summary":
            self._at("response.reasoning_summary_text.delta", summary_index=0, delta=shown)
        elif self._plan.expose == "text":
            self._at("response.reasoning_text.delta", content_index=0, delta=shown)

    def _open_reasoning(self) -> None:
        self._begin({"id": self._new_id("rs"), "type": "reasoning", "summary": []})
        if self._plan.expose == "summary":
            part = {"type": "summary_text", "text": ""}
            self._at("response.reasoning_summary_part.added", summary_index=0, part=part)
        elif self._plan.expose == "text":
            part = {"type": "reasoning_text", "text": ""}
            self._at("response.content_part.added", content_index=0, part=part)

    def _flush_tags(self) -> None:
        for reasoning, text in self._tags.flush(keep_blank=not self._output and not self._calls):
            self._later(self._reason if reasoning else self._say, text)

    # -- items ---------------------------------------------------------------------------------------------------------

    def _begin(self, item: Json) -> _Item:
        """Opens an item; gives its index."""
        self._end_item("completed")
        self._item = _Item(len(self._output), item)
        self._output.append(item)
        self._event("response.output_item.added", output_index=self._item.index, item=item)
        return self._item

    def _part(self, kind: str) -> _Item:
        """The open message item with a content part of that kind at its end."""
        item = self._item
        if item is None or item.item["type"] != "message":
            message = {"id": self._new_id("msg"), "type": "message", "status": "in_progress"}
            item = self._begin(message | {"role": "assistant", "content": []})
        if item.part != kind:
            self._end_part(item)
            item.part = kind
            item.parts.append(_empty_part(kind))
            self._at("response.content_part.added", content_index=self._content_index(), part=_empty_part(kind))
        return item

    def _content_index(self) -> int:
        return len(self._item.parts) - 1 if self._item else 0

    def _end_part(self, item: _Item) -> None:
        if not item.part:
            return
        text = "".join(item.pieces)
        index = self._content_index()
        part = _filled_part(item, text)
        item.parts[-1] = part
        if item.part == "output_text":
            self._at("response.output_text.done", content_index=index, text=text, logprobs=part["logprobs"])
        else:
            self._at("response.refusal.done", content_index=index, refusal=text)
        self._at("response.content_part.done", content_index=index, part=part)
        item.part, item.pieces, item.logprobs = "", [], []

    def _end_item(self, status: str) -> None:
        item = self._item
        if item is None:
            return
        if item.item["type"] == "message":
            self._end_part(item)
        elif item.item["type"] == "reasoning":
            self._end_reasoning("".join(item.pieces))
        self._done(item, self._ended(item, status))

    def _ended(self, item: _Item, status: str) -> Json:
        """The item as it stands at its end."""
        if item.item["type"] == "message":
            parts = item.parts if not item.part else [*item.parts[:-1], _filled_part(item, "".join(item.pieces))]
            return {**item.item, "status": status, "content": list(parts)}
        if item.item["type"] == "reasoning":
            return self._ended_reasoning(item)
        return {**item.item, "status": status, "arguments": "".join(item.pieces)}

    def _end_reasoning(self, text: str) -> None:
        self._blank = ""
        if self._plan.expose == "summary":
            part = {"type": "summary_text", "text": text}
            self._at("response.reasoning_summary_text.done", summary_index=0, text=text)
            self._at("response.reasoning_summary_part.done", summary_index=0, part=part)
        elif self._plan.expose == "text":
            part = {"type": "reasoning_text", "text": text}
            self._at("response.reasoning_text.done", content_index=0, text=text)
            self._at("response.content_part.done", content_index=0, part=part)

    def _ended_reasoning(self, item: _Item) -> Json:
        text = "".join(item.pieces)
        ended = dict(item.item)
        if self._plan.expose == "summary":
            ended["summary"] = [{"type": "summary_text", "text": text}]
        elif self._plan.expose == "text":
            ended["content"] = [{"type": "reasoning_text", "text": text}]
        if self._details:
            ended["reasoning_details"], self._details = self._details, []
        return ended

    def _done(self, item: _Item, ended: Json) -> None:
        self._item = None
        self._output[item.index] = ended
        self._event("response.output_item.done", output_index=item.index, item=ended)

    # -- tool calls ----------------------------------------------------------------------------------------------------

    def _advance_calls(self, *, to_end: bool = False) -> None:
        """Writes the first call in line, and closes it as soon as a later one waits and its arguments are whole."""
        while self._calls and self._calls[0].ref is not None:
            call = self._calls[0]
            if call.ref is not None and call.ref.kind == "function":
                self._write_call(call, call.ref)
            if (len(self._calls) == 1 and not to_end) or not is_object(call.arguments()):
                return
            self._close_call(call, "completed")

    def _write_call(self, call: _Call, ref: ToolRef) -> None:
        if self._item is None or self._item.item.get("call_id") != call.call_id:
            self._begin(self._call_fields(call, call_item(ref, "")) | {"status": "in_progress"})
        for delta in call.pieces[call.sent :]:
            self._at("response.function_call_arguments.delta", delta=delta)
        call.sent = len(call.pieces)

    def _call_fields(self, call: _Call, item: Json) -> Json:
        prefix = CALL_ID_PREFIX[item["type"]]
        extra = {"extra_content": call.extra} if call.extra else {}
        return {"id": self._new_id(prefix), **item, "call_id": call.call_id, **extra}

    def _close_calls(self, status: str) -> None:
        """At the end: a call cut by the token limit is incomplete, one without arguments has `{}`."""
        for call in list(self._calls):
            cut = status == "incomplete" and not is_object(call.arguments())
            self._close_call(call, "incomplete" if cut else "completed")

    def _close_call(self, call: _Call, status: str) -> None:
        self._calls.remove(call)
        ref = call.ref or ToolRef("function", "")
        if ref.kind == "function":
            self._close_function_call(call, ref, status)
        elif status == "completed":
            self._give_typed_call(call, call_item(ref, call.arguments() or "{}"))
        if not self._calls:
            held, self._after_calls = self._after_calls, []
            for write, text in held:
                write(text)

    def _close_function_call(self, call: _Call, ref: ToolRef, status: str) -> None:
        if not call.arguments().strip() and status == "completed":
            call.pieces.append("{}")
        self._write_call(call, ref)
        item = self._item
        assert item is not None
        arguments = call.arguments()
        self._at("response.function_call_arguments.done", name=ref.name, arguments=arguments)
        extra = {"extra_content": call.extra} if call.extra else {}
        self._done(item, {**item.item, "status": status, "arguments": arguments, **extra})

    def _give_typed_call(self, call: _Call, fields: Json) -> None:
        """A call whose item can be told only when its arguments are whole."""
        ended = self._call_fields(call, fields)
        begun = dict(ended)
        if fields["type"] == "custom_tool_call":
            begun["input"] = ""
        if fields["type"] not in CALLS_WITHOUT_STATUS:
            begun["status"], ended["status"] = "in_progress", "completed"
        item = self._begin(begun)
        if fields["type"] == "custom_tool_call":
            self._at("response.custom_tool_call_input.delta", delta=fields["input"])
            self._at("response.custom_tool_call_input.done", input=fields["input"])
        self._done(item, ended)

    # -- numbering -----------------------------------------------------------------------------------------------------

    def _at(self, kind: str, **body: Any) -> None:
        """An event about the open item."""
        item = self._item
        assert item is not None
        self._event(kind, item_id=item.item["id"], output_index=item.index, **body)

    def _event(self, kind: str, **body: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._sequence_number, **body})
        self._sequence_number += 1


class _ThinkTags:
    """Parts text into reasoning and answer where a backend left `<think>` tags in the content.

    "auto": a block at the very start; or one whose opening tag the template swallowed, as long as nothing but it has
    been seen. "open": the answer starts inside a block. "off": tags are text.
    """

    def __init__(self, mode: Think) -> None:
        self._state = {"auto": "start", "open": "inside", "off": "plain"}[mode]
        self._held = ""

    def never(self) -> None:
        """The backend parts reasoning itself."""
        if self._state == "start":
            self._state = "plain"

    def drop_blank(self) -> None:
        """White space before a tool call is not an answer."""
        if not self._held.strip():
            self._held = ""

    def split(self, text: str, *, said: bool) -> Iterable[tuple[bool, str]]:
        """Pairs of (is reasoning, text) for what is certain so far; said: whether answer text went out before."""
        if self._state == "plain" and not self._held:
            return ((False, text),) if text else ()
        self._held, text = "", self._held + text
        pairs: list[tuple[bool, str]] = []
        while text:
            text = getattr(self, f"_{self._state}")(text, pairs)
        return [pair for pair in pairs if pair[1]]

    def _start(self, text: str, pairs: list[tuple[bool, str]]) -> str:
        lead = text.lstrip()
        if OPEN_TAG.startswith(lead):
            return self._hold(text)
        if lead.startswith(OPEN_TAG):
            self._state = "inside"
            return lead[len(OPEN_TAG) :]
        self._state = "unopened"
        return text

    def _inside(self, text: str, pairs: list[tuple[bool, str]]) -> str:
        before, tag, after = text.partition(CLOSE_TAG)
        if tag:
            pairs.append((True, before))
            self._state = "plain"
            return after
        kept = len(text) - _overlap(text, CLOSE_TAG)
        pairs.append((True, text[:kept]))
        return self._hold(text[kept:])

    def _unopened(self, text: str, pairs: list[tuple[bool, str]]) -> str:
        """A closing tag without an opening one: what came before it was reasoning, the template opened it."""
        before, tag, after = text.partition(CLOSE_TAG)
        if OPEN_TAG in before:
            self._state = "plain"
            return text
        if tag:
            pairs.append((True, before))
            self._state = "plain"
            return after
        kept = len(text) - _overlap(text, CLOSE_TAG)
        pairs.append((False, text[:kept]))
        return self._hold(text[kept:])

    def _plain(self, text: str, pairs: list[tuple[bool, str]]) -> str:
        pairs.append((False, text))
        return ""

    def _hold(self, text: str) -> str:
        self._held = text
        return ""

    def flush(self, *, keep_blank: bool) -> Iterable[tuple[bool, str]]:
        held, self._held = self._held, ""
        if held and (keep_blank or held.strip()):
            yield self._state == "inside", held


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    if "<" not in text[-len(tag) :]:
        return 0
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _empty_part(kind: str) -> Json:
    if kind == "refusal":
        return {"type": "refusal", "refusal": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _filled_part(item: _Item, text: str) -> Json:
    if item.part == "refusal":
        return {"type": "refusal", "refusal": text}
    return {**item.parts[-1], "text": text, "logprobs": item.logprobs}


def _details_text(details: Iterable[Any]) -> str:
    """The readable text of reasoning records. Source: OpenRouter reasoning.text / .summary, Mistral thinking parts."""
    parts = [detail for detail in details if isinstance(detail, dict)]
    return "".join(str(part.get("text") or part.get("summary") or "") for part in parts)


def logprobs_of(logprobs: Json | None) -> list[Json]:
    """A chat choice's logprobs in the form of output_text parts."""
    content = (logprobs or {}).get("content") or ()
    return [
        {**_logprob(token), "top_logprobs": [_logprob(top) for top in token.get("top_logprobs") or ()]}
        for token in content
    ]


def _logprob(token: Json) -> Json:
    return {"token": token.get("token"), "bytes": token.get("bytes") or [], "logprob": token.get("logprob")}


def usage_of(usage: Json) -> Json:
    """Chat usage as Responses usage; a backend that gives no details counts zero.

    Source: DeepSeek `prompt_cache_hit_tokens`, SGLang top-level `reasoning_tokens`.
    """
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = usage.get("prompt_tokens_details") or {}
    produced = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": cached.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0,
            "cache_write_tokens": cached.get("cache_write_tokens") or 0,
        },
        "output_tokens": completion,
        "output_tokens_details": {
            "reasoning_tokens": produced.get("reasoning_tokens") or usage.get("reasoning_tokens") or 0
        },
        "total_tokens": prompt + completion,
    }
