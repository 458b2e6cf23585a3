"""`/v1/responses`, OpenAI's Responses API: its body, checked. Pure; what comes out is in `shared.jobs.response_objects`.

It is a chat with another form: `instructions` are the system message, `input` a text or messages, `text.format` the
`response_format`. Tools, stored prompts, conversations and whatever else vdiff does not have are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.ids import is_id
from shared.jobs.fields import LABELS, labels_of, meant, model_of, template_variables_of
from shared.jobs.requests import MAX_MESSAGES, ROLES, ParsedRequest, Resolved
from shared.jobs.responses import RESPONSES
from shared.jobs.tasks import ResponseTask
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL, parse_special_of
from shared.tokenizer import TokenizerWrapper

Messages = tuple[tuple[str, str], ...]  # role and content

LOGPROBS = "message.output_text.logprobs"
# Fields of other endpoints of ours that have the same meaning here.
_SAME = ("temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "diffusion")
_OWN = (
    "model", "input", "instructions", "max_output_tokens", "text", "include", "top_logprobs", "previous_response_id",
    "background", "store", "stream", "stream_options", "chat_template_kwargs",
    PARSE_SPECIAL,
)  # fmt: skip
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("auto", "none"), "parallel_tool_calls": (True, False), "truncation": ("disabled",),
}  # fmt: skip
_REFUSED = (
    "access_programs", "background_options", "context_management", "conversation", "image", "max_tool_calls", "moderation",
    "prompt", "prompt_cache_options", "prompt_cache_retention", "reasoning",
)  # fmt: skip
FIELDS = (*_OWN, *_SAME, *LABELS, *_NO_OPS)
_ITEM = ("type", "role", "content", "id", "status", "phase")
_TEXT_PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """One request; `earlier` is what was said before, once `previous_response_id` was looked up."""

    model: str
    messages: Messages
    fields: dict[str, Any]  # of generation, by our names
    metadata: dict[str, str]
    shown: dict[str, Any]  # what the response's object repeats
    stream: bool
    background: bool
    stored: bool
    instructions: str | None = None
    previous: str | None = None
    earlier: Messages | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)
    endpoint: str = RESPONSES
    include_usage: bool = False
    parse_special: bool | None = None

    @property
    def characters(self) -> int:
        return len(self.instructions or "") + sum(len(text) for _, text in (*(self.earlier or ()), *self.messages))

    def continuing(self, earlier: Messages) -> ResponseRequest:
        return replace(self, earlier=earlier)

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Raises InvalidParameter, PromptTooLong."""
        if self.previous is not None and self.earlier is None:
            message = "previous_response_id does not fit a line of a batch; write the messages out in input"
            raise InvalidParameter(message, param="previous_response_id")
        said = (*(self.earlier or ()), *self.messages)
        system = [] if self.instructions is None else [("system", self.instructions)]
        chat = ParsedRequest(
            RESPONSES, self.model, None, None, [{"role": r, "content": c} for r, c in (*system, *said)], self.fields,
            False, False, {}, self.template_variables,
            {"max_tokens": "max_output_tokens", "response_format.json_schema": "text.format", "response_format": "text.format",
             "messages": "input"}, self.parse_special,
        )  # fmt: skip
        resolved = chat.resolve(card, tokenizer)
        return replace(resolved, task=ResponseTask(self.shown, said))


def job_id_of(response_id: str) -> str:
    """The job behind a response; any other text where it is no response's id, which no job has."""
    return f"job_{response_id.removeprefix('resp_')}" if is_id(response_id, "resp") else response_id


def parse(body: Any, *, streaming: bool) -> ResponseRequest:
    """Check the shape.

    Args:
        streaming: whether the endpoint itself is asked (not inside a job).

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the field's full name.
    """
    if not isinstance(body, dict):
        raise InvalidParameter("body must be an object", param="body")
    given = {k: v for k, v in body.items() if v is not None}
    for name, value in given.items():
        if name in _REFUSED or (name in _NO_OPS and value not in _NO_OPS[name]):
            raise UnknownParameter(f"{name} is not served; leave it out", param=name)
        if name not in FIELDS:
            message = f"{name[:80]} is not a field of {RESPONSES}{meant(name, FIELDS)}"
            raise UnknownParameter(message, param=name[:80])
    model, labels = model_of(given), labels_of(given)
    if "input" not in given:
        raise MissingParameter("input is required", param="input")
    instructions = given.get("instructions")
    if instructions is not None and not (isinstance(instructions, str) and instructions):
        raise InvalidParameter("instructions must be a non-empty string", param="instructions")
    previous = given.get("previous_response_id")
    if previous is not None and not (isinstance(previous, str) and is_id(previous, "resp")):
        raise InvalidParameter("previous_response_id must be the id of a response", param="previous_response_id")
    stream, background, stored = _ways(given, streaming)
    fields, text = _generation(given)
    shown = {
        "instructions": instructions,
        "max_output_tokens": given.get("max_output_tokens"),
        "previous_response_id": previous,
        "text": text,
        "top_logprobs": given.get("top_logprobs", 0),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "tool_choice": given.get("tool_choice", "auto"),
        "background": background,
        "store": stored,
        "metadata": labels,
        **{name: given[name] for name in LABELS if name in given and name != "metadata"},
    }
    return ResponseRequest(
        model, messages_of(given["input"]), fields, labels, shown, stream, background, stored, instructions, previous,
        template_variables=template_variables_of(given.get("chat_template_kwargs", {})),
        parse_special=parse_special_of(given),
    )  # fmt: skip


def _ways(given: Mapping[str, Any], streaming: bool) -> tuple[bool, bool, bool]:
    """stream, background, store."""
    made = []
    for name, usual in (("stream", False), ("background", False), ("store", True)):
        value = given.get(name, usual)
        if not isinstance(value, bool):
            raise InvalidParameter(f"{name} must be true or false", param=name)
        if not streaming and value != usual:
            reason = {"stream": "a job does not stream its answer; read /v1/jobs/{id}/events",
                      "background": "a job is always in the background",
                      "store": "of a job, deadlines.retain_for says how long it is kept"}[name]  # fmt: skip
            raise InvalidParameter(f"{name}: {reason}", param=name)
        made.append(value)
    stream, background, stored = made
    if background and not stored:
        raise InvalidParameter("store false contradicts background true: nobody could read it", param="store")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_obfuscation"} or options.get("include_obfuscation"):
        message = "stream_options takes include_obfuscation alone, which must be false"
        raise InvalidParameter(message, param="stream_options")
    if options and not stream:
        raise InvalidParameter("stream_options has no effect without stream", param="stream_options")
    return stream, background, stored


def _generation(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The generation fields by our names, and `text` as the response's object shows it."""
    fields = {name: given[name] for name in _SAME if name in given}
    if "max_output_tokens" in given:
        fields["max_tokens"] = given["max_output_tokens"]
    diffusion = given.get("diffusion")
    if isinstance(diffusion, Mapping) and diffusion.get("visualize"):
        message = f"diffusion.visualize does not fit {RESPONSES}: its deltas are append-only"
        raise InvalidParameter(message, param="diffusion.visualize")
    include = given.get("include", [])
    if not isinstance(include, list) or any(name != LOGPROBS for name in include):
        raise InvalidParameter(f"include takes {LOGPROBS} alone", param="include")
    if include or "top_logprobs" in given:
        fields |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    text = given.get("text", {})
    if not isinstance(text, dict):
        raise InvalidParameter("text must be an object", param="text")
    for name in text:
        if name != "format":
            raise UnknownParameter(f"text.{name[:80]} is not served; leave it out", param=f"text.{name[:80]}")
    form = text.get("format") or {"type": "text"}
    fields["response_format"] = _response_format(form)
    return fields, {"format": form}


def _response_format(form: Any) -> Any:
    """`text.format` in the form of chat's `response_format`, which nests the schema."""
    if not isinstance(form, dict):
        raise InvalidParameter("text.format must be an object with a type", param="text.format")
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}


def messages_of(value: Any) -> Messages:
    """The messages of `input`. Raises InvalidParameter, UnknownParameter."""
    if isinstance(value, str) and value:
        return (("user", value),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        message = f"input must be a non-empty string or a list of 1 to {MAX_MESSAGES} messages"
        raise InvalidParameter(message, param="input")
    return tuple(_message(item, f"input[{i}]") for i, item in enumerate(value))


def _message(item: Any, at: str) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise InvalidParameter(f"{at} must be an object", param=at)
    kind = item.get("type", "message")
    if kind != "message":
        raise InvalidParameter(f"{at}.type must be message; {str(kind)[:80]!r} is not served", param=f"{at}.type")
    for name in item:
        if name not in _ITEM:
            raise UnknownParameter(f"{at}.{name[:80]} is not served", param=f"{at}.{name[:80]}")
    role = item.get("role")
    if role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
    return "system" if role == "developer" else role, _content(item.get("content"), f"{at}.content")


def _content(content: Any, at: str) -> str:
    if isinstance(content, list):
        pieces: list[str] = []
        for i, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") not in _TEXT_PARTS
                or not isinstance(part.get("text"), str)
            ):
                raise InvalidParameter(f"{at}[{i}] must be a text part", param=f"{at}[{i}]")
            pieces.append(part["text"])
        content = "".join(pieces)
    if not isinstance(content, str) or not content:
        raise InvalidParameter(f"{at} must be a non-empty string or a list of text parts", param=at)
    return content


def next_messages(task: ResponseTask, output: Sequence[Mapping[str, Any]]) -> Messages:
    """What was said up to the end of a finished response."""
    answers = [("assistant", part["text"]) for item in output for part in item["content"] if part["text"]]
    return (*task.messages, *answers)
