"""Chat chunk in, Responses events out: the one state machine, for streams and plain answers alike.

May not do I/O, read the clock or make ids: both are handed in. A plain answer is fed as one chunk. One item is closed
before the next is opened; `_event` and `_say` alone number events and `_begin` alone gives indices.
Source: ResponseStreamEvent of the openai SDK 3.52; shapes of chat chunks: tests/wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calls import Call, CallLine
from chunks import (
    BYTES_PER_TOKEN,
    FAILED_FINISHES,
    FINISH,
    REASONING_KEYS,
    delta_of,
    details_text,
    flat_annotation,
    joined_usage,
    logprobs_of,
    says_anything,
    usage_of,
    written_bytes,
)
from errors import ProxyError
from parts import OpenItem, empty_part, filled_part
from stream_plan import StreamPlan
from think import Think, ThinkTags
from tools import CALL_ID_PREFIX, CALLS_WITHOUT_STATUS, ToolRef, call_item
from upstream_errors import UpstreamBroken

Json = dict[str, Any]
Event = dict[str, Any]


class ResponseStream:
    """One chat completion becomes one response; each method returns the events it caused."""

    def __init__(
        self, response: Json, plan: StreamPlan, new_id: Callable[[str], str], clock: Callable[[], float]
    ) -> None:
        self._response = response
        self._plan = plan
        self._new_id = new_id
        self._clock = clock
        self._sequence_number = plan.first_number
        self._events: list[Event] = []
        self._output: list[Json] = []
        self._item: OpenItem | None = None
        self._calls = CallLine(plan.refs, plan.taken_call_ids, new_id, parallel=plan.parallel)
        self._after_calls: list[tuple[Callable[[Any], None], Any]] = []
        self._tags = ThinkTags(plan.think)
        self._has_reasoned = False
        self._details: list[Json] = []
        self._blank = ""
        self._logprobs: list[Json] = []
        self._usage: Json | None = None
        self._compaction_usage: Json | None = None
        self._is_fed = False
        self._finish: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the backend gave a reason for having finished."""
        return self._finish is not None

    @property
    def has_answer(self) -> bool:
        """Whether the backend has said anything."""
        return self._is_fed

    @property
    def counted(self) -> Json:
        """What the backend counted of its one call, compaction aside; empty when it did not."""
        return self._usage or {}

    def expect(self, think: Think) -> None:
        """Another backend answers in the place of one that has said nothing."""
        self._tags = ThinkTags(think)

    # -- driving -------------------------------------------------------------------------------------------------------

    def start(self) -> list[Event]:
        self._events = []
        for name in ("in_progress",) if self._plan.first_number else ("created", "in_progress"):
            self._event(f"response.{name}", response=self.snapshot())
        return self._events

    def feed(self, chunk: Json) -> list[Event]:
        """The events of one chat chunk, or of a whole chat completion."""
        self._events = []
        self._is_fed = self._is_fed or says_anything(chunk)
        if usage := chunk.get("usage"):
            self._usage = usage
        if tier := chunk.get("service_tier"):
            self._response["service_tier"] = tier
        for choice in (chunk.get("choices") or ())[:1]:
            if self._plan.logprobs:
                self._logprobs += logprobs_of(choice.get("logprobs"))
            self._on_delta(delta_of(choice))
            if finish := choice.get("finish_reason"):
                self._finish = finish
        return self._events

    def compacting(self, item_id: str) -> list[Event]:
        """The events of a compaction item that is still to be made, for a client who asked for it."""
        self._events = []
        self._begin({"id": item_id, "type": "compaction", "encrypted_content": ""})
        self._at("response.compaction.compacting")
        return self._events

    def compacted(self, item: Json, usage: Json) -> list[Event]:
        """The events of a compaction item, which comes before all else; `usage`: what it took to make it."""
        self._events = []
        self._compaction_usage = joined_usage(self._compaction_usage, usage) if self._compaction_usage else usage
        self._done(self._item or self._begin({**item, "encrypted_content": ""}), item)
        return self._events

    def close(self) -> list[Event]:
        """Closes what is open and settles the response; the terminal event is still to come.

        Raises: UpstreamBroken when the backend's finish reason says that it gave up.
        """
        self._events = []
        if self._finish in FAILED_FINISHES:
            raise UpstreamBroken(f"The backend ended its answer with finish_reason '{self._finish}'.")
        status, reason = FINISH.get(self._finish or "stop", ("completed", None))
        for is_reasoning, text in self._tags.flush():
            self._later(self._reason if is_reasoning else self._say, text)
        self._close_calls(status)
        self._end_item(status)
        if not self._plan.is_mere and all(item["type"] == "compaction" for item in self._output):
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
        if (item := self._item) is not None and item.kind == "compaction":
            self._output.pop()
        elif item is not None:
            self._output[item.index] = self._ended(item, "incomplete")
        self._item = None
        self._response |= {"status": "failed", "error": error.to_response_error(), "completed_at": None}
        is_counted = self._usage or self._compaction_usage
        self._response["usage"] = usage_of(self._usage or {}, self._compaction_usage) if is_counted else None
        self._event("response.failed", response=self.snapshot())
        return self._events

    def snapshot(self) -> Json:
        return {**self._response, "output": list(self._output)}

    def _settle(self, status: str, reason: str | None) -> None:
        response = self._response
        response["status"] = status
        response["incomplete_details"] = {"reason": reason} if reason else None
        response["completed_at"] = int(self._clock()) if status == "completed" else None
        counted = {} if self._plan.is_mere else self._usage or self._estimated_usage()
        response["usage"] = usage_of(counted, self._compaction_usage)
        if response.get("service_tier") in (None, "auto"):
            response["service_tier"] = "default"

    def _estimated_usage(self) -> Json:
        """For a backend that counts nothing."""
        output_tokens = -(-sum(map(written_bytes, self._output)) // BYTES_PER_TOKEN)
        return {"prompt_tokens": self._plan.estimate_input_tokens(), "completion_tokens": output_tokens}

    # -- one method a kind of delta ------------------------------------------------------------------------------------

    def _on_delta(self, delta: Json) -> None:
        if isinstance(details := delta.get("reasoning_details"), list):
            self._details += details
        for key in REASONING_KEYS:
            if value := delta.get(key):
                self._tags.never()
                self._later(self._reason, value if isinstance(value, str) else details_text(value))
                break
        for key, handler in HANDLERS:
            if value := delta.get(key):
                handler(self, value)
        if self._logprobs and (self._calls.waiting or (self._item and self._item.kind == "reasoning")):
            self._logprobs = []  # of tokens that are no answer text

    def _on_content(self, content: str | list[Any]) -> None:
        if isinstance(content, str):
            self._on_text(content)
            return
        for part in content:  # Mistral: a list of parts, thinking among them
            if isinstance(part, dict) and part.get("type") == "thinking":
                self._tags.never()
                self._later(self._reason, details_text(part.get("thinking") or ()))
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                self._on_text(part["text"])

    def _on_text(self, text: str) -> None:
        for is_reasoning, piece in self._tags.split(text):
            self._later(self._reason if is_reasoning else self._say, piece)

    def _on_refusal(self, refusal: str) -> None:
        self._later(self._refuse, refusal)

    def _on_annotations(self, annotations: list[Any]) -> None:
        for annotation in annotations:
            if isinstance(annotation, dict):
                self._later(self._annotate, annotation)

    def _on_tool_calls(self, deltas: list[Json]) -> None:
        for position, delta in enumerate(deltas):
            self._calls.add(delta, position)
        self._advance_calls()

    def _later(self, write: Callable[[Any], None], value: Any) -> None:
        """What comes while a call is half written waits until that call can be closed."""
        if self._calls.waiting:
            self._advance_calls(to_end=True)
        if self._calls.waiting:
            self._after_calls.append((write, value))
        else:
            write(value)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """White space between items says nothing."""
        item = self._item
        if item is None or item.part != "output_text":
            if (self._output or self._has_reasoned) and not (text := text.lstrip()):
                return
            item = self._part("output_text")
        item.pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        item.logprobs += logprobs
        if self._plan.silent:
            return
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

    def _refuse(self, refusal: str) -> None:
        item = self._part("refusal")
        item.pieces.append(refusal)
        self._at("response.refusal.delta", content_index=len(item.parts) - 1, delta=refusal)

    def _annotate(self, annotation: Json) -> None:
        item = self._part("output_text")
        given, flat = item.parts[-1]["annotations"], flat_annotation(annotation)
        at = {"content_index": len(item.parts) - 1, "annotation_index": len(given)}
        self._at("response.output_text.annotation.added", **at, annotation=flat)
        given.append(flat)

    def _reason(self, text: str) -> None:
        """White space around reasoning says nothing and differs between a backend's own plain and streamed answers."""
        self._has_reasoned = True
        item = self._item if self._item and self._item.kind == "reasoning" else None
        text = self._blank + text if item and item.pieces else text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if item is None and (shown or self._details):
            item = self._begin({"id": self._new_id("rs"), "type": "reasoning", "summary": []})
        if item is None or not shown:
            return
        if not item.part:
            self._open_thought(item)
        item.pieces.append(shown)
        if item.part == "summary":
            self._at("response.reasoning_summary_text.delta", summary_index=0, delta=shown)
        elif item.part == "text":
            self._at("response.reasoning_text.delta", content_index=0, delta=shown)

    def _open_thought(self, item: OpenItem) -> None:
        item.part = self._plan.expose
        if item.part == "summary":
            part = {"type": "summary_text", "text": ""}
            self._at("response.reasoning_summary_part.added", summary_index=0, part=part)
        elif item.part == "text":
            part = {"type": "reasoning_text", "text": ""}
            self._at("response.content_part.added", content_index=0, part=part)

    # -- items ---------------------------------------------------------------------------------------------------------

    def _begin(self, item: Json) -> OpenItem:
        """Opens an item after closing the one before; gives its index."""
        self._end_item("completed")
        self._item = OpenItem(len(self._output), item)
        self._output.append(item)
        self._event("response.output_item.added", output_index=self._item.index, item=item)
        return self._item

    def _part(self, kind: str) -> OpenItem:
        """The open message item with a content part of that kind at its end."""
        item = self._item
        if item is None or item.kind != "message":
            message = {"id": self._new_id("msg"), "type": "message", "status": "in_progress"}
            item = self._begin(message | {"role": "assistant", "content": []})
        if item.part != kind:
            self._end_part(item)
            item.part = kind
            item.parts.append(empty_part(kind))
            self._at("response.content_part.added", content_index=len(item.parts) - 1, part=empty_part(kind))
        return item

    def _end_part(self, item: OpenItem) -> None:
        if not item.part:
            return
        text, index = item.text(), len(item.parts) - 1
        item.parts[-1] = part = filled_part(item)
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
        if item.kind == "message":
            self._end_part(item)
        elif item.kind == "reasoning":
            self._end_thought(item)
        self._done(item, self._ended(item, status))

    def _end_thought(self, item: OpenItem) -> None:
        self._blank = ""
        text = item.text()
        if item.part == "summary":
            part = {"type": "summary_text", "text": text}
            self._at("response.reasoning_summary_text.done", summary_index=0, text=text)
            self._at("response.reasoning_summary_part.done", summary_index=0, part=part)
        elif item.part == "text":
            part = {"type": "reasoning_text", "text": text}
            self._at("response.reasoning_text.done", content_index=0, text=text)
            self._at("response.content_part.done", content_index=0, part=part)

    def _ended(self, item: OpenItem, status: str) -> Json:
        """The item as it stands at its end."""
        if item.kind == "message":
            parts = [*item.parts[:-1], filled_part(item)] if item.part else list(item.parts)
            return {**item.item, "status": status, "content": parts}
        if item.kind == "reasoning":
            return self._ended_thought(item)
        return {**item.item, "status": status, "arguments": item.text()}

    def _ended_thought(self, item: OpenItem) -> Json:
        ended = dict(item.item)
        if item.part == "summary":
            ended["summary"] = [{"type": "summary_text", "text": item.text()}]
        elif item.part == "text":
            ended["content"] = [{"type": "reasoning_text", "text": item.text()}]
        details, self._details = self._details, []
        if details and self._plan.expose != "none":
            ended["reasoning_details"] = details
        if self._plan.seal:
            ended["encrypted_content"] = self._plan.seal(item.item["id"], item.text(), details)
        return ended

    def _done(self, item: OpenItem, ended: Json) -> None:
        self._item, self._output[item.index] = None, ended
        self._event("response.output_item.done", output_index=item.index, item=ended)

    # -- tool calls ----------------------------------------------------------------------------------------------------

    def _advance_calls(self, *, to_end: bool = False) -> None:
        """Writes the first call in line, and closes it as soon as something follows and its arguments are whole."""
        waiting = self._calls.waiting
        while waiting and (ref := waiting[0].ref) is not None:
            if ref.kind == "function":
                self._write_call(waiting[0], ref)
            if (len(waiting) == 1 and not to_end) or not waiting[0].is_whole():
                return
            self._close_call(waiting[0], "completed")

    def _close_calls(self, status: str) -> None:
        """At the end: a call cut by the token limit is incomplete, one without arguments has `{}`."""
        for call in list(self._calls.waiting):
            cut = status == "incomplete" and not call.is_whole()
            self._close_call(call, "incomplete" if cut else "completed")

    def _close_call(self, call: Call, status: str) -> None:
        """A call whose item can be told only when its arguments are whole is left out when they never were."""
        self._calls.waiting.remove(call)
        ref = call.ref or ToolRef("function", "")
        if ref.kind == "function":
            self._close_function_call(call, ref, status)
        elif status == "completed":
            self._close_typed_call(call, ref)
        if not self._calls.waiting:
            held, self._after_calls = self._after_calls, []
            for write, value in held:
                write(value)

    def _write_call(self, call: Call, ref: ToolRef) -> OpenItem:
        item = self._item
        if item is None or item.item.get("call_id") != call.call_id:
            item = self._begin({**self._call_fields(call, call_item(ref, "")), "status": "in_progress"})
        for delta in call.pieces[call.sent :]:
            item.pieces.append(delta)
            self._at("response.function_call_arguments.delta", delta=delta)
        call.sent = len(call.pieces)
        return item

    def _close_function_call(self, call: Call, ref: ToolRef, status: str) -> None:
        if status == "completed" and not call.arguments().strip():
            call.pieces.append("{}")
        item = self._write_call(call, ref)
        self._at("response.function_call_arguments.done", name=ref.name, arguments=item.text())
        self._done(item, {**self._ended(item, status), **call.extras()})

    def _close_typed_call(self, call: Call, ref: ToolRef) -> None:
        """What does not fit its type is a function call, which the client can answer."""
        fields = call_item(ref, call.arguments())
        if fields["type"] == "function_call":
            self._close_function_call(call, ToolRef("function", ref.name, ref.namespace), "completed")
            return
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

    def _call_fields(self, call: Call, item: Json) -> Json:
        return {"id": self._new_id(CALL_ID_PREFIX[item["type"]]), **item, "call_id": call.call_id, **call.extras()}

    # -- numbering -----------------------------------------------------------------------------------------------------

    def _at(self, kind: str, **body: Any) -> None:
        """An event about the open item."""
        if self._plan.silent:
            return
        item = self._item
        assert item is not None
        self._event(kind, item_id=item.item["id"], output_index=item.index, **body)

    def _event(self, kind: str, **body: Any) -> None:
        if self._plan.silent:
            return
        self._events.append({"type": kind, "sequence_number": self._sequence_number, **body})
        self._sequence_number += 1


# Key of a delta -> what takes its value. No machine holds its own methods: cycles are work for the garbage collector.
HANDLERS: tuple[tuple[str, Callable[[ResponseStream, Any], None]], ...] = (
    ("content", ResponseStream._on_content),
    ("refusal", ResponseStream._on_refusal),
    ("annotations", ResponseStream._on_annotations),
    ("tool_calls", ResponseStream._on_tool_calls),
)
