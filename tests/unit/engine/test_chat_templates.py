"""Each family's own chat template gives what transformers gives; a model without one says so;
templates' own variables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from shared.errors import InvalidParameter, UnknownParameter
from shared.jobs.bodies import parse
from shared.jobs.responses import CHAT, RESPONSES
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper
from tests.unit.engine.golden_cases import GOLDEN
from vdiff import bundled

FOLDERS = {
    **{
        f: GOLDEN / f
        for f in ("llada", "dream", "llada_moe", "llada2_moe", "sdar", "diffusion_gemma")
    },
    "vdiff-tiny": bundled.folder(bundled.DEFAULT_MODEL),
}
CARD = ModelCard(
    name="m",
    family="llada",
    context_length=512,
    vocab_size=757,
    mask_token_id=752,
    end_token_ids=(751,),
    suppress_token_ids={},
    capabilities={},
)
USER = {"role": "user", "content": " What is é漢? \n"}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [USER],
    [{"role": "system", "content": "Be short."}, USER],
    [USER, {"role": "assistant", "content": "It is."}, {"role": "user", "content": "Sure?"}],
]
THINKING = (
    "{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% set x = 1 %}{{ x }}{{ bos_token }}"
)


def thinking() -> TokenizerWrapper:
    files = TokenizerWrapper.from_folder(FOLDERS["vdiff-tiny"]).files()
    return TokenizerWrapper(
        {
            **files,
            "tokenizer_config.json": json.dumps({"chat_template": THINKING, "bos_token": "<b>"}),
        }
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_the_models_own_template(name: str) -> None:
    folder: Path = FOLDERS[name]
    ours, theirs = (
        TokenizerWrapper.from_folder(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    assert ours.has_chat_template
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(messages) == text
        assert ours.encode_chat(messages) == theirs.encode(text, add_special_tokens=False)


def test_a_templates_own_variables() -> None:
    tokenizer = thinking()
    assert tokenizer.template_variables == {"enable_thinking"}
    for endpoint, body in (
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        (RESPONSES, {"input": "x"}),
    ):
        made = []
        for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            request = parse(
                endpoint, {"model": "m", **body, "chat_template_kwargs": variables}, streaming=True
            )
            chat = request if endpoint == CHAT else None
            if chat is not None:
                made.append(chat.tokens(CARD, tokenizer))  # type: ignore[union-attr]
                continue
            made.append(
                tokenizer.encode_chat(
                    [{"role": "user", "content": "x"}],
                    request.template_variables,  # type: ignore[union-attr]
                )
            )
        assert made[0] == made[1] != made[2] == tokenizer.encode("<user>x<no>1<b>")


def test_names_reach_the_template() -> None:
    request = parse(
        CHAT,
        {"model": "m", "messages": [{"role": "user", "content": "x", "name": "Ann"}]},
        streaming=True,
    )
    assert request.tokens(CARD, thinking()) == thinking().encode("<Ann>x1<b>")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["enable_thinkng", "messages", "bos_token", "add_generation_prompt", "tools", "x"]
)
def test_what_the_template_does_not_know_is_refused_by_name(name: str) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {name: "v"},
    }
    with pytest.raises(UnknownParameter, match="it has enable_thinking") as wrong:
        parse(CHAT, body, streaming=True).tokens(CARD, thinking())  # type: ignore[union-attr]
    assert wrong.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    "value",
    [[], "x", {"a": []}, {"a": {"b": 1}}, {"a": "x" * 5000}, {str(i): 1 for i in range(17)}],
)
def test_bad_variables(value: Any) -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": value,
    }
    with pytest.raises(InvalidParameter) as wrong:
        parse(CHAT, body, streaming=True)
    assert (wrong.value.param or "").startswith("chat_template_kwargs")
