"""Text and ids, chat templates, and the text of a growing answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidParameter, ModelLoadError
from shared.tokenizer import IncrementalText, TokenizerWrapper
from vdiff import bundled

TINY = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
BARE = TokenizerWrapper.from_files({"tokenizer.json": TINY.files()["tokenizer.json"]})
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
STOPS = st.lists(st.text("abc é漢😀\n", min_size=1, max_size=4), max_size=4)


def with_template(template: str | None, **config: Any) -> TokenizerWrapper:
    return TokenizerWrapper(
        {
            **BARE.files(),
            "tokenizer_config.json": json.dumps(
                {"chat_template": template, "bos_token": "<b>", **config}
            ),
        }
    )


@given(PLAIN_TEXT)
def test_there_and_back(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text


def test_special_tokens() -> None:
    assert TINY.special_id("mask_token") == 752
    assert TINY.special_id("eos_token") == 751
    assert TINY.special_id("bos_token") is None or isinstance(TINY.special_id("bos_token"), int)
    assert TINY.token_id("<|user|>") in TINY.encode(
        "<|user|>hi"
    )  # parsed as such, as the published tokenizers do
    assert TINY.token_id("no such token") is None
    assert TINY.decode([*TINY.encode("hi"), 751]) == "hi"
    assert TINY.vocab_size == 757


def test_a_template_renders_and_refuses() -> None:
    assert (
        TINY.apply_chat_template([{"role": "user", "content": " hi "}])
        == "<|user|>hi<|eot_id|><|assistant|>"
    )
    assert TINY.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=False
    ).endswith("<|eot_id|>")
    strict = with_template("{{ raise_exception('no system message, please') }}")
    with pytest.raises(InvalidParameter, match="no system message, please") as wrong:
        strict.encode_chat([{"role": "system", "content": "x"}])
    assert wrong.value.param == "messages"
    assert not BARE.has_chat_template
    with pytest.raises(InvalidParameter, match="no chat template"):
        BARE.apply_chat_template([])


def test_templates_see_tokens_and_helpers() -> None:
    made = with_template(
        "{{ bos_token }}{{ messages | tojson }}{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert made.apply_chat_template([{"a": "é"}]).startswith('<b>[{"a": "é"}]20')
    named = with_template(None)
    assert not named.has_chat_template
    several = TokenizerWrapper(
        {
            **BARE.files(),
            "tokenizer_config.json": json.dumps(
                {
                    "chat_template": [
                        {"name": "tool", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            ),
        }
    )
    assert several.apply_chat_template([]) == "d"
    file = TokenizerWrapper({**BARE.files(), "chat_template.jinja": "from the file"})
    assert file.apply_chat_template([]) == "from the file"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_is_in_a_sandbox(template: str) -> None:
    with pytest.raises(InvalidParameter, match="refuses"):
        with_template(template).apply_chat_template([{"role": "user", "content": "x"}])


def test_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        TokenizerWrapper.from_folder(tmp_path)
    with pytest.raises(ModelLoadError, match="malformed"):
        TokenizerWrapper({"tokenizer.json": "{"})
    with pytest.raises(ModelLoadError, match="malformed"):
        TokenizerWrapper({**BARE.files(), "tokenizer_config.json": "{"})
    with pytest.raises(ModelLoadError, match="does not parse"):
        with_template("{% for %}")


def test_the_files_travel() -> None:
    again = TokenizerWrapper.from_files(json.loads(json.dumps(TINY.files())))
    assert again.encode_chat([{"role": "user", "content": "x"}]) == TINY.encode_chat(
        [{"role": "user", "content": "x"}]
    )


def grow(
    ids: list[int], stop: list[str], sizes: list[int]
) -> tuple[str, list[str], IncrementalText]:
    """Return the text that was shown piece by piece, when the committed prefix grows by `sizes`
    tokens at a time.
    """
    text = IncrementalText(TINY, stop)
    shown, at = [], 0
    for size in [*sizes, len(ids)]:
        if at >= len(ids) or text.stopped:
            break
        at = min(at + size, len(ids))
        shown.append(text.update(ids[:at]))
    shown.append(text.update(ids, final=True))
    return "".join(shown), shown, text


@settings(max_examples=300)
@given(
    ids=st.one_of(PLAIN_TEXT.map(TINY.encode), st.lists(st.integers(0, 756), max_size=24)),
    stop=STOPS,
    sizes=st.lists(st.integers(1, 4), max_size=30),
)
def test_a_growing_text_is_append_only_and_no_stop_string_leaks(
    ids: list[int], stop: list[str], sizes: list[int]
) -> None:
    whole, pieces, text = grow(ids, stop, sizes)
    full = TINY.decode(ids)
    assert full.startswith(whole)
    assert whole == text.text
    assert not any(s in whole for s in stop)
    assert text.stopped == (whole != full)
    assert text.stopped == any(s in full for s in stop)
    for piece in pieces:
        piece.encode("utf-8")


@given(text=st.text("é漢😀ß", min_size=1, max_size=12))
def test_half_a_character_is_held_back(text: str) -> None:
    ids = TINY.encode(text)
    seen = IncrementalText(TINY)
    for at in range(1, len(ids) + 1):
        assert "\ufffd" not in seen.update(ids[:at])
    assert seen.text == text


def test_what_may_become_a_stop_string_waits() -> None:
    ids = [TINY.encode(c)[0] for c in "abXYab"]
    text = IncrementalText(TINY, ["XYZ", "b!"])
    assert [text.update(ids[:n]) for n in range(1, 7)] == ["a", "", "b", "", "XYa", ""]
    assert text.update(ids, final=True) == "b"


def test_nothing_comes_after_a_stop_string() -> None:
    ids = [TINY.encode(c)[0] for c in "abcd"]
    text = IncrementalText(TINY, ["bc"])
    assert text.update(ids) == "a"
    assert text.stopped
    assert text.update(ids, final=True) == ""
    assert text.text == "a"
