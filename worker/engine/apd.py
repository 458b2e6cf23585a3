"""APDDecoder: Adaptive Parallel Decoding (Israel, Van den Broeck, Grover 2025,
https://arxiv.org/abs/2506.00413).

Strictly left to right. The diffusion model drafts a window of tokens at once; a small
autoregressive verifier scores the draft, and the longest prefix is committed on which the draft
agrees with a sample from the mixture of the two:

    draft   = argmax( log p_D / T + g )
    target  = argmax( (R log p_D + (1 - R) log p_AR) / T + g )      the same Gumbel noise g
            (universal coupling)
    accept  = draft == target, the first position always, then cumulative product

The published program differs from the paper (no noise at acceptance, temperature applied twice, raw
logits mixed); this follows the paper. At temperature 0 with R < 1 both agree. Many sequences draft
in one forward and verify in one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.diffusion_params import DiffusionParams
from shared.errors import InvalidParameter, NotFinite
from shared.model_card import ModelCard
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper
from worker.engine import passes
from worker.engine.batch import Pass
from worker.engine.bias import add_bias
from worker.engine.config import ModelConfig
from worker.engine.decoder import Commit, Logits, Model, Plan, error_of
from worker.engine.outputs import TokenLogprob
from worker.engine.precision import wide
from worker.engine.randomness import uniform
from worker.engine.request import Answer, EngineRequest
from worker.engine.rules.base import gumbel
from worker.engine.sampler import TOKEN_STREAM, filter_logits
from worker.engine.stopping import advance
from worker.engine.verifier import Verifier


@dataclass(frozen=True, slots=True)
class APDConfig:
    """Defaults of `APDDecoder.generate`."""

    mixture_weight: float = 0.7  # R: the diffusion model's share
    kv_window: int | None = None  # W: rows recomputed left of the draft; None: no cache
    max_lookahead: int | None = None  # M: masks that the diffusion model sees; None: all

    def params(self, max_tokens: int, temperature: float = 0.0) -> SamplingParams:
        diffusion = DiffusionParams(
            algorithm="apd",
            mixture_weight=self.mixture_weight,
            kv_window=self.kv_window,
            max_lookahead=self.max_lookahead,
        )
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, diffusion=diffusion)


@dataclass(frozen=True, slots=True)
class Draft:
    """The tokens that the diffusion model proposes for one answer; on its device."""

    log_p: Tensor  # [m, vocab], log-softmax; -inf for the mask
    tokens: Tensor  # [m]
    noise: Tensor | None  # [m, vocab] Gumbel, None at temperature 0


class APDDecoder:
    """Drafts with the diffusion model and verifies with an autoregressive one; holds no state of a
    request.

    Attributes:
        tokens_per_step, acceptance_rate: over all steps so far, as the paper reports them.
    """

    def __init__(
        self,
        model: Model,
        verifier: Verifier | None,
        tokenizer: TokenizerWrapper,
        config: APDConfig | None = None,
        *,
        facts: ModelConfig,
        card: ModelCard,
    ) -> None:
        self.model, self.verifier, self.tokenizer = model, verifier, tokenizer
        self.config, self.facts, self.card = config or APDConfig(), facts, card
        self.steps = self.drafted = self.accepted = 0
        self.verifier_seconds = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.accepted / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    # A step's parts

    def plan(self, answer: Answer, rows: int) -> Plan:
        wanted = passes.lookahead(answer)
        return Plan(answer, passes.window_passes(answer, self.facts, wanted), wanted)

    def read(self, plan: Plan, parts: Sequence[Logits]) -> Draft:
        """The draft that a forward's logits give."""
        logits, answer = parts[0][:], plan.answer
        params, diffusion = answer.params, answer.params.diffusion
        add_bias(logits, params)
        if diffusion.suppress_token_ids:
            suppressed = torch.tensor(list(diffusion.suppress_token_ids), device=logits.device)
            logits.index_fill_(-1, suppressed, -torch.inf)
        logits[:, self.card.mask_token_id] = -torch.inf
        log_p = logits.log_softmax(-1)
        if params.temperature == 0:
            return Draft(log_p, log_p.argmax(-1), None)
        rows = torch.tensor(plan.wanted, device=logits.device)
        noise = gumbel(uniform(answer.seed, answer.steps, TOKEN_STREAM, rows, logits.shape[-1]))
        tempered = filter_logits(
            log_p.to(wide(log_p.device)) / params.temperature,
            params.top_k,
            params.top_p,
            nucleus_first=self.facts.shift,
        )
        return Draft(log_p, (tempered + noise).argmax(-1), noise)

    def should_accept(
        self, draft: Draft, log_p_ar: Tensor | None, params: SamplingParams
    ) -> Tensor:
        """Which of the draft's tokens are accepted, bool [m]; a prefix, the first always.

        Args:
            log_p_ar: the verifier's log-softmax [m, vocab]; None when it has no share
                (mixture_weight 1).
        """
        weight = params.diffusion.mixture_weight
        assert weight is not None
        mixture = (
            draft.log_p if log_p_ar is None else weight * draft.log_p + (1 - weight) * log_p_ar
        )
        if weight == 0 and log_p_ar is not None:
            mixture = log_p_ar.masked_fill(
                draft.log_p == -torch.inf, -torch.inf
            )  # 0 * -inf is not a number
        if draft.noise is None:
            target = mixture.argmax(-1)
        else:
            tempered = filter_logits(
                mixture.to(wide(mixture.device)) / params.temperature,
                params.top_k,
                params.top_p,
                nucleus_first=self.facts.shift,
            )
            target = (tempered + draft.noise).argmax(-1)
        agrees = draft.tokens == target
        agrees[0] = True
        return agrees.cumprod(0).bool()

    def finish(self, plans: Sequence[Plan], drafts: Sequence[Draft]) -> list[Commit]:
        """Verify all drafts in one forward of the verifier, and commit what is accepted."""
        tokens = [draft.tokens.tolist() for draft in drafts]
        scores = self._verify(plans, tokens)
        for plan in plans:
            passes.after_forward(plan.answer)
        commits = []
        for plan, draft, ids, log_p_ar in zip(plans, drafts, tokens, scores, strict=True):
            try:
                commits.append(self._commit(plan, draft, ids, log_p_ar))
            except Exception as exc:  # whatever it is, it is this request's end and nobody else's
                commits.append(Commit(plan.answer, error=error_of(exc)))
        return commits

    def _verify(self, plans: Sequence[Plan], tokens: Sequence[list[int]]) -> list[Tensor | None]:
        """The verifier's log-softmax over the model's vocabulary for each draft, where it has a
        share.
        """
        out: list[Tensor | None] = [None] * len(plans)
        asked = [i for i, plan in enumerate(plans) if passes.is_verified(plan.answer)]
        if not asked:
            return out
        if self.verifier is None:
            raise InvalidParameter(
                "apd needs a verifier; start with --verifier", param="diffusion.algorithm"
            )
        began = time.monotonic()
        parts = self.verifier.score(
            [self._verifier_pass(plans[i].answer, tokens[i]) for i in asked]
        )
        for i, part in zip(asked, parts, strict=True):
            # Both distributions get the bias, so that what is drafted and what is accepted follow
            # the same wish.
            scored = self.verifier.fit(part, self.card.vocab_size)
            params = plans[i].answer.params
            out[i] = add_bias(scored, params).log_softmax(-1) if params.logit_bias else scored
        seconds = time.monotonic() - began
        self.verifier_seconds += seconds
        for i in asked:
            plans[i].answer.verifier_seconds += seconds / len(asked)
        return out

    def _verifier_pass(self, answer: Answer, draft: list[int]) -> Pass:
        """Rows from the first position that is not in the verifier's cache to the one that predicts
        the draft's last.
        """
        assert self.verifier is not None
        p = len(answer.prompt) + answer.prefix
        sequence = [*answer.prompt, *answer.canvas[: answer.prefix], *draft[:-1]]
        if answer.verifier_cache is None:
            answer.verifier_cache = self.verifier.new_cache(len(answer.prompt) + len(answer.canvas))
        first = answer.verified
        wanted = list(range(p - 1 - first, p - 1 - first + len(draft)))
        return Pass(
            self.verifier.known(sequence[first:]),
            wanted,
            first,
            "causal",
            cache=answer.verifier_cache,
            keys=len(sequence),
        )

    def _commit(self, plan: Plan, draft: Draft, ids: list[int], log_p_ar: Tensor | None) -> Commit:
        answer, params = plan.answer, plan.answer.params
        accept = self.should_accept(draft, log_p_ar, params)
        if self.verifier is not None and log_p_ar is not None:
            accept &= self.verifier.comparable(draft.tokens)
        count = int(accept.sum())
        chosen = draft.log_p.gather(-1, draft.tokens[:, None])[:count, 0]
        values = chosen.tolist()
        if not bool(torch.isfinite(chosen).all()):
            return Commit(
                answer,
                error=NotFinite("the model produced NaN or infinite logits for this request"),
            )
        logprobs = self._logprobs(draft, ids[:count], values, params.logprobs)
        positions = plan.wanted[:count]
        for i, position in enumerate(positions):
            answer.canvas[position] = ids[i]
            if logprobs:
                answer.logprobs[position] = logprobs[i]
        if log_p_ar is not None:
            answer.verified = len(answer.prompt) + answer.prefix + count - 1
        answer.steps += 1
        answer.block_step += 1
        answer.drafted += len(ids)
        answer.accepted += count
        self.steps += 1
        self.drafted += len(ids)
        self.accepted += count
        rest = {"positions": plan.wanted[count:], "token_ids": ids[count:]}
        return Commit(
            answer,
            positions,
            ids[:count],
            [float(torch.tensor(v).exp()) for v in values],
            logprobs,
            rest,
        )

    @staticmethod
    def _logprobs(
        draft: Draft, ids: list[int], values: list[float], count: int | None
    ) -> list[TokenLogprob]:
        if count is None:
            return []
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
        if count:
            top = draft.log_p[: len(ids)].topk(count, dim=-1)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tops = [tuple(zip(i, v, strict=True)) for i, v in pairs]
        return [
            TokenLogprob(token, value, t) for token, value, t in zip(ids, values, tops, strict=True)
        ]

    # Whole steps

    @torch.inference_mode()
    def parallel_decode_step(self, answers: Sequence[Answer]) -> list[Commit]:
        """Draft and verify once for all `answers`."""
        plans = []
        for answer in answers:
            if passes.capacity(answer) and not answer.caches:
                answer.caches.append(self.model.new_cache(passes.capacity(answer)))
            plans.append(self.plan(answer, 1 << 62))
        parts = iter(self.model.compute([p for plan in plans for p in plan.passes]))
        return self.finish(
            plans, [self.read(plan, [next(parts) for _ in plan.passes]) for plan in plans]
        )

    def generate(self, request: EngineRequest) -> None:
        """Decode one request to its end, without an engine. Raises what a step reports."""
        if not request.sequences:
            request.make_sequences(self.tokenizer, self.card)
        while live := [a for a in request.sequences if a.finish_reason is None]:
            for commit in self.parallel_decode_step(live):
                if commit.error is not None:
                    raise commit.error
                advance(commit.answer)
