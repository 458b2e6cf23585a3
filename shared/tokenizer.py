"""Text to token ids and back, without torch and without transformers, so that the API counts tokens
too.

`TokenizerWrapper` reads a model folder's own files (`tokenizer.json`, `tokenizer_config.json`,
...); where tokenizer.json is missing, bpe_files.py puts it together from vocab.json and merges.txt.
The same files travel through the worker's registration, so the API and the engine tokenise alike.
Chat templates run in a sandbox of jinja2. Special tokens that are written out in a raw prompt are
read as tokens, as the published tokenizers do. In the text of messages they stay text
(`shared.control_tokens`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from shared import bpe_files
from shared.control_tokens import ControlTokens
from shared.errors import InvalidParameter, ModelLoadError, UnknownParameter
from shared.token_bytes import TokenBytes

_SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token")
_OURS = frozenset(
    {"messages", "add_generation_prompt", "tools", "documents"}
)  # the last two are always absent
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class TemplateRefusal(Exception):
    """A chat template called raise_exception: the messages are not what it takes."""


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _read(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {
        name: (folder / name).read_text(encoding="utf-8")
        for name in names
        if (folder / name).is_file()
    }


class TokenizerWrapper:
    """A Hugging Face fast tokenizer with its chat template."""

    def __init__(self, files: Mapping[str, str], *, source: str = "tokenizer") -> None:
        """Args: files: name -> content. Raises ModelLoadError when tokenizer.json is missing or
        malformed.
        """
        if "tokenizer.json" not in files:
            raise ModelLoadError(f"{source} has no tokenizer.json, nor vocab.json with merges.txt")
        self._files = {name: files[name] for name in FILES if name in files}
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(files["tokenizer.json"])
            self.config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
            special = json.loads(files.get("special_tokens_map.json", "{}"))
        except Exception as exc:  # tokenizers raises plain Exception for a malformed file
            raise ModelLoadError(f"{source}: malformed tokenizer files: {exc}") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special_tokens: dict[str, str] = {}
        for name in _SPECIAL:
            text = _content(self.config.get(name)) or _content(special.get(name))
            if text is not None:
                self.special_tokens[name] = text
        self.control = ControlTokens(self._tokenizer, self.special_tokens.values())
        template = files.get("chat_template.jinja") or self.config.get("chat_template")
        if isinstance(template, list):  # named templates: the one called "default"
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        self._template = None
        self.template_variables: frozenset[str] = (
            frozenset()
        )  # what a request may set: `enable_thinking`, say
        if template is not None:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
            )
            environment.filters["tojson"] = lambda value, **kw: json.dumps(
                value, ensure_ascii=False, **kw
            )
            environment.globals["raise_exception"] = _raise_exception
            environment.globals["strftime_now"] = lambda fmt: date.today().strftime(fmt)
            try:
                self._template = environment.from_string(template)
                wanted = meta.find_undeclared_variables(environment.parse(template))
                self.template_variables = frozenset(
                    wanted - _OURS - set(environment.globals) - set(_SPECIAL)
                )
            except TemplateError as exc:
                raise ModelLoadError(f"{source}: the chat template does not parse: {exc}") from exc

    @classmethod
    def from_folder(cls, folder: str | Path) -> TokenizerWrapper:
        path = Path(folder)
        files = _read(path, FILES)
        if "tokenizer.json" not in files and cls.is_in(path):
            files["tokenizer.json"] = bpe_files.tokenizer_json(
                _read(path, bpe_files.FILES), source=str(path)
            )
        return cls(files, source=str(path))

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether the folder has a tokenizer at all: a verifier's may be without."""
        parts = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        return parts or (folder / "tokenizer.json").is_file()

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> TokenizerWrapper:
        return cls(files)

    def files(self) -> dict[str, str]:
        """Name -> content of the files this tokenizer was made from."""
        return dict(self._files)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def token_id(self, token: str) -> int | None:
        """Id of one token's text, or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def vocabulary(self) -> dict[str, int]:
        """Token text -> id, added tokens included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def special_id(self, name: str) -> int | None:
        """Id of `bos_token`, `eos_token`, `pad_token` or `mask_token`, or None."""
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)

    def encode(
        self, text: str, add_special_tokens: bool = False, *, parse_special: bool = True
    ) -> list[int]:
        """Return the text's token ids.

        Args:
            add_special_tokens: add what the tokenizer puts around a text.
            parse_special: read special tokens that are written out as tokens, not as text.

        Raises:
            InvalidParameter: this model cannot read a special token in it as text.
        """
        if not parse_special:
            return self._surrounded(self.control.encode(text), add_special_tokens)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _surrounded(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        """Return the ids with what the tokenizer puts around any text."""
        if not add_special_tokens:
            return ids
        bare, whole = self.encode("a"), self.encode("a", True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return [*whole[:at], *ids, *whole[at + len(bare) :]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; an incomplete UTF-8 sequence becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The true bytes of single tokens."""
        return TokenBytes(
            self._files["tokenizer.json"],
            piece=self._tokenizer.id_to_token,
            decode=lambda token: self.decode([token], skip_special_tokens=False),
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages.

        Args:
            variables: `chat_template_kwargs`, what this template knows beside the messages.

        Raises:
            InvalidParameter: the template refuses the messages, or there is none.
            UnknownParameter: the template has no such variable.
        """
        if self._template is None:
            raise InvalidParameter(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        for name in variables or ():
            if name not in self.template_variables:
                known = ", ".join(sorted(self.template_variables)) or "none"
                param = f"chat_template_kwargs.{name}"
                raise UnknownParameter(
                    f"{param}: this model's chat template has no such variable; it has {known}",
                    param=param,
                )
        try:
            return self._template.render(
                **(variables or {}),
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (TemplateRefusal, TemplateError, TypeError) as exc:
            raise InvalidParameter(
                f"the chat template refuses these messages: {exc}", param="messages"
            ) from exc

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        parse_special: bool = False,
    ) -> list[int]:
        """Return the token ids of the rendered messages. Special tokens in the messages stay text.

        Args:
            parse_special: read them as tokens; for messages of trusted origin.

        Raises:
            InvalidParameter, UnknownParameter: as `apply_chat_template` and `encode`.
        """

        def render(values: Mapping[str, Any]) -> str:
            return self.apply_chat_template(
                values["messages"], add_generation_prompt, values["variables"]
            )

        values = {"messages": list(messages), "variables": dict(variables or {})}
        ids = None if parse_special else self.control.encode_rendering(values, render)
        if ids is not None:
            return self._surrounded(ids, add_special_tokens)
        return self.encode(render(values), add_special_tokens)


class IncrementalText:
    """The text of a growing answer, given out piece by piece: append-only, valid UTF-8, no stop
    string ever inside.

    What could still become part of a stop string or of a multi-byte character is held back until it
    cannot.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.text = ""  # of all ids seen so far, cut before a stop string
        self.stopped = False
        self._sent = 0

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def update(self, ids: Sequence[int], *, final: bool = False) -> str:
        """Take the whole committed prefix and return what may now be shown in addition. `stopped`
        tells a stop string.
        """
        if self.stopped:
            return ""
        text = self._tokenizer.decode(ids)
        cuts = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if cuts:
            self.stopped, text = True, text[: min(cuts)]
        self.text = text
        safe = len(text) if final or self.stopped else self._safe_length(text)
        fresh = text[self._sent : safe]
        self._sent = max(self._sent, safe)
        return fresh

    def _safe_length(self, text: str) -> int:
        length = len(text)
        while length and text[length - 1] == "\ufffd":
            length -= 1
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, length), held, -1):
                if text.endswith(stop[:size], 0, length):
                    held = size
                    break
        return length - held
