"""The state of an answer in the grammar of its `response_format`: what may follow, what must, and
how it can end. No torch.

The automaton is llguidance's; it reads from left to right. `Structure` follows the committed
beginning of one answer, and goes back to it whenever a step is made again. A short ending, which it
searches, keeps the promise of complete JSON: a choice behind which none would fit into the tokens
that are left is not made, and the ending is written instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidParameter
from shared.model_card import ModelCard
from shared.response_format import PARAM, grammar_of, schema_of
from shared.tokenizer import TokenizerWrapper

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SEARCH_NODES = 400  # choices that one search for an ending tries
SEARCH_BRANCHES = (
    6  # alternatives where nothing tells which one is short: the first letters of a key, say
)
CLOSERS = '}]",:0123456789['  # between values, in the order of trying
LETTERS = "aeinost "  # inside a string that is too short to be closed
PROBE = '{"a b": [1, -2.5e3, true, null, "\\n é日🙂"], "c": {}}'


class Grammars:
    """The grammars of one model: its tokenizer as llguidance reads it, and what was compiled with
    it.
    """

    def __init__(self, tokenizer: TokenizerWrapper, card: ModelCard) -> None:
        self._wrapped, self._card = tokenizer, card
        self._compiled = lru_cache(maxsize=64)(self._compile)
        self._vocabulary: Vocabulary | None = None

    def check(self, response_format: Mapping[str, Any]) -> None:
        """Compile it. Raises InvalidParameter: the format cannot be enforced with this model's
        tokenizer.
        """
        self._compiled(grammar_of(schema_of(response_format)))

    def start(self, response_format: Mapping[str, Any]) -> Structure:
        """A new answer's place, before its first token."""
        matcher = self._compiled(grammar_of(schema_of(response_format))).deep_copy()
        return Structure(matcher, self.vocabulary, self._card)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._read_tokenizer(), self._card.vocab_size)
        return self._vocabulary

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        try:
            ends = list(self._card.end_token_ids) or None
            made = LLTokenizer(
                self._wrapped.files()["tokenizer.json"],
                n_vocab=self._card.vocab_size,
                eos_token=ends,
            )
        except ValueError as exc:
            raise InvalidParameter(
                f"{PARAM}: the tokenizer of {self._card.name} cannot be read: {exc}", param=PARAM
            ) from exc
        ids = self._wrapped.encode(PROBE)
        if made.decode_str(ids) != PROBE or self._wrapped.decode(ids) != PROBE:
            message = (
                f"{PARAM} does not fit {self._card.name}: its tokens are no pieces of the text"
            )
            raise InvalidParameter(message, param=PARAM)
        return made

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidParameter(f"{PARAM} cannot be enforced: {_trouble(matcher)}", param=PARAM)
        return matcher


def _trouble(matcher: LLMatcher) -> str:
    """Return llguidance's error message without the dump of its state that follows it."""
    return str(matcher.get_error()).partition("\n")[0][:500]


class Vocabulary:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: LLTokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.single: dict[str, int] = {}  # characters that are a token of their own
        for character in CLOSERS + LETTERS + "{":
            ids = tokenizer.tokenize_str(character)
            if len(ids) == 1:
                self.single[character] = ids[0]
        pieces = [
            b"" if tokenizer.is_special_token(i) else tokenizer.decode_bytes([i])
            for i in range(size)
        ]
        self._first = np.array([piece[0] if piece else -1 for piece in pieces], dtype=np.int16)
        self._length = np.array([len(piece) for piece in pieces], dtype=np.int32)

    def branches(self, allowed: NDArray[np.bool_]) -> list[int]:
        """For each first byte the longest of the allowed tokens, the longest first."""
        ids = np.flatnonzero(allowed & (self._first >= 0))
        ids = ids[np.argsort(-self._length[ids], kind="stable")]
        _, firsts = np.unique(self._first[ids], return_index=True)
        chosen: list[int] = ids[np.sort(firsts)][:SEARCH_BRANCHES].tolist()
        return chosen


class Structure:
    """One answer's place in its grammar.

    Attributes:
        ended: why the answer is over, once it is: "stop" when it is complete, "length" when no
            token is left.
        closing: the ending is being written because nothing else would fit.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, card: ModelCard) -> None:
        self._matcher, self._vocabulary, self._card = matcher, vocabulary, card
        self._forbidden = sorted({*card.end_token_ids, card.mask_token_id} - {-1})
        self._held: list[int] = []
        self._known: tuple[int, list[int]] | None = (
            None  # an ending, and behind how many tokens it stands
        )
        self.ended: str | None = None
        self.closing = False

    def at(self, committed: Sequence[int]) -> None:
        """Stand behind the committed tokens, whatever a step that was not finished has tried."""
        same = 0
        for ours, theirs in zip(self._held, committed, strict=False):
            if ours != theirs:
                break
            same += 1
        if len(self._held) > same:
            self._matcher.rollback(len(self._held) - same)
            del self._held[same:]
        for token in committed[same:]:
            self.take(token)

    def take(self, token: int) -> None:
        """Go on by one token. Raises InvalidParameter: the grammar became too complex."""
        if not self._matcher.consume_token(token):
            raise InvalidParameter(f"{PARAM}: {_trouble(self._matcher)}", param=PARAM)
        self._held.append(token)

    @property
    def is_complete(self) -> bool:
        """Return whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_stopped(self) -> bool:
        """Return whether it can only end here."""
        return bool(self._matcher.is_stopped()) and self.is_complete

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [vocab]; end tokens where the answer may end."""
        found = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little"
        )
        if self._matcher.is_error():
            raise InvalidParameter(f"{PARAM}: {_trouble(self._matcher)}", param=PARAM)
        mask = found[: self._card.vocab_size].astype(bool)
        mask[self._forbidden] = False
        if self.is_complete:
            mask[list(self._card.end_token_ids)] = True
        return mask

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them; often none."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        stop = next((i for i, token in enumerate(tokens) if token in self._forbidden), len(tokens))
        return tokens[:stop]

    def ending(self, most: int) -> list[int] | None:
        """Tokens that complete the answer from here, at most `most`; None when none are found.

        The last ending found is tried first, or what is left of it: inside a string or a number it
        stays one.
        """
        behind, tokens = self._known or (len(self._held), [])
        taken = self._held[behind:]
        candidates = (
            [tokens[len(taken) :]]
            if tokens[: len(taken)] == taken
            else [tokens, tokens[1:], tokens[2:]]
        )
        found = next((t for t in candidates if len(t) <= most and self._completes(t)), None)
        if found is None and most >= 0:
            found = _Search(self, most).run()
        self._known = None if found is None else (len(self._held), found)
        return found

    def _completes(self, tokens: list[int]) -> bool:
        if not self.push(tokens):
            return False
        complete = self.is_complete
        self.pop(len(tokens))
        return complete

    def fits(self, tokens: Sequence[int], most: int) -> bool:
        """Return whether the answer can be completed by at most `most` tokens behind `tokens`, as
        far as that can be told.
        """
        before, known = len(self._held), self._known
        if most < 0 or self._matcher.validate_tokens(list(tokens)) < len(tokens):
            return False
        for token in tokens:
            self.take(token)
        fits = self.ending(most) is not None
        self._matcher.rollback(len(tokens))
        del self._held[before:]
        if not fits:
            self._known = known
        return fits

    def steps(self) -> list[list[int]]:
        """Return the ways towards the end: the forced tokens, or the character that comes nearer,
        or several ways.
        """
        if forced := self.forced():
            return [forced]
        single = self._vocabulary.single
        may = {c for c, token in single.items() if self._matcher.validate_tokens([token]) == 1}
        # Inside a string both braces may stand, between values never both: that tells which quote
        # closes and which opens.
        for character in '"' + LETTERS if {"{", "}"} <= may else CLOSERS:
            if character in may:
                return [[single[character]]]
        return [
            [token]
            for token in self._vocabulary.branches(self.allowed())
            if token not in self._forbidden
        ]

    def push(self, tokens: list[int]) -> bool:
        """Try tokens; False, and nothing happened, when they may not stand here."""
        good = self._matcher.validate_tokens(tokens) == len(tokens)
        return good and bool(self._matcher.consume_tokens(tokens))

    def pop(self, count: int) -> None:
        """Take back what was tried."""
        if count:
            self._matcher.rollback(count)


class _Search:
    """Depth first, the likeliest closer first, within a number of nodes; the first ending that is
    short enough will do.
    """

    def __init__(self, structure: Structure, most: int) -> None:
        self._structure, self._nodes, self._most = structure, SEARCH_NODES, most
        self._path: list[int] = []
        self._best: list[int] | None = None

    def run(self) -> list[int] | None:
        self._visit()
        return self._best

    def _visit(self) -> None:
        """Search on from here; the structure comes back to where it was."""
        mark = len(self._path)
        while self._nodes > 0:
            self._nodes -= 1
            if self._structure.is_complete:
                self._best = list(self._path)
                break
            steps = self._structure.steps()
            if len(steps) == 1:
                if not self._push(steps[0]):
                    break
                continue
            for tokens in steps:
                if self._push(tokens):
                    self._visit()
                    self._pop(len(tokens))
                if self._best is not None:
                    break
            break
        self._pop(len(self._path) - mark)

    def _push(self, tokens: list[int]) -> bool:
        if len(self._path) + len(tokens) > self._most or not self._structure.push(tokens):
            return False
        self._path += tokens
        return True

    def _pop(self, count: int) -> None:
        self._structure.pop(count)
        if count:
            del self._path[-count:]


__all__ = ["Grammars", "Structure", "Vocabulary"]
