"""DiffusionSampler: one denoising step of any mix of requests, each with its own parameters.

`diffusion_step` = plan, forward, `calculate_confidence`, then `unmask_tokens` for each answer. The
engine's loop calls the same parts for whatever the scheduler picked; `generate` loops over
`diffusion_step` for one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.algorithms import BLOCK
from shared.diffusion_params import DiffusionParams
from shared.errors import NotFinite
from shared.model_card import ModelCard
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper
from worker.engine import passes
from worker.engine.bias import add_bias
from worker.engine.config import ModelConfig
from worker.engine.decoder import Commit, Logits, Model, Plan, error_of, guided
from worker.engine.outputs import TokenLogprob
from worker.engine.precision import wide
from worker.engine.randomness import uniform
from worker.engine.request import Answer, EngineRequest
from worker.engine.rules import RULES, Rule, RuleInput
from worker.engine.rules.base import gumbel
from worker.engine.stopping import advance

TOKEN_STREAM, ORDER_STREAM = 0, 1  # uses of randomness
CHOICE_NUMBERS = (
    1 << 23
)  # logits that are chosen from at once: 64 MiB for each of several copies in float64
TINY = 1e-10  # inside logarithms of entropies, as in Dream's program


@dataclass(frozen=True, slots=True)
class DiffusionSamplerConfig:
    """Defaults of `DiffusionSampler.generate`, under the names of the original design."""

    mask_id: int
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"

    def params(self, max_tokens: int) -> SamplingParams:
        diffusion = DiffusionParams(
            algorithm=self.remasking, steps=self.steps, block_length=self.block_length
        )
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, diffusion=diffusion
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A token for each candidate and how sure the model is of it; all [n], on the model's device
    until `to_cpu`.
    """

    tokens: Tensor
    confidence: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    logprob: Tensor | None = None
    top_logprobs: Tensor | None = None  # [n, k]
    top_tokens: Tensor | None = None  # [n, k]


_COLUMNS = ("tokens", "confidence", "margin", "entropy", "divergence", "logprob")


def to_cpu(choices: Sequence[Choice]) -> list[Choice]:
    """All choices of a step in one transfer, so that the device is waited for once."""
    if not choices:
        return []
    flat = [part.to(wide(part.device)).flatten() for choice in choices for part in _parts(choice)]
    sizes = [len(part) for part in flat]
    pieces = iter(torch.split(torch.cat(flat).cpu(), sizes))
    out = []
    for choice in choices:
        n = len(choice.tokens)
        made: dict[str, Tensor] = {
            name: next(pieces) for name in _COLUMNS if getattr(choice, name) is not None
        }
        if choice.top_logprobs is not None:
            made["top_logprobs"] = next(pieces).view(n, -1)
            made["top_tokens"] = next(pieces).view(n, -1).long()
        made["tokens"] = made["tokens"].long()
        made["confidence"] = made["confidence"].float()
        out.append(Choice(**made))
    return out


def joined(choices: Sequence[Choice]) -> Choice:
    """The choices of runs of rows, as one."""
    made: dict[str, Tensor] = {}
    for name in (*_COLUMNS, "top_logprobs", "top_tokens"):
        parts = [part for choice in choices if (part := getattr(choice, name)) is not None]
        if parts:
            made[name] = torch.cat(parts)
    return Choice(**made)


def _parts(choice: Choice) -> Iterator[Tensor]:
    for name in (*_COLUMNS, "top_logprobs", "top_tokens"):
        part = getattr(choice, name)
        if part is not None:
            yield part


def filter_logits(
    logits: Tensor, top_k: int, top_p: float, *, nucleus_first: bool = False
) -> Tensor:
    """-inf outside the top_k largest and outside the smallest set of probability >= top_p (Holtzman
    et al. 2020).

    Args:
        logits: [n, vocab], already divided by the temperature.
        nucleus_first: top_p of the whole distribution, then top_k of what is left, as Dream's
            program does; else top_p of what top_k left, renormalised, as SDAR's does.
    """
    if nucleus_first:
        return _largest(_nucleus(logits, top_p), top_k)
    return _nucleus(_largest(logits, top_k), top_p)


def _largest(logits: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < logits.shape[-1]:
        return logits
    floor = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < floor, -torch.inf)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    beyond = before >= top_p
    beyond[..., 0] = False  # the likeliest token stays, also at top_p 0
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, beyond)
    return logits.masked_fill(drop, -torch.inf)


class DiffusionSampler:
    """Samples and commits tokens of masked models; holds no state of a request."""

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        config: DiffusionSamplerConfig,
        *,
        facts: ModelConfig,
        card: ModelCard,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.facts, self.card = facts, card

    # A step's parts

    def plan(self, answer: Answer, rows: int) -> Plan:
        """Plan the answer's next forward; only a part of its prompt if not all of it fits into
        `rows`.
        """
        if passes.needs_seed(answer, self.facts):
            made, seeded = passes.seed_passes(answer, rows)
            return Plan(answer, made, seeded, prefill=not seeded, seed=bool(seeded))
        prompt = passes.prefill(answer, self.facts, rows)
        if prompt:
            return Plan(answer, prompt, [], prefill=True)
        if passes.is_windowed(answer):
            wanted = passes.lookahead(answer)
            return Plan(answer, passes.window_passes(answer, self.facts, wanted), wanted)
        wanted = passes.candidates(answer)
        if RULES[_algorithm(answer)].sees_committed:
            wanted = list(answer.window)
        return Plan(answer, passes.block_passes(answer, self.facts, wanted), wanted)

    def calculate_confidence(
        self, logits: Tensor, answer: Answer, positions: Sequence[int], *, greedy: bool = False
    ) -> Choice:
        """Choose a token for each row and say how sure the model is.

        LLaDA-type rules: the softmax of the raw logits (no temperature, no noise) at the chosen
        token. Dream's rules and block-causal models: of the tempered, filtered distribution. Noise
        is Gumbel's: argmax(logits / T + g), which samples the tempered, filtered distribution
        exactly.

        Args:
            logits: [n, vocab] float32 of the candidates; changed in place.
            greedy: take the likeliest token whatever the request's temperature.
        """
        params, diffusion, rule = answer.params, answer.params.diffusion, RULES[_algorithm(answer)]
        add_bias(logits, params)
        suppressed = torch.tensor(
            list(diffusion.suppress_token_ids or ()), dtype=torch.int64, device=logits.device
        )
        if diffusion.suppress_end == "logits":
            logits.index_fill_(-1, suppressed, -torch.inf)
        logits = rule.adjust(logits, list(positions), diffusion, answer.memory)
        of_mask = logits[:, self.config.mask_id].clone()
        logits[:, self.config.mask_id] = -torch.inf  # no step ever commits the mask
        sampled: Tensor | None = None
        filters = params.top_k > 0 or params.top_p < 1.0
        if params.temperature > 0 and not greedy:
            sampled = self._filtered(logits.to(wide(logits.device)) / params.temperature, params)
            rows = torch.tensor(positions, device=logits.device)
            noise = uniform(answer.seed, answer.steps, TOKEN_STREAM, rows, logits.shape[-1])
            tokens = (sampled + gumbel(noise)).argmax(-1)
        else:
            tokens = logits.argmax(-1)
            if filters:
                sampled = self._filtered(logits, params)
        logits[:, self.config.mask_id] = of_mask
        logprobs = self._logprobs(
            logits, tokens, params.logprobs
        )  # what the model says, whatever is suppressed below
        judged = logits
        if (rule.filtered or (answer.regime == BLOCK and not rule.raw)) and sampled is not None:
            judged = sampled
        if diffusion.suppress_end == "confidence":
            judged.index_fill_(-1, suppressed, -torch.inf)
        # Not exp(logit - logsumexp): near 1 its rounding reorders positions that softmax tells
        # apart.
        probability = judged.softmax(-1)
        return Choice(
            tokens,
            probability.gather(-1, tokens[:, None])[:, 0],
            **self._scores(rule, probability, answer, positions),
            **logprobs,
        )

    def _filtered(self, logits: Tensor, params: SamplingParams) -> Tensor:
        return filter_logits(logits, params.top_k, params.top_p, nucleus_first=self.facts.shift)

    @staticmethod
    def _scores(
        rule: Rule, probability: Tensor, answer: Answer, positions: Sequence[int]
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if "margin" in rule.needs:
            two = probability.topk(2, dim=-1).values
            made["margin"] = two[:, 0] - two[:, 1]
        if "entropy" in rule.needs:
            made["entropy"] = -(probability * torch.log(probability + TINY)).sum(-1)
        if "divergence" in rule.needs:
            before: dict[int, int] = answer.memory.get("rows", {})
            made["divergence"] = torch.full_like(probability[:, 0], torch.inf)
            if before:
                prior = answer.memory["probability"][torch.tensor([before[p] for p in positions])]
                ratio = torch.log((probability + TINY) / (prior + TINY))
                made["divergence"] = (probability * ratio).sum(-1)
            answer.memory["rows"] = {p: i for i, p in enumerate(positions)}
            answer.memory["probability"] = probability
        return made

    @staticmethod
    def _logprobs(logits: Tensor, tokens: Tensor, count: int | None) -> dict[str, Tensor]:
        if count is None:
            return {}
        logprob = logits.log_softmax(-1)
        made = {"logprob": logprob.gather(-1, tokens[:, None])[:, 0]}
        if count:
            top = logprob.topk(count, dim=-1)
            made.update(top_logprobs=top.values, top_tokens=top.indices)
        return made

    def unmask_tokens(self, answer: Answer, positions: list[int], choice: Choice) -> Commit:
        """Let the answer's rule choose among the candidates, and write the chosen tokens into its
        canvas.

        Args:
            choice: on the CPU.
        """
        if not bool(torch.isfinite(choice.confidence).all()):
            return Commit(
                answer,
                error=NotFinite("the model produced NaN or infinite logits for this request"),
            )
        rule = RULES[_algorithm(answer)]
        rows = torch.tensor(positions)
        masked = (
            torch.tensor([answer.canvas[p] == answer.mask for p in positions])
            if rule.sees_committed
            else None
        )
        left = len(positions) if masked is None else int(masked.sum())
        stands = (
            torch.tensor([answer.canvas[p] for p in positions]) if rule.sees_committed else None
        )
        given = RuleInput(
            positions=positions,
            confidence=choice.confidence,
            quota=min(answer.step_quota(), left),
            block_steps=answer.block_steps,
            params=answer.params.diffusion,
            uniform=lambda stream: uniform(answer.seed, answer.steps, stream, rows, 1)[:, 0],
            margin=choice.margin,
            entropy=choice.entropy,
            divergence=choice.divergence,
            masked=masked,
            changed=None if stands is None else choice.tokens != stands,
            row=passes.ranked_row(answer),
            slack=self.facts.threshold_slack if answer.regime == BLOCK else rule.slack,
            strict=self.facts.strict_threshold,
            memory=answer.memory,
        )
        picked = rule.select(given).sort().values
        block_done = rule.is_done(given, picked) if rule.sees_committed else None
        return self._commit(answer, positions, choice, picked, block_done)

    def _commit(
        self,
        answer: Answer,
        positions: list[int],
        choice: Choice,
        picked: Tensor,
        block_done: bool | None = None,
    ) -> Commit:
        """Write the picked candidates into the answer's canvas."""
        chosen = [positions[i] for i in picked.tolist()]
        ids: list[int] = choice.tokens[picked].tolist()
        logprobs = logprobs_of(choice, picked)
        for i, (position, token) in enumerate(zip(chosen, ids, strict=True)):
            answer.canvas[position] = token
            if logprobs:
                answer.logprobs[position] = logprobs[i]
        answer.steps += 1
        answer.block_step += 1
        if self.facts.stops_in_block and _reaches_end(answer):
            block_done = True
        return Commit(
            answer, chosen, ids, choice.confidence[picked].tolist(), logprobs, block_done=block_done
        )

    def _seed(self, answer: Answer, positions: list[int], choice: Choice) -> Commit:
        """Commit the first token of a block, whatever its confidence."""
        if not bool(torch.isfinite(choice.confidence).all()):
            return Commit(
                answer,
                error=NotFinite("the model produced NaN or infinite logits for this request"),
            )
        return self._commit(answer, positions, choice, torch.arange(1))

    def read(self, plan: Plan, parts: Sequence[Logits]) -> Choice:
        """The choice that the logits of a plan's passes give; still on the device.

        Some rows at a time, as choosing takes several times a row's logits in float64. Rules that
        compare a step with the one before keep all rows anyhow, and see them at once.
        """
        answer, wanted = plan.answer, plan.wanted
        scale, size = (
            answer.params.diffusion.cfg_scale,
            max(1, CHOICE_NUMBERS // self.card.vocab_size),
        )
        if plan.seed:
            return self.calculate_confidence(guided(parts, scale), answer, wanted, greedy=True)
        if len(wanted) <= size or RULES[_algorithm(answer)].keeps_rows:
            return self.calculate_confidence(guided(parts, scale), answer, wanted)
        return joined(
            [
                self.calculate_confidence(
                    guided(parts, scale, slice(at, at + size)), answer, wanted[at : at + size]
                )
                for at in range(0, len(wanted), size)
            ]
        )

    def finish(self, plans: Sequence[Plan], choices: Sequence[Choice]) -> list[Commit]:
        """Commit what was chosen. An error of one answer is its own."""
        commits = []
        for plan, choice in zip(plans, to_cpu(choices), strict=True):
            note_forward(plan)
            try:
                unmask = self._seed if plan.seed else self.unmask_tokens
                commits.append(unmask(plan.answer, plan.wanted, choice))
            except Exception as exc:  # whatever it is, it is this request's end and nobody else's
                commits.append(Commit(plan.answer, error=error_of(exc)))
        return commits

    # Whole steps

    @torch.inference_mode()
    def diffusion_step(self, answers: Sequence[Answer]) -> list[Commit]:
        """One denoising step of all `answers` in one forward. A row with NaN or infinity fails its
        answer alone.
        """
        plans = []
        for answer in answers:
            while len(answer.caches) < passes.twins(answer) and passes.capacity(answer):
                answer.caches.append(self.model.new_cache(passes.capacity(answer)))
            plans.append(self.plan(answer, 1 << 62))
        parts = iter(self.model.compute([p for plan in plans for p in plan.passes]))
        return self.finish(
            plans, [self.read(plan, [next(parts) for _ in plan.passes]) for plan in plans]
        )

    def generate(self, request: EngineRequest) -> None:
        """Denoise one request to its end, without an engine. Raises what a step reports
        (NotFinite).
        """
        if not request.sequences:
            request.make_sequences(self.tokenizer, self.card)
        while live := [a for a in request.sequences if a.finish_reason is None]:
            for commit in self.diffusion_step(live):
                if commit.error is not None:
                    raise commit.error
                advance(commit.answer, block_done=commit.block_done)


def note_forward(plan: Plan) -> None:
    """Note what a plan's forward has left in its answer's caches."""
    if plan.seed:
        passes.after_seed(plan.answer, plan.passes)
    else:
        passes.after_forward(plan.answer)


def _reaches_end(answer: Answer) -> bool:
    """Return whether an end token is committed and nothing before it is masked."""
    for token in answer.canvas[answer.prefix : answer.window.stop]:
        if token == answer.mask or token in answer.request.end_token_ids:
            return token != answer.mask
    return False


def _algorithm(answer: Answer) -> str:
    name = answer.params.diffusion.algorithm
    assert name is not None
    return name


def logprobs_of(choice: Choice, picked: Tensor) -> list[TokenLogprob]:
    """The log-probabilities of the picked candidates, or nothing when they were not asked for."""
    if choice.logprob is None:
        return []
    made = []
    for i in picked.tolist():
        top: tuple[tuple[int, float], ...] = ()
        if choice.top_tokens is not None and choice.top_logprobs is not None:
            top = tuple(
                zip(choice.top_tokens[i].tolist(), choice.top_logprobs[i].tolist(), strict=True)
            )
        made.append(TokenLogprob(int(choice.tokens[i]), float(choice.logprob[i]), top))
    return made
