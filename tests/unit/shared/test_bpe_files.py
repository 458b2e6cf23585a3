"""A folder without tokenizer.json: the same ids as the published tokenizer, or an error that says
what does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelLoadError
from shared.tokenizer import TokenizerWrapper
from tests.unit.engine.golden_cases import GOLDEN, REFERENCES

PUBLISHED = json.loads((GOLDEN / "dream" / "tokenizer.json").read_text())
CONFIG = json.loads((GOLDEN / "dream" / "tokenizer_config.json").read_text())
TEXTS = [
    "2026 is 12 more than 2014",
    "don't WE'LL I'm",
    "a\u0301 cafe\u0301 \u212b",
    " \t \n\n  x \r\n y",
    "x_y->z == !!??\n\n",
    "<|im_start|>user\nhi<|im_end|> <|mask|><|mask|> <|endoftext|>",
    "今天天气很好。🙂",
    "",
    " ",
]


def parts(folder: Path, **config: Any) -> Path:
    """The golden Dream tokenizer as Dream's repository publishes its own: no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(PUBLISHED["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in PUBLISHED["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    made = {
        k: v
        for k, v in (CONFIG | {"tokenizer_class": "DreamTokenizer"} | config).items()
        if v is not None
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(made))
    return folder


def test_the_parts_say_what_the_published_tokenizer_says(tmp_path: Path) -> None:
    made, published = (
        TokenizerWrapper.from_folder(parts(tmp_path)),
        TokenizerWrapper.from_folder(GOLDEN / "dream"),
    )
    texts = [check["text"] for check in REFERENCES["dream"]["tokenizer_checks"]]
    # The golden file splits numbers and ends of lines as GPT-2 does; the test below has those,
    # against transformers.
    alike = [
        text
        for text in texts
        if not any(sign.isdigit() or (sign.isspace() and sign != " ") for sign in text)
    ]
    assert len(alike) >= 3
    for text in alike:
        assert made.encode(text) == published.encode(text), text
    assert made.vocabulary() == published.vocabulary()
    assert made.special_id("mask_token") == published.special_id("mask_token")
    assert made.decode(made.encode(TEXTS[5])) == published.decode(published.encode(TEXTS[5]))
    assert (
        made.encode_chat([{"role": "user", "content": "hi"}]).count(481) == 3
    )  # <|im_start|>: system, user, assistant
    again = TokenizerWrapper.from_files(made.files())  # what the worker registers for the API
    assert [again.encode(text) for text in TEXTS] == [made.encode(text) for text in TEXTS]


@pytest.mark.parametrize("listing", ["added_tokens_decoder", "added_tokens.json"])
def test_texts_are_split_as_transformers_splits_them(tmp_path: Path, listing: str) -> None:
    """Digits, contractions, composed letters and white space, where Qwen2 differs from the golden
    file's plain ByteLevel.
    """
    from transformers import Qwen2Tokenizer

    folder = parts(tmp_path, tokenizer_class="Qwen2Tokenizer")
    if listing == "added_tokens.json":  # as transformers 4 wrote it before 4.34
        tokens = CONFIG["added_tokens_decoder"]
        (folder / "added_tokens.json").write_text(
            json.dumps({t["content"]: int(i) for i, t in tokens.items()})
        )
        parts(tmp_path, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=None)
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    ours = TokenizerWrapper.from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert len(ours.encode("2014")) == 4 and ours.encode("a\u0301") == ours.encode("\u00e1")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ModelLoadError, match=match):
            TokenizerWrapper.from_folder(tmp_path)

    parts(tmp_path, tokenizer_class="GPT2Tokenizer")
    refused("tokenizer_class 'GPT2Tokenizer'")
    parts(tmp_path, added_tokens_decoder={"700": {"content": "<|far|>", "special": True}})
    refused(r"'<\|far\|>' would get id 480, not its own 700")
    parts(tmp_path, added_tokens_decoder={"480": "<|endoftext|>"})
    refused("malformed added tokens")
    (parts(tmp_path) / "merges.txt").write_text("#version: 0.2\nh e\nthree of them\n")
    refused(r"merges\.txt, line 3")
    (tmp_path / "merges.txt").write_text("nowhere tobefound\n")
    refused("do not fit")
    (tmp_path / "vocab.json").write_text("[]")
    refused(r"vocab\.json is not an object")
    (tmp_path / "merges.txt").unlink()
    refused(r"nor vocab\.json with merges\.txt")
