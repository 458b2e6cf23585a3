"""A request inside the engine, and each of its answers as a sequence being denoised. No torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.algorithms import BLOCK, UNIFORM
from shared.diffusion_params import DEFAULT_BLOCK_LENGTH
from shared.model_card import ModelCard
from shared.sampling_params import SamplingParams
from shared.stop_strings import stop_ids
from shared.tokenizer import IncrementalText, TokenizerWrapper
from worker.engine import schedule
from worker.engine.outputs import StepEvent, TokenLogprob

_MASK64 = (1 << 64) - 1
Listener = Callable[[StepEvent], object]


def mix64(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): spreads any 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def block_starts(params: SamplingParams, regime: str, prompt_tokens: int) -> list[int]:
    """Return the positions where blocks begin, counted from the answer's start, and where the last
    one ends.

    Full attention: blocks of block_length, the last may be shorter. Block-causal: aligned to
    position 0 of the sequence, the first shares its block with the prompt's end, the last is
    decoded whole and cut. Uniform: whole canvases.
    """
    length = params.diffusion.block_length or min(DEFAULT_BLOCK_LENGTH, params.max_tokens)
    starts = [0]
    if regime == BLOCK:
        starts.append(length - prompt_tokens % length)
    while starts[-1] < params.max_tokens:
        starts.append(starts[-1] + length)
    if regime not in (BLOCK, UNIFORM):
        starts[-1] = params.max_tokens
    return starts


@dataclass(eq=False)
class Answer:
    """One answer: its canvas and where its decoding stands. Positions count from the answer's
    start.
    """

    request: EngineRequest
    index: int
    seed: int
    canvas: list[int]  # the mask id where nothing is committed; may reach beyond max_tokens
    block_starts: list[int]
    text: IncrementalText
    regime: str
    mask: int
    block: int = 0
    block_step: int = 0
    steps: int = 0
    forwards: int = 0  # denoising forwards
    prefix: int = 0  # committed tokens without a gap from the start
    block_steps: int = 1  # of the open block's schedule
    quota: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    end: int | None = None  # tokens of the answer when finished
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    memory: dict[str, Any] = field(
        default_factory=dict
    )  # of the rule or decoder, in the open block
    # K/V
    caches: list[Any] = field(
        default_factory=list
    )  # KVCache: the sequence's, and its unconditional twin's
    cached: int = 0  # leading positions of the sequence whose K/V are final (block-causal)
    fresh: bool = True  # the open block has had no forward yet
    window_from: int | None = (
        None  # first masked position of the sequence at the previous windowed forward
    )
    cache_refreshes: int = 0
    prefill_forwards: int = 0
    # response_format
    structure: Any = None  # grammar.Structure: where the answer stands in its grammar
    closed_early: bool = False  # its ending was written because nothing else would have fitted
    # APD
    verifier_cache: Any = None  # the verifier's KVCache
    verified: int = 0  # leading positions of the sequence that it holds
    drafted: int = 0
    accepted: int = 0
    verifier_seconds: float = 0.0

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def limit(self) -> int:
        """Tokens that the answer may have."""
        return self.params.max_tokens

    @property
    def window(self) -> range:
        """The open block."""
        return range(self.block_starts[self.block], self.block_starts[self.block + 1])

    @property
    def edits(self) -> bool:
        """Return whether committed tokens of the open block may still change."""
        return self.params.diffusion.algorithm == "joint_threshold"

    @property
    def committed(self) -> int:
        """Tokens committed so far, up to the limit."""
        return sum(token != self.mask for token in self.canvas[: self.limit])

    @property
    def all_caches(self) -> list[Any]:
        """Return its caches that move between device and host memory."""
        return self.caches if self.verifier_cache is None else [*self.caches, self.verifier_cache]

    def masked(self) -> list[int]:
        """Masked positions of the open block."""
        return [p for p in self.window if self.canvas[p] == self.mask]

    def open_block(self, block: int) -> None:
        """Begin a block, or the next one in which something is masked."""
        while True:
            self.block, self.block_step, self.fresh, self.memory = block, 0, True, {}
            masked = len(self.masked())
            if masked or block + 2 >= len(self.block_starts):
                break
            block += 1
        blocks = len(self.block_starts) - 1
        steps = self.params.diffusion.steps
        self.block_steps = max(masked if steps is None else steps // blocks, 1)
        length = self.params.diffusion.block_length or len(self.window)
        self.quota = schedule.quotas(self.params.diffusion, self.regime, masked, length, blocks)

    def step_quota(self) -> int:
        return self.quota[min(self.block_step, len(self.quota) - 1)] if self.quota else 1

    def release(self) -> None:
        """Let go of the K/V and of what decoders remember."""
        self.caches, self.verifier_cache, self.memory, self.structure = [], None, {}, None


@dataclass(eq=False)
class EngineRequest:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    priority: int
    arrival_time: float
    end_token_ids: frozenset[int]
    listener: Listener | None = None
    canvas: list[int] | None = None  # infill: given tokens, the mask id in the holes
    score: Any = None  # likelihood.ScoreTask: nothing is generated, the answer is scored
    sequences: list[Answer] = field(default_factory=list)
    first_scheduled_time: float | None = None
    prompt_done_time: float | None = None
    first_token_time: float | None = None
    aborted: bool = False
    device_seconds: float = 0.0

    def make_sequences(self, tokenizer: TokenizerWrapper, card: ModelCard) -> None:
        """Create the n answers; the first has the request's own seed, the others have seeds derived
        from it.
        """
        starts = block_starts(self.params, card.regime, len(self.prompt_token_ids))
        for index in range(self.params.n):
            seed = (
                self.seed & _MASK64 if index == 0 else mix64((self.seed & _MASK64) ^ mix64(index))
            )
            answer = Answer(
                request=self,
                index=index,
                seed=seed,
                canvas=self._canvas(card.mask_token_id, starts[-1], seed),
                block_starts=starts,
                text=IncrementalText(tokenizer, self.params.stop),
                regime=card.regime,
                mask=card.mask_token_id,
            )
            answer.open_block(0)
            self.sequences.append(answer)

    def _canvas(self, mask: int, length: int, seed: int) -> list[int]:
        """Masks; or what infill was given; or a draft of which `draft_noise` is masked again, at
        least one token.
        """
        if self.canvas is not None:
            return list(self.canvas)
        draft = list(self.params.diffusion.draft_token_ids or ())
        canvas = draft + [mask] * (length - len(draft))
        if draft:
            rng = random.Random(mix64(seed ^ 0x6472616674))  # its own stream; any constant does
            count = max(
                round(self.params.diffusion.draft_noise * len(draft)),
                1 if len(draft) == length else 0,
            )
            for position in rng.sample(range(len(draft)), count):
                canvas[position] = mask
        return canvas

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)


def end_tokens(
    params: SamplingParams, model_ends: Sequence[int], tokenizer: TokenizerWrapper
) -> frozenset[int]:
    """Return the token ids that end an answer: the model's own unless ignore_eos, and the
    request's.

    A stop string that is a special token counts by its id, since the answer's text does not show
    it.
    """
    own = frozenset() if params.ignore_eos else frozenset(model_ends)
    return own | frozenset(params.stop_token_ids) | stop_ids(params.stop, tokenizer)
