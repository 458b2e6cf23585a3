"""`tokenizer.json` for repositories that publish `vocab.json` and `merges.txt` only, as Dream and
DiffuCoder do.

Their tokenizer is Python code (a copy of Qwen2's) and is not run here: the same byte-level BPE is
put together from its files. Only classes whose splitting of text is known are taken; another one
would tokenise differently without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from shared.errors import ModelLoadError

FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
# How Qwen2 splits a text before any merge: contractions, words with one sign before them, single
# digits, signs, white space.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_NAMES = (
    "unk_token",
    "bos_token",
    "eos_token",
    "pad_token",
    "mask_token",
    "sep_token",
    "cls_token",
)


def tokenizer_json(files: Mapping[str, str], *, source: str) -> str:
    """The content of a `tokenizer.json` that says the same as these files.

    Raises:
        ModelLoadError: the files are malformed, disagree, or belong to a tokenizer that is not
            known here.
    """
    config, special = (
        _object(files, name, source)
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    name = config.get("tokenizer_class")
    if name not in CLASSES:
        raise ModelLoadError(
            f"{source} has no tokenizer.json, and its vocab.json and merges.txt are built for the classes "
            f"{', '.join(CLASSES)} only, not tokenizer_class {name!r}"
        )
    vocabulary, merges = _object(files, "vocab.json", source), _merges(files["merges.txt"], source)
    try:
        model = BPE(vocab=vocabulary, merges=merges)
    except (
        Exception
    ) as exc:  # tokenizers raises plain Exception, for a merge of unknown tokens, say
        raise ModelLoadError(f"{source}: vocab.json and merges.txt do not fit: {exc}") from exc
    made = Tokenizer(model)
    made.normalizer = normalizers.NFC()
    prefixed = bool(config.get("add_prefix_space") or False)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    _add(made, files, config, special, source)
    return str(made.to_str())


def _object(files: Mapping[str, str], name: str, source: str) -> dict[str, Any]:
    try:
        read = json.loads(files.get(name, "{}"))
    except ValueError as exc:
        raise ModelLoadError(f"{source}: {name} is malformed: {exc}") from exc
    if not isinstance(read, dict):
        raise ModelLoadError(f"{source}: {name} is not an object")
    return read


def _merges(text: str, source: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: a merge may hold any other sign
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelLoadError(
                f"{source}: merges.txt, line {number}: wanted two tokens, got {line!r}"
            )
        merges.append((left, right))
    return merges


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _add(
    made: Tokenizer,
    files: Mapping[str, str],
    config: dict[str, Any],
    special: dict[str, Any],
    source: str,
) -> None:
    """Added tokens under their published ids; then the special ones that only have a name, as
    transformers adds them.
    """
    named = [_text(config.get(n)) or _text(special.get(n)) for n in _NAMES]
    for listing in (
        config.get("additional_special_tokens"),
        special.get("additional_special_tokens"),
    ):
        named += [_text(token) for token in listing or ()]
    specials = list(dict.fromkeys(text for text in named if text))
    wanted: dict[int, AddedToken] = {}
    try:
        for text, key in _object(files, "added_tokens.json", source).items():
            wanted[int(key)] = AddedToken(text, normalized=False, special=text in specials)
        for key, entry in (config.get("added_tokens_decoder") or {}).items():
            flags = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
            wanted[int(key)] = AddedToken(
                entry["content"], special=bool(entry.get("special", False)), **flags
            )
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ModelLoadError(f"{source}: malformed added tokens: {exc!r}") from exc
    for number in sorted(wanted):  # in the order of ids: `tokenizers` gives each new one the next
        token = wanted[number]
        (made.add_special_tokens if token.special else made.add_tokens)([token])
        got = made.token_to_id(token.content)
        if got != number:
            raise ModelLoadError(
                f"{source}: the added token {token.content!r} would get id {got}, not its own {number}"
            )
    held = {token.content for token in wanted.values()}
    made.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in specials if text not in held]
    )
