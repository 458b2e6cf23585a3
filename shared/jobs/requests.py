"""The bodies of the generation endpoints, checked: what a job asks for, whoever accepts it. Pure;
no FastAPI.

`shared.jobs.bodies` has the one way in, for these and for the other endpoints.

`parse` takes the body of an endpoint and gives prompt and generation fields; every field is known
or refused by name. A field that vdiff does not serve is accepted at the value that changes nothing
(`shared.jobs.no_ops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from shared.errors import InvalidParameter, InvalidRequest, MissingParameter
from shared.jobs.fields import LABELS, labels_of, meant, model_of, template_variables_of
from shared.jobs.messages import messages_of
from shared.jobs.no_ops import changes_nothing, stream_options_of, with_effect
from shared.jobs.responses import CHAT, COMPLETIONS, RESPONSES
from shared.jobs.tasks import TASK, Task
from shared.model_card import ModelCard
from shared.prompt_ids import (
    PARSE_SPECIAL,
    count_characters,
    message_ids,
    parse_special_of,
    prompt_ids,
)
from shared.sampling_params import GENERATION_FIELDS, SamplingParams, resolve_params
from shared.stop_strings import check_stops
from shared.tokenizer import TokenizerWrapper

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
    """One generation request, its shape checked; values are checked by `resolve_params` against the
    model.
    """

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
    renamed: dict[str, str] = field(
        default_factory=dict
    )  # our name of a field -> the one that the client used
    parse_special: bool | None = (
        None  # whether special tokens in the prompt's text are tokens; None: as usual there
    )

    @property
    def characters(self) -> int:
        """Length of the prompt's text."""
        return len(self.prompt or "") + count_characters(self.messages or ())

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Tokens and parameters. Raises InvalidParameter, PromptTooLong."""
        ids = self.tokens(card, tokenizer)
        params = self.params(card, tokenizer, len(ids))
        return Resolved(ids, params, len(ids) + params.max_tokens * params.n)

    def params(
        self, card: ModelCard, tokenizer: TokenizerWrapper, prompt_tokens: int
    ) -> SamplingParams:
        """Return the parameters, complete and checked.

        Raises what `resolve_params` and `check_stops` raise, with the client's own field names.
        """
        try:
            chat = self.endpoint in (CHAT, RESPONSES)
            params = resolve_params(self.fields, card=card, prompt_tokens=prompt_tokens, chat=chat)
            check_stops(params.stop, card, tokenizer)
            return params
        except InvalidRequest as exc:
            raise self._as_written(exc) from exc

    def _as_written(self, exc: InvalidRequest) -> InvalidRequest:
        """The error with the names that the client used, inner ones too."""
        for ours, theirs in self.renamed.items():
            if exc.param is not None and (
                exc.param == ours or exc.param.startswith((f"{ours}.", f"{ours}["))
            ):
                param = theirs + exc.param[len(ours) :]
                return type(exc)(exc.message.replace(ours, theirs), param=param, code=exc.code)
        return exc

    def tokens(self, card: ModelCard, tokenizer: TokenizerWrapper) -> list[int]:
        """Return the prompt's token ids, at least one. Raises InvalidParameter."""
        where = "messages" if self.messages is not None else "prompt"
        try:
            if self.messages is not None:
                ids = message_ids(
                    self.messages,
                    where,
                    card,
                    tokenizer,
                    variables=self.template_variables,
                    parse_special=self.parse_special,
                )
            else:
                prompt = self.prompt if self.prompt is not None else self.prompt_token_ids or []
                ids = prompt_ids(prompt, where, card, tokenizer, parse_special=self.parse_special)
            if not ids:
                raise InvalidParameter(f"{where} is empty", param=where)
        except InvalidRequest as exc:
            raise self._as_written(exc) from exc
        return ids


def prompt_of(value: Any, param: str = "prompt") -> tuple[str | None, list[int] | None]:
    """Text or token ids, the other being None. Raises InvalidParameter."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str) and value:
        return value, None
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        return None, value
    if isinstance(value, list) and any(isinstance(v, str | list) for v in value):
        raise InvalidParameter(
            f"{param} must be a string, token ids, or a list of such", param=param
        )
    raise InvalidParameter(
        f"{param} must be a non-empty string or a non-empty list of token ids", param=param
    )


def refuse_without_text() -> NoReturn:
    """Raises InvalidParameter: `parse_special` is false, and the prompt is token ids."""
    raise InvalidParameter(
        f"{PARSE_SPECIAL} has no effect on token ids; leave it out", param=PARSE_SPECIAL
    )


def parse(endpoint: str, body: Any, *, streaming: bool) -> ParsedRequest:
    """Check the shape of a body that asks for an answer; of the others, `shared.jobs.bodies.parse`.

    Args:
        endpoint: `CHAT` or `COMPLETIONS`.
        streaming: whether `stream` may be asked for (not inside a job).

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the field's full name.
    """
    chat = endpoint == CHAT
    own = {"model", "messages", "chat_template_kwargs"} if chat else {"model", "prompt"}
    own |= {PARSE_SPECIAL, *GENERATION_FIELDS, *LABELS, *_STREAMING}
    hints = own | {"max_completion_tokens"} if chat else own
    renamed = {}
    if chat and isinstance(body, dict) and body.get("max_completion_tokens") is not None:
        if body.get("max_tokens") is None:
            renamed["max_tokens"] = "max_completion_tokens"
            body = {**body, "max_tokens": body["max_completion_tokens"]}
        elif not changes_nothing("max_completion_tokens", body["max_completion_tokens"], body):
            message = "max_completion_tokens and max_tokens differ; give one of them"
            raise InvalidParameter(message, param="max_completion_tokens")
    body = with_effect(
        body, own, lambda name: f"{name[:80]} is not a field of {endpoint}{meant(name, hints)}"
    )
    model = model_of(body)
    fields = {k: body[k] for k in GENERATION_FIELDS if k in body}
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
        endpoint,
        model,
        prompt,
        ids,
        messages,
        fields,
        stream,
        include_usage,
        labels,
        variables,
        renamed,
        parse_special,
    )


def _stream(body: Mapping[str, Any], streaming: bool) -> tuple[bool, bool]:
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidParameter("stream must be true or false", param="stream")
    if stream and not streaming:
        raise InvalidParameter(
            "a job does not stream its answer; read /v1/jobs/{id}/events", param="stream"
        )
    options = stream_options_of(body.get("stream_options"))
    if options and not stream:
        raise InvalidParameter(
            "stream_options has no effect without stream", param="stream_options"
        )
    return stream, "include_usage" in options


__all__ = ["CHAT", "COMPLETIONS", "ParsedRequest", "messages_of", "parse", "prompt_of"]
