"""The bodies of the generation endpoints, checked: what a job asks for, whoever accepts it. Pure; no FastAPI.

`shared.jobs.bodies` has the one way in, for these and for the other endpoints.

`parse` takes the body of an endpoint and gives prompt and generation fields; every field is known or refused by name.
OpenAI fields that vdiff does not serve are accepted only at the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from shared.errors import InvalidParameter, InvalidRequest, MissingParameter, UnknownParameter
from shared.jobs.fields import LABELS, labels_of, meant, model_of, template_variables_of
from shared.jobs.responses import CHAT, COMPLETIONS, RESPONSES
from shared.jobs.tasks import TASK, Task
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL, message_ids, parse_special_of, prompt_ids
from shared.sampling_params import GENERATION_FIELDS, SamplingParams, resolve_params
from shared.tokenizer import TokenizerWrapper

ROLES = ("system", "user", "assistant", "developer")
MAX_MESSAGES = 1000
MAX_NAME = 256
# OpenAI's own fields and the values at which they change nothing; `user` and the like only label a request.
OPENAI_NO_OPS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "store": (False,), "tools": ([],),
    "parallel_tool_calls": (True, False), "modalities": (["text"],),
}  # fmt: skip
# What else OpenAI's endpoints take; a test compares these lists with the SDK's own.
OPENAI_REFUSED = (
    "audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_options", "prompt_cache_retention",
    "reasoning_effort", "tool_choice", "verbosity", "web_search_options",
)  # fmt: skip
_STREAMING = ("stream", "stream_options")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request decided for its model: what is stored with the job."""

    prompt_token_ids: list[int]
    params: SamplingParams
    tokens: int  # of what goes in, and at most of what comes out
    task: Task | None = None

    def params_json(self) -> dict[str, Any]:
        made = self.params.to_json()
        return made if self.task is None else {**made, TASK: self.task.to_json()}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """One generation request, its shape checked; values are checked by `resolve_params` against the model."""

    endpoint: str
    model: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    messages: list[dict[str, str]] | None
    fields: dict[str, Any]
    stream: bool
    include_usage: bool
    metadata: dict[str, str]
    template_variables: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)  # our name of a field -> the one that the client used
    parse_special: bool | None = None  # whether special tokens in the prompt's text are tokens; None: as usual there

    @property
    def characters(self) -> int:
        """Length of the prompt's text."""
        return len(self.prompt or "") + sum(len(m["content"]) for m in self.messages or ())

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Tokens and parameters. Raises InvalidParameter, PromptTooLong."""
        ids = self.tokens(card, tokenizer)
        params = self.params(card, len(ids))
        return Resolved(ids, params, len(ids) + params.max_tokens * params.n)

    def params(self, card: ModelCard, prompt_tokens: int) -> SamplingParams:
        """The parameters, complete and checked. Raises what `resolve_params` raises, with the client's own field names."""
        try:
            chat = self.endpoint in (CHAT, RESPONSES)
            return resolve_params(self.fields, card=card, prompt_tokens=prompt_tokens, chat=chat)
        except InvalidRequest as exc:
            raise self._as_written(exc) from exc

    def _as_written(self, exc: InvalidRequest) -> InvalidRequest:
        """The error with the names that the client used, inner ones too."""
        for ours, theirs in self.renamed.items():
            if exc.param is not None and (exc.param == ours or exc.param.startswith((f"{ours}.", f"{ours}["))):
                param = theirs + exc.param[len(ours) :]
                return type(exc)(exc.message.replace(ours, theirs), param=param, code=exc.code)
        return exc

    def tokens(self, card: ModelCard, tokenizer: TokenizerWrapper) -> list[int]:
        """Return the prompt's token ids, at least one. Raises InvalidParameter."""
        where = "messages" if self.messages is not None else "prompt"
        try:
            if self.messages is not None:
                ids = message_ids(
                    self.messages, where, card, tokenizer,
                    variables=self.template_variables, parse_special=self.parse_special,
                )  # fmt: skip
            else:
                prompt = self.prompt if self.prompt is not None else self.prompt_token_ids or []
                ids = prompt_ids(prompt, where, card, tokenizer, parse_special=self.parse_special)
            if not ids:
                raise InvalidParameter(f"{where} is empty", param=where)
        except InvalidRequest as exc:
            raise self._as_written(exc) from exc
        return ids


def messages_of(value: Any) -> list[dict[str, str]]:
    """Chat messages with text content. Raises InvalidParameter, UnknownParameter."""
    if not isinstance(value, list) or not value:
        raise InvalidParameter("messages must be a list of at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidParameter(f"messages takes at most {MAX_MESSAGES} messages", param="messages")
    made = []
    for i, message in enumerate(value):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidParameter(f"{at} must be an object", param=at)
        message = {k: v for k, v in message.items() if v is not None}  # an answer of ours has `refusal: null`
        for name in message:
            if name not in ("role", "content", "name"):
                raise UnknownParameter(f"{at}.{name[:80]} is not supported", param=f"{at}.{name[:80]}")
        role = message.get("role")
        if role not in ROLES:
            raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
        name = message.get("name", "")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise InvalidParameter(f"{at}.name must be a string of at most {MAX_NAME} characters", param=f"{at}.name")
        named = {"name": name} if name else {}  # whether it is said, the chat template decides
        made.append({"role": "system" if role == "developer" else role, "content": _content(message, at), **named})
    return made


def _content(message: Mapping[str, Any], at: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for j, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                where = f"{at}.content[{j}]"
                raise InvalidParameter(f"{where} must be a text part", param=where)
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str) or not content:
        raise InvalidParameter(f"{at}.content must be a non-empty string", param=f"{at}.content")
    return content


def prompt_of(value: Any, param: str = "prompt") -> tuple[str | None, list[int] | None]:
    """Text or token ids, the other being None. Raises InvalidParameter."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str) and value:
        return value, None
    if isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None, value
    if isinstance(value, list) and any(isinstance(v, str | list) for v in value):
        raise InvalidParameter(f"{param} must be a string, token ids, or a list of such", param=param)
    raise InvalidParameter(f"{param} must be a non-empty string or a non-empty list of token ids", param=param)


def refuse_without_text() -> NoReturn:
    """Raises InvalidParameter: `parse_special` is false, and the prompt is token ids."""
    raise InvalidParameter(f"{PARSE_SPECIAL} has no effect on token ids; leave it out", param=PARSE_SPECIAL)


def is_no_op(name: str, value: Any, **more: tuple[Any, ...]) -> bool:
    """Whether the field changes nothing at this value; `more` are values of fields that no-ops elsewhere are not."""
    values = more.get(name, OPENAI_NO_OPS.get(name, ()))
    return any(value == v and type(value) in (type(v), int, float) for v in values)


def parse(endpoint: str, body: Any, *, streaming: bool) -> ParsedRequest:
    """Check the shape of a body that asks for an answer; of the others, `shared.jobs.bodies.parse`.

    Args:
        endpoint: `CHAT` or `COMPLETIONS`.
        streaming: whether `stream` may be asked for (not inside a job).

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the field's full name.
    """
    if not isinstance(body, dict):
        raise InvalidParameter("body must be an object", param="body")
    body = {k: v for k, v in body.items() if v is not None}
    chat = endpoint == CHAT
    own = ("model", "messages", "max_completion_tokens", "chat_template_kwargs") if chat else ("model", "prompt")
    allowed = {*own, PARSE_SPECIAL, *GENERATION_FIELDS, *LABELS, *_STREAMING}
    for name, value in body.items():
        if is_no_op(name, value):
            continue
        if name in OPENAI_NO_OPS or name in OPENAI_REFUSED:
            raise UnknownParameter(f"{name} is not served; leave it out", param=name)
        if name not in allowed:
            message = f"{name[:80]} is not a field of {endpoint}{meant(name, allowed)}"
            raise UnknownParameter(message, param=name[:80])
    model = model_of(body)
    fields = {k: body[k] for k in GENERATION_FIELDS if k in body}
    renamed = {}
    if chat and "max_completion_tokens" in body:
        if "max_tokens" in fields:
            raise InvalidParameter("give max_completion_tokens or max_tokens, not both", param="max_completion_tokens")
        fields["max_tokens"] = body["max_completion_tokens"]
        renamed["max_tokens"] = "max_completion_tokens"
    labels = labels_of(body)
    stream, include_usage = _stream(body, streaming)
    prompt: str | None = None
    ids: list[int] | None = None
    messages: list[dict[str, str]] | None = None
    if chat:
        if "messages" not in body:
            raise MissingParameter("messages is required", param="messages")
        messages = messages_of(body["messages"])
    else:
        if "prompt" not in body:
            raise MissingParameter("prompt is required", param="prompt")
        prompt, ids = prompt_of(body["prompt"])
    variables = template_variables_of(body.get("chat_template_kwargs", {}))
    parse_special = parse_special_of(body)
    if parse_special is False and ids is not None:
        refuse_without_text()
    return ParsedRequest(
        endpoint, model, prompt, ids, messages, fields, stream, include_usage, labels, variables, renamed, parse_special
    )


def _stream(body: Mapping[str, Any], streaming: bool) -> tuple[bool, bool]:
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidParameter("stream must be true or false", param="stream")
    if stream and not streaming:
        raise InvalidParameter("a job does not stream its answer; read /v1/jobs/{id}/events", param="stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise InvalidParameter("stream_options takes include_usage alone", param="stream_options")
    if options.get("include_obfuscation", False) is not False:
        param = "stream_options.include_obfuscation"
        raise InvalidParameter(f"{param} must be false: nothing is obfuscated", param=param)
    if options and not stream:
        raise InvalidParameter("stream_options has no effect without stream", param="stream_options")
    include = options.get("include_usage", False)
    if not isinstance(include, bool):
        raise InvalidParameter(
            "stream_options.include_usage must be true or false", param="stream_options.include_usage"
        )
    return stream, include


__all__ = ["CHAT", "COMPLETIONS", "ParsedRequest", "messages_of", "parse", "prompt_of"]
