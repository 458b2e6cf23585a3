"""The models' tokenizers over HTTP, in vLLM's shapes, which are what lm-eval's remote tokenizer
speaks.

The files come from the worker's registration (`shared.served_models`), so the answer is what the
engine itself would say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends

from api.auth import principal_of
from api.dependencies import Context, ContextDep, JsonBody
from shared import serving
from shared.errors import InvalidParameter, MissingParameter, ModelNotFound
from shared.jobs.fields import opened, template_variables_of
from shared.jobs.messages import messages_of
from shared.jobs.service import THREAD_CHARACTERS, Served
from shared.prompt_ids import (
    PARSE_SPECIAL,
    check_ids,
    count_characters,
    parse_special_of,
    refuse_long_messages,
    refuse_too_long,
)
from shared.tokenizer import TokenizerWrapper

router = APIRouter(tags=["tokenizer"], dependencies=[Depends(principal_of)])  # any key will do

MAX_TOKENS = 131_072  # of one request, or the model's context if that is larger
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TOKENIZE_FIELDS = (
    "model",
    "prompt",
    "messages",
    "chat_template_kwargs",
    PARSE_SPECIAL,
    "add_special_tokens",
    "add_generation_prompt",
    "return_token_strs",
)


def _schema(*fields: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    shape = {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {f: {} for f in fields},
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape}}}}


async def served(context: Context, name: Any) -> Served:
    """The model with its tokenizer; without a name the only one that has live workers, or that
    there is.

    Raises:
        ModelNotFound, InvalidParameter: none, or several to choose from.
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise InvalidParameter("model must be a non-empty string", param="model")
    if name is None:
        models = await context.models.all()
        async with context.database.read() as session:
            statement = serving.live_workers(stale_seconds=context.settings.worker_stale_seconds)
            live = {row.model for row in (await session.execute(statement)).all()}
        names = [m.name for m in models if m.name in live] or [m.name for m in models]
        if not names:
            raise ModelNotFound(
                "no model was ever served here; is a worker running?", param="model"
            )
        if len(names) > 1:
            raise InvalidParameter(
                f"several models are served; say which as model: {', '.join(names)}", param="model"
            )
        name = names[0]
    model = await context.models.get(name)
    return model, await context.models.tokenizer(model)


def chat_template_of(tokenizer: TokenizerWrapper) -> str | None:
    """Its text, as the model's files have it."""
    found: Any = tokenizer.files().get("chat_template.jinja") or tokenizer.config.get(
        "chat_template"
    )
    if isinstance(found, list):  # named templates: the one called "default"
        found = next((t["template"] for t in found if t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def pieces(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> list[str]:
    """The vocabulary's own text of each token, not what it reads as."""
    texts = {token: text for text, token in tokenizer.vocabulary().items()}
    return [texts.get(i, "") for i in ids]


@router.get("/tokenizer_info")
async def tokenizer_info(context: ContextDep, model: str | None = None) -> dict[str, Any]:
    """Special tokens, chat template and sizes of a model's tokenizer."""
    found, tokenizer = await served(context, model)
    names = ("bos_token", "eos_token", "pad_token", "mask_token")
    return {
        "model": found.name,
        "tokenizer_class": tokenizer.config.get("tokenizer_class"),
        **{name: tokenizer.special_tokens.get(name) for name in names},
        "chat_template": chat_template_of(tokenizer),
        "model_max_length": found.card.context_length,
        "vocab_size": tokenizer.vocab_size,
    }


@router.post(TOKENIZE, openapi_extra=_schema(*TOKENIZE_FIELDS))
async def tokenize(body: JsonBody, context: ContextDep) -> dict[str, Any]:
    """Return the token ids that a text or messages have as a prompt, with the same rules and
    errors.
    """
    given = opened(TOKENIZE, body, TOKENIZE_FIELDS)
    flags = {}
    for flag, usual in (
        ("add_special_tokens", False),
        ("add_generation_prompt", True),
        ("return_token_strs", False),
    ):
        flags[flag] = given.get(flag, usual)
        if not isinstance(flags[flag], bool):
            raise InvalidParameter(f"{flag} must be true or false", param=flag)
    if ("prompt" in given) == ("messages" in given):
        kind = InvalidParameter if "prompt" in given else MissingParameter
        raise kind("give either prompt or messages", param="prompt")
    if "prompt" in given and not isinstance(given["prompt"], str):
        raise InvalidParameter("prompt must be a string", param="prompt")
    for name in ("add_generation_prompt", "chat_template_kwargs"):
        if "prompt" in given and given.get(name):
            raise InvalidParameter(f"{name} has no effect without messages", param=name)
    variables = template_variables_of(given.get("chat_template_kwargs", {}))
    parse_special, around = parse_special_of(given), flags["add_special_tokens"]
    messages = messages_of(given["messages"]) if "messages" in given else []
    model, tokenizer = await served(context, given.get("model"))

    def encode() -> list[int]:
        most = max(MAX_TOKENS, model.card.context_length)
        if "prompt" in given:
            refuse_too_long([given["prompt"]], "prompt", model.card, tokenizer, most=most)
            ids = tokenizer.encode(
                given["prompt"], around, parse_special=parse_special is not False
            )
            return check_ids(ids, "prompt", model.card)
        refuse_long_messages(
            messages, "messages", model.card, tokenizer, variables=variables, most=most
        )
        ids = tokenizer.encode_chat(
            messages,
            variables,
            add_generation_prompt=flags["add_generation_prompt"],
            add_special_tokens=around,
            parse_special=bool(parse_special),
        )
        return check_ids(ids, "messages", model.card)

    length = len(given["prompt"]) if "prompt" in given else count_characters(messages)
    ids = await asyncio.to_thread(encode) if length > THREAD_CHARACTERS else encode()
    return {
        "count": len(ids),
        "max_model_len": model.card.context_length,
        "tokens": ids,
        "token_strs": await asyncio.to_thread(pieces, tokenizer, ids)
        if flags["return_token_strs"]
        else None,
    }


@router.post(DETOKENIZE, openapi_extra=_schema("model", "tokens", required=("tokens",)))
async def detokenize(body: JsonBody, context: ContextDep) -> dict[str, Any]:
    """The text of token ids, special tokens written out."""
    given = opened(DETOKENIZE, body, ("model", "tokens"))
    if "tokens" not in given:
        raise MissingParameter("tokens is required", param="tokens")
    model, tokenizer = await served(context, given.get("model"))
    tokens = given["tokens"]
    size, most = model.card.vocab_size, max(MAX_TOKENS, model.card.context_length)
    if isinstance(tokens, list) and len(tokens) > most:
        raise InvalidParameter(
            f"tokens takes at most {most} token ids, not {len(tokens)}", param="tokens"
        )
    if not isinstance(tokens, list) or not all(
        isinstance(t, int) and not isinstance(t, bool) and 0 <= t < size for t in tokens
    ):
        raise InvalidParameter(
            f"tokens must be a list of token ids from 0 to {size - 1}", param="tokens"
        )
    return {"prompt": await asyncio.to_thread(tokenizer.decode, tokens, skip_special_tokens=False)}
