"""RenoiseDecoder: DiffusionGemma's decoding, for many sequences at once.

No token is a mask. A canvas begins as random tokens. In each step the decoder says what it takes
every token for, tempered; a token is drawn at every position; the surest are accepted, as long as
those before them add up to no more entropy than the bound (EB sampler, arXiv 2505.24857), and all
others become random tokens again. What the decoder said is mixed into its next input. The canvas is
committed, as the likeliest tokens of the last step, when its steps are used up or when it neither
changes nor leaves doubt; then the encoder caches it, and the next canvas begins.

Sequences of different lengths, at different steps and with different parameters share a step;
whether also the decoder's calls, the model decides. Head, draw and acceptance run sequence by
sequence, on the same shapes whoever else is in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.errors import NotFinite
from shared.model_card import ModelCard
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper
from worker.engine import passes
from worker.engine.bias import add_bias
from worker.engine.decoder import Commit, error_of
from worker.engine.precision import wide
from worker.engine.randomness import uniform
from worker.engine.request import Answer, EngineRequest
from worker.engine.stopping import advance

TOKEN_STREAM, RENOISE_STREAM, CANVAS_STREAM = (
    0,
    2,
    3,
)  # uses of randomness; 1 is the masked models' order
ENCODE_TOKENS = 1024  # of a prompt in one encoder call: the same pieces however busy the engine is
HEAD_ELEMENTS = {
    "cpu": 1 << 23
}  # logits of one chunk: 32 MB; on accelerators a canvas of 256 with 262,144 tokens
HEAD_ELEMENTS_DEFAULT = 1 << 26


class CanvasModel(Protocol):
    """The interface of the model (`worker.engine.models.diffusion_gemma`)."""

    @property
    def device(self) -> torch.device: ...
    def new_cache(self, capacity: int) -> Any: ...
    def encode(self, caches: Sequence[Any], ids: Sequence[Sequence[int]]) -> None: ...
    def decode(self, caches: Sequence[Any], canvases: Tensor, signal: Tensor | None) -> Tensor: ...
    def logits(self, rows: Tensor) -> Tensor: ...
    def embed(self, probabilities: Tensor) -> Tensor: ...


class Draws(Protocol):
    """The source of random tokens; tests give recorded ones. Positions count from the answer's
    start, on the CPU.
    """

    def canvas(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        """Any tokens, int64 [positions], to begin a canvas with."""
        ...

    def tokens(self, answer: Answer, positions: Tensor, probabilities: Tensor) -> Tensor:
        """A token for each row of probabilities [positions, vocab], int64 [positions] on their
        device.
        """
        ...

    def noise(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        """Any tokens, int64 [positions], for what is not accepted."""
        ...


class CounterDraws:
    """Random numbers as a function of the answer's seed, the step and the position."""

    def canvas(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        return _any_tokens(answer, CANVAS_STREAM, positions, vocab_size)

    def tokens(self, answer: Answer, positions: Tensor, probabilities: Tensor) -> Tensor:
        return pick(probabilities, uniform(answer.seed, answer.steps, TOKEN_STREAM, positions, 1))

    def noise(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        return _any_tokens(answer, RENOISE_STREAM, positions, vocab_size)


def _any_tokens(answer: Answer, stream: int, positions: Tensor, vocab_size: int) -> Tensor:
    numbers = uniform(answer.seed, answer.steps, stream, positions, 1)[:, 0]
    return (numbers * vocab_size).long().clamp_(max=vocab_size - 1)


def pick(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """The token at which the running sum of each row passes the row's number: one number a row
    draws from it exactly.

    (Gumbel noise would need a number for each token of the vocabulary, several times the work of
    the softmax.)

    Args:
        probabilities: [rows, vocab].
        numbers: float64 [rows, 1], uniform in (0, 1), on any device.
    """
    # In float32 the sum would stop growing before a large vocabulary's end; MPS has nothing wider.
    dtype = wide(probabilities.device)
    sums = probabilities.cumsum(-1, dtype=dtype)
    wanted = numbers.to(probabilities.device, dtype) * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp_(
        max=probabilities.shape[-1] - 1
    )


def temperature_of(params: SamplingParams, step: int) -> float:
    """Return the temperature of the canvas's step, counted from 0: from t_max down, times the
    request's temperature.

    At temperature 0 nothing is drawn; the schedule stays, because it also decides which positions
    are sure.
    """
    d = params.diffusion
    assert d.t_min is not None and d.t_max is not None and d.max_denoising_steps is not None
    left = (d.max_denoising_steps - step) / d.max_denoising_steps
    return (d.t_min + (d.t_max - d.t_min) * left) * (params.temperature or 1.0)


def accepted(entropy: Tensor, bound: float) -> Tensor:
    """Which positions are accepted, bool [positions]: in ascending entropy, while those before add
    up to at most `bound`.
    """
    ordered, order = entropy.sort(stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(
        0, order, ordered.cumsum(0) - ordered <= bound
    )


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one step for one canvas; tensors on the model's device."""

    canvas: Tensor  # int64 [positions]: accepted tokens and random ones
    likeliest: Tensor  # int64 [positions]
    probability: Tensor  # [positions] of the likeliest
    doubt: Tensor  # [] mean entropy
    signal: Tensor  # [positions, width]


class RenoiseDecoder:
    """Denoises canvases; holds no state of a request."""

    def __init__(
        self,
        model: CanvasModel,
        tokenizer: TokenizerWrapper,
        *,
        card: ModelCard,
        draws: Draws | None = None,
    ) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
        self.draws = draws or CounterDraws()

    @torch.inference_mode()
    def renoise_step(
        self, answers: Sequence[Answer], rows: Sequence[int] | None = None
    ) -> list[Commit]:
        """One denoising step of all `answers` whose committed tokens are cached; first, what is not
        cached yet is.

        Args:
            rows: how many each may compute; a prompt that does not fit beside its canvas is cached
                over several steps, in which its answer commits nothing.
        """
        for answer in answers:
            if not answer.caches:
                answer.caches.append(self.model.new_cache(passes.capacity(answer)))
        budgets = {id(a): n for a, n in zip(answers, rows or [1 << 62] * len(answers), strict=True)}
        self._encode(answers, budgets)
        ready = [answer for answer in answers if not _uncached(answer)]
        return self._denoise(ready) if ready else []

    def _encode(self, answers: Sequence[Answer], budgets: dict[int, int]) -> None:
        """Cache prompts and committed canvases, equal pieces together."""
        waiting = [answer for answer in answers if _uncached(answer)]
        while waiting:
            pieces: dict[int, list[Answer]] = {}
            for answer in waiting:
                pieces.setdefault(min(_uncached(answer), ENCODE_TOKENS), []).append(answer)
            for length, group in pieces.items():
                ids = [_sequence(answer, answer.cached, answer.cached + length) for answer in group]
                self.model.encode([answer.caches[0] for answer in group], ids)
                for answer in group:
                    answer.cached += length
                    answer.prefill_forwards += 1
                    budgets[id(answer)] -= length
            waiting = [
                a
                for a in waiting
                if (left := _uncached(a))
                and budgets[id(a)] >= min(left + len(a.window), ENCODE_TOKENS)
            ]

    def _denoise(self, answers: Sequence[Answer]) -> list[Commit]:
        now = time.time()
        for answer in answers:
            answer.request.prompt_done_time = answer.request.prompt_done_time or now
        canvases = torch.stack([self._canvas(answer) for answer in answers])
        signals = [answer.memory.get("signal") for answer in answers]
        given = next((s for s in signals if s is not None), None)
        signal = None
        if given is not None:
            signal = torch.stack([torch.zeros_like(given) if s is None else s for s in signals])
        hidden = self.model.decode([answer.caches[0] for answer in answers], canvases, signal)
        steps: list[Step | Commit] = []
        for answer, states in zip(answers, hidden, strict=True):
            try:
                steps.append(self._step(answer, states))
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as exc:  # whatever it is, it is this request's end and nobody else's
                steps.append(Commit(answer, error=error_of(exc)))
        commits = [step for step in steps if isinstance(step, Commit)]
        done = [
            (answer, step)
            for answer, step in zip(answers, steps, strict=True)
            if isinstance(step, Step)
        ]
        for (answer, step), told in zip(done, _to_cpu([step for _, step in done]), strict=True):
            commits.append(self._commit(answer, step, *told))
        return commits

    def _canvas(self, answer: Answer) -> Tensor:
        canvas: Tensor | None = answer.memory.get("canvas")
        if canvas is not None:
            return canvas
        return self.draws.canvas(answer, torch.tensor(answer.window), self.card.vocab_size).to(
            self.model.device
        )

    def _step(self, answer: Answer, states: Tensor) -> Step:
        """Compute a step of the canvas from the decoder's hidden states [positions, width], in
        chunks through the head.
        """
        positions = torch.tensor(answer.window)
        elements = HEAD_ELEMENTS.get(states.device.type, HEAD_ELEMENTS_DEFAULT)
        chunk = max(elements // self.card.vocab_size, 1)
        parts = [
            self._read(answer, states[i : i + chunk], positions[i : i + chunk])
            for i in range(0, len(states), chunk)
        ]
        entropy, likeliest, probability, tokens, signal = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        bound = answer.params.diffusion.entropy_bound
        assert bound is not None
        noise = self.draws.noise(answer, positions, self.card.vocab_size).to(tokens.device)
        canvas = torch.where(accepted(entropy, bound), tokens, noise)
        return Step(canvas, likeliest, probability, entropy.mean(), signal)

    def _read(self, answer: Answer, states: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Entropy, likeliest token, its probability, drawn token and signal of some positions."""
        logits = add_bias(self.model.logits(states), answer.params)
        log_p = logits.div_(temperature_of(answer.params, answer.block_step)).log_softmax(-1)
        p = log_p.exp()
        entropy = -(log_p * p).sum(-1)
        probability, likeliest = p.max(-1)
        greedy = answer.params.temperature == 0
        tokens = likeliest if greedy else self.draws.tokens(answer, positions, p)
        return entropy, likeliest, probability, tokens, self.model.embed(p)

    def _commit(
        self,
        answer: Answer,
        step: Step,
        likeliest: list[int],
        probability: list[float],
        doubt: float,
    ) -> Commit:
        if doubt != doubt:
            return Commit(
                answer,
                error=NotFinite("the model produced NaN or infinite logits for this request"),
            )
        d, memory = answer.params.diffusion, answer.memory
        assert d.stability_threshold is not None and d.confidence_threshold is not None
        assert d.max_denoising_steps is not None
        unchanged = memory["unchanged"] + 1 if memory.get("likeliest") == likeliest else 0
        answer.steps += 1
        answer.block_step += 1
        answer.forwards += 1
        settled = unchanged >= d.stability_threshold and doubt < d.confidence_threshold
        # Who may not go on gets the canvas as it is.
        used_up = d.max_forwards is not None and answer.forwards >= d.max_forwards
        window = answer.window
        shown = range(
            window.start, min(window.stop, answer.limit)
        )  # the last canvas is decoded whole, then cut
        if settled or used_up or answer.block_step >= d.max_denoising_steps:
            answer.canvas[window.start : window.stop] = likeliest
            n = len(shown)
            return Commit(answer, list(shown), likeliest[:n], probability[:n], block_done=True)
        answer.memory = {
            "canvas": step.canvas,
            "signal": step.signal,
            "likeliest": likeliest,
            "unchanged": unchanged,
        }
        provisional = {"positions": list(shown), "token_ids": likeliest[: len(shown)]}
        return Commit(answer, provisional=provisional, block_done=False)

    def generate(self, request: EngineRequest) -> None:
        """Denoise one request to its end, without an engine. Raises what a step reports
        (NotFinite).
        """
        if not request.sequences:
            request.make_sequences(self.tokenizer, self.card)
        while live := [a for a in request.sequences if a.finish_reason is None]:
            for commit in self.renoise_step(live):
                if commit.error is not None:
                    raise commit.error
                advance(commit.answer, block_done=commit.block_done)


def _uncached(answer: Answer) -> int:
    """Tokens before the open canvas that the encoder has not seen."""
    return len(answer.prompt) + answer.window.start - answer.cached


def _sequence(answer: Answer, start: int, stop: int) -> list[int]:
    """Tokens of prompt and answer."""
    n = len(answer.prompt)
    return answer.prompt[start:stop] + answer.canvas[max(start - n, 0) : max(stop - n, 0)]


def _to_cpu(steps: Sequence[Step]) -> list[tuple[list[int], list[float], float]]:
    """Copy the values that decide about the canvases in one transfer, so that the host waits once
    for the device.
    """
    if not steps:
        return []
    flat = torch.cat(
        [part.float().flatten() for s in steps for part in (s.likeliest, s.probability, s.doubt)]
    ).tolist()
    out, at = [], 0
    for step in steps:
        n = len(step.likeliest)
        out.append(
            ([int(t) for t in flat[at : at + n]], flat[at + n : at + 2 * n], flat[at + 2 * n])
        )
        at += 2 * n + 1
    return out
