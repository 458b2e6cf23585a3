"""A tokenizer's control tokens, and text in which they stay text.

Control tokens are the special tokens of a tokenizer: turn markers, end tokens, the mask. A
tokenizer reads their text as the token wherever it stands. That is right for a chat template and
wrong for what a client writes in a message: with it, a user's message could open a system turn.

`ControlTokens` renders a template with the control tokens of its input hidden behind marks, so that
every control token in the rendering is the template's own. A second tokenizer, which shares the
model of the first, then reads the text: it knows the template's control tokens by aliases that no
input can contain, and takes everything else for plain text. Splits, merges and added tokens are
those of the first tokenizer. `docs/adr` says why.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer

from shared.errors import InvalidParameter

# Characters that stand for nothing: noncharacters first, then private use. One that the input lacks
# becomes the mark.
_ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
)  # templates compare these; they are part of control tokens
_MARKS = tuple(map(chr, chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900))))


def trie_pattern(words: Iterable[str]) -> str:
    """Return a regular expression for any of the words, the longest first. Its time does not grow
    with their number.
    """
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def emit(node: dict[str, Any]) -> str:
        branches = []
        for character, following in node.items():
            if character:
                literal = re.escape(character)
                while len(following) == 1 and "" not in following:
                    ((character, following),) = following.items()
                    literal += re.escape(character)
                branches.append(literal + emit(following))
        if not branches:
            return ""
        return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"

    return emit(root)


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, named: Iterable[str]) -> None:
        """Args: named: texts that are control tokens whatever their entry says (`mask_token` and
        its like).
        """
        self._tokenizer = tokenizer
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        always = set(named)
        self.hidden = {
            one.content: i for i, one in self._added.items() if one.special
        }  # not shown in an answer's text
        self.ids = {
            one.content: i for i, one in self._added.items() if one.special or one.content in always
        }
        self._texts = list(self.ids)
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        # Texts by which the second tokenizer knows the control tokens. No client can guess them.
        secret = secrets.token_hex(8)
        self._aliases = {
            text: f"\U000f0000{secret}{number}\U000f0001" for text, number in self._numbers.items()
        }

    def __bool__(self) -> bool:
        return bool(self.ids)

    def find(self, text: str) -> list[str]:
        """Return the control tokens that are written out in the text."""
        return self._pattern.findall(text) if self.ids else []

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids with every control token read as plain text.

        Raises:
            InvalidParameter: the tokenizer's model itself makes a control token of the text.
        """
        return self._decoded_aliases(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_rendering(
        self, values: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]
    ) -> list[int] | None:
        """Return the token ids of a rendered template in which control tokens of its input are
        plain text.

        Args:
            values: the template's input. Every string in it is text, except the name of a role.
            render: makes the text of such values.

        Returns:
            None when no string of the input can be part of a control token: any tokenizer reads it
            the same.

        Raises:
            InvalidParameter: as `encode`, or the input has all characters that could serve as
                marks.
        """
        if not self.ids:
            return None
        mark = self._free_mark(values)
        hidden = self._hide(values, mark)
        if hidden == values:
            return None
        pieces = re.split(
            f"{mark}(\\d*){mark}", render(hidden)
        )  # the template's text and marks' numbers in turn
        pieces[::2] = [
            self._pattern.sub(lambda found: self._aliases[found[0]], piece) for piece in pieces[::2]
        ]
        pieces[1::2] = [self._texts[int(number)] if number else "" for number in pieces[1::2]]
        return self.encode("".join(pieces))

    # How text is hidden from a template

    def _free_mark(self, values: Any) -> str:
        used: set[str] = set()
        for text in strings_in(values):
            used.update(text)
        for mark in _MARKS:
            if mark not in used:
                return mark
        raise InvalidParameter("messages have every private character of Unicode", param="messages")

    def _hide(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._hide_text(value, mark)
        if isinstance(value, Mapping):
            return {
                k: v if k == "role" and v in _ROLES else self._hide(v, mark)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide(v, mark) for v in value]
        return value

    def _hide_text(self, text: str, mark: str) -> str:
        """Return the text with marks for its control tokens, and between it and what could complete
        one at its ends.
        """
        made = self._pattern.sub(lambda found: f"{mark}{self._numbers[found[0]]}{mark}", text)
        body = made.strip()
        if not body:
            return made
        begin = made.index(body[0])
        end = begin + len(body)
        inside = len(body) < self._longest and body in self._joined
        front = inside or any(body[:size] in self._tails for size in range(1, self._longest))
        back = inside or any(body[-size:] in self._heads for size in range(1, self._longest))
        nothing = mark + mark
        return made[:begin] + nothing * front + body + nothing * back + made[end:]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(trie_pattern(self._texts))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._texts))

    @cached_property
    def _heads(self) -> frozenset[str]:
        return frozenset(text[:size] for text in self._texts for size in range(1, len(text)))

    @cached_property
    def _tails(self) -> frozenset[str]:
        return frozenset(text[size:] for text in self._texts for size in range(1, len(text)))

    @cached_property
    def _joined(self) -> str:
        return "\0".join(self._texts)

    # The second tokenizer

    @cached_property
    def _plain(self) -> Tokenizer:
        made = Tokenizer(self._tokenizer.model)  # shared, not copied
        made.normalizer = self._tokenizer.normalizer
        made.pre_tokenizer = self._tokenizer.pre_tokenizer
        made.add_tokens(
            [
                AddedToken(
                    self._aliases.get(one.content, one.content),
                    single_word=one.single_word,
                    lstrip=one.lstrip,
                    rstrip=one.rstrip,
                    normalized=one.normalized,
                    special=one.special,
                )
                for _, one in sorted(self._added.items())
            ]
        )
        return made

    @cached_property
    def _originals(self) -> dict[int, int]:
        """The second tokenizer's ids of added tokens -> the first one's."""
        plain = self._plain
        made = {}
        for i, one in self._added.items():
            alias = plain.token_to_id(self._aliases.get(one.content, one.content))
            assert alias is not None
            made[alias] = i
        return made

    def _decoded_aliases(self, ids: list[int]) -> list[int]:
        originals, control = self._originals, frozenset(self.ids.values())
        for i in ids:
            if i not in originals and i in control:
                text = self._tokenizer.id_to_token(i)
                raise InvalidParameter(
                    f"this model cannot read {text!r} as plain text; leave it out", param="messages"
                )
        return [originals.get(i, i) for i in ids]


def strings_in(value: Any) -> Iterable[str]:
    """Yield every string among the values, at any depth; keys are not included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from strings_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings_in(one)
