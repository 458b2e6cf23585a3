"""`/v1/responses`, OpenAI's Responses API: its body, checked. Pure; what comes out is in
`shared.jobs.response_objects`.

It is a chat with another form: `instructions` are the system message, `input` a text or messages,
`text.format` the `response_format`. Tools, stored prompts, conversations and whatever else vdiff
does not have are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.ids import is_id
from shared.jobs.fields import LABELS, labels_of, meant, model_of, template_variables_of
from shared.jobs.messages import MAX_MESSAGES, content_of, role_of
from shared.jobs.no_ops import changes_nothing, is_nothing, stream_options_of, with_effect
from shared.jobs.requests import ParsedRequest, Resolved
from shared.jobs.responses import RESPONSES
from shared.jobs.tasks import ResponseTask
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL, parse_special_of
from shared.tokenizer import TokenizerWrapper

Messages = tuple[tuple[str, str], ...]  # role and content

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = (
    "reasoning.encrypted_content"  # what agents always ask for; nothing reasons, so there is none
)
# Fields of other endpoints of ours that have the same meaning here.
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "diffusion",
)
_OWN = (
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "include",
    "top_logprobs",
    "previous_response_id",
    "background",
    "store",
    "stream",
    "stream_options",
    "chat_template_kwargs",
    PARSE_SPECIAL,
)
FIELDS = (*_OWN, *_SAME, *LABELS, "parallel_tool_calls", "tool_choice")
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
        return len(self.instructions or "") + sum(
            len(text) for _, text in (*(self.earlier or ()), *self.messages)
        )

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
            RESPONSES,
            self.model,
            None,
            None,
            [{"role": r, "content": c} for r, c in (*system, *said)],
            self.fields,
            False,
            False,
            {},
            self.template_variables,
            {
                "max_tokens": "max_output_tokens",
                "response_format.json_schema": "text.format",
                "response_format": "text.format",
                "messages": "input",
            },
            self.parse_special,
        )
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
    given = with_effect(
        body, FIELDS, lambda name: f"{name[:80]} is not a field of {RESPONSES}{meant(name, FIELDS)}"
    )
    model, labels = model_of(given), labels_of(given)
    if "input" not in given:
        raise MissingParameter("input is required", param="input")
    for name in ("parallel_tool_calls", "tool_choice"):
        if not changes_nothing(name, given.get(name), body):
            raise UnknownParameter(f"{name} is not served; leave it out", param=name)
    instructions = None if given.get("instructions") == "" else given.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise InvalidParameter("instructions must be a string", param="instructions")
    previous = given.get("previous_response_id")
    if previous is not None and not (isinstance(previous, str) and is_id(previous, "resp")):
        raise InvalidParameter(
            "previous_response_id must be the id of a response", param="previous_response_id"
        )
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
        model,
        messages_of(given["input"]),
        fields,
        labels,
        shown,
        stream,
        background,
        stored,
        instructions,
        previous,
        template_variables=template_variables_of(given.get("chat_template_kwargs", {})),
        parse_special=parse_special_of(given),
    )


def _ways(given: Mapping[str, Any], streaming: bool) -> tuple[bool, bool, bool]:
    """stream, background, store."""
    made = []
    for name, usual in (("stream", False), ("background", False), ("store", True)):
        value = given.get(name, usual)
        if not isinstance(value, bool):
            raise InvalidParameter(f"{name} must be true or false", param=name)
        if not streaming and value != usual:
            reason = {
                "stream": "a job does not stream its answer; read /v1/jobs/{id}/events",
                "background": "a job is always in the background",
                "store": "of a job, deadlines.retain_for says how long it is kept",
            }[name]
            raise InvalidParameter(f"{name}: {reason}", param=name)
        made.append(value)
    stream, background, stored = made
    if background and not stored:
        raise InvalidParameter(
            "store false contradicts background true: nobody could read it", param="store"
        )
    if "include_usage" in stream_options_of(given.get("stream_options")):
        message = "stream_options.include_usage is not served: a response carries its usage"
        raise InvalidParameter(message, param="stream_options.include_usage")
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
    if not isinstance(include, list) or any(name not in (LOGPROBS, ENCRYPTED) for name in include):
        raise InvalidParameter(f"include takes {LOGPROBS} alone", param="include")
    if LOGPROBS in include or not changes_nothing("top_logprobs", given.get("top_logprobs"), given):
        fields |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    text = given.get("text", {})
    if not isinstance(text, dict):
        raise InvalidParameter("text must be an object", param="text")
    for name, value in text.items():
        if (
            name != "format"
            and not (name == "verbosity" and changes_nothing(name, value, text))
            and value is not None
        ):
            raise UnknownParameter(
                f"text.{name[:80]} is not served; leave it out", param=f"text.{name[:80]}"
            )
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
    if isinstance(value, str):
        return (("user", value),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        message = f"input must be a string or a list of 1 to {MAX_MESSAGES} messages"
        raise InvalidParameter(message, param="input")
    made = tuple(filter(None, (_message(item, f"input[{i}]") for i, item in enumerate(value))))
    if not made:
        raise InvalidParameter("input has no message", param="input")
    return made


def _message(item: Any, at: str) -> tuple[str, str] | None:
    """Return role and text; None for an item that says nothing."""
    if not isinstance(item, dict):
        raise InvalidParameter(f"{at} must be an object", param=at)
    given = {k: v for k, v in item.items() if v is not None}
    kind = given.get("type", "message")
    if kind == "reasoning" and all(
        is_nothing(v) for k, v in given.items() if k not in ("type", "id", "status")
    ):
        return None
    if kind != "message":
        raise InvalidParameter(
            f"{at}.type must be message; {str(kind)[:80]!r} is not served", param=f"{at}.type"
        )
    for name in given:
        if name not in _ITEM:
            raise UnknownParameter(
                f"{at}.{name[:80]} is not served; leave it out", param=f"{at}.{name[:80]}"
            )
    for name in ("id", "status", "phase"):
        if not isinstance(given.get(name, ""), str):
            raise InvalidParameter(f"{at}.{name} must be a string", param=f"{at}.{name}")
    return role_of(given, at), content_of(given, at, _TEXT_PARTS)


def next_messages(task: ResponseTask, output: Sequence[Mapping[str, Any]]) -> Messages:
    """Return the messages of the conversation up to the end of a finished response."""
    answers = [
        ("assistant", part["text"]) for item in output for part in item["content"] if part["text"]
    ]
    return (*task.messages, *answers)
