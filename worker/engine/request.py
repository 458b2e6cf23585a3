"""A request inside the engine, and each of its answers as a sequence being denoised. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.sampling_params import SamplingParams
from shared.tokenizer import IncrementalText, TokenizerWrapper
from worker.engine.outputs import StepEvent

_MASK64 = (1 << 64) - 1
Listener = Callable[[StepEvent], object]


def mix64(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): spreads any 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def quotas(masked: int, steps: int) -> list[int]:
    """How many tokens each step of a block commits: masked // steps, the first steps take the remainder (LLaDA)."""
    steps = min(steps, masked)  # surplus steps would commit nothing; they are not run
    base, extra = divmod(masked, steps)
    return [base + (i < extra) for i in range(steps)]


@dataclass(eq=False)
class Answer:
    """One answer: its canvas and where its decoding stands. Positions count from the answer's start."""

    request: EngineRequest
    index: int
    seed: int
    canvas: list[int]  # [max_tokens]; the mask id where nothing is committed
    block_starts: list[int]
    text: IncrementalText
    block: int = 0
    block_step: int = 0
    steps: int = 0
    forwards: int = 0
    prefix: int = 0  # committed tokens without a gap from the start
    committed: int = 0
    quota: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    end: int | None = None  # tokens of the answer when finished

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def window(self) -> range:
        """The open block."""
        return range(self.block_starts[self.block], self.block_starts[self.block + 1])

    def open_block(self, block: int) -> None:
        """Begin a block: its steps and quota."""
        self.block, self.block_step = block, 0
        length = len(self.window)
        blocks = len(self.block_starts) - 1
        steps = self.params.diffusion.steps
        self.quota = quotas(length, length if steps is None else max(1, steps // blocks))


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
    sequences: list[Answer] = field(default_factory=list)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    aborted: bool = False

    def make_sequences(self, tokenizer: TokenizerWrapper, mask_token_id: int) -> None:
        """Create the n answers; the first has the request's own seed, the others have seeds derived from it."""
        starts = [0]
        for length in self.params.blocks():
            starts.append(starts[-1] + length)
        for index in range(self.params.n):
            sequence = Answer(
                request=self,
                index=index,
                seed=self.seed & _MASK64 if index == 0 else mix64((self.seed & _MASK64) ^ mix64(index)),
                canvas=[mask_token_id] * self.params.max_tokens,
                block_starts=starts,
                text=IncrementalText(tokenizer, self.params.stop),
            )
            sequence.open_block(0)
            self.sequences.append(sequence)

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)


def end_tokens(params: SamplingParams, model_ends: Sequence[int]) -> frozenset[int]:
    """Token ids that end an answer: the model's own unless ignore_eos, and the request's."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(model_ends))
