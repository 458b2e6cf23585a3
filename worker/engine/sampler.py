"""DiffusionSampler: one denoising step of any mix of requests, each with its own parameters.

`diffusion_step` = forward, `calculate_confidence`, then `unmask_tokens` for each answer. The engine's loop calls it for
whatever the scheduler picked; `generate` loops over it for one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import NotFinite, VDiffError
from shared.sampling_params import DiffusionParams, SamplingParams
from shared.tokenizer import TokenizerWrapper
from worker.engine.batch import masked_positions
from worker.engine.forward import block_logits
from worker.engine.models.transformer import Transformer
from worker.engine.randomness import uniform
from worker.engine.request import Answer, EngineRequest
from worker.engine.rules import RULES, RuleInput
from worker.engine.stopping import advance


@dataclass(frozen=True, slots=True)
class DiffusionSamplerConfig:
    """Defaults of `DiffusionSampler.generate`, under the names of the original design."""

    mask_id: int
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"

    def params(self, max_tokens: int) -> SamplingParams:
        diffusion = DiffusionParams(algorithm=self.remasking, steps=self.steps, block_length=self.block_length)
        return SamplingParams(max_tokens=max_tokens, temperature=self.temperature, diffusion=diffusion)


@dataclass(frozen=True, slots=True)
class Commit:
    """What one step did to one answer. `error` set: the answer cannot go on."""

    answer: Answer
    positions: list[int]
    token_ids: list[int]
    confidences: list[float]
    error: VDiffError | None = None


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k largest and outside the smallest set of probability >= top_p (Holtzman et al. 2020).

    logits [n, vocab], already divided by the temperature.
    """
    if 0 < top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


class DiffusionSampler:
    """Samples and commits tokens; holds no state of a request."""

    def __init__(self, model: Transformer, tokenizer: TokenizerWrapper, config: DiffusionSamplerConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config

    def calculate_confidence(self, logits: Tensor, answer: Answer, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Choose a token for each row and say how sure the model is.

        Confidence is the softmax of the raw logits (no temperature, no noise) at the chosen token, as in LLaDA. Noise is
        Gumbel's: argmax(logits / T + g), which samples the tempered, filtered distribution exactly.

        Args:
            logits: [n, vocab] float32 of the answer's masked positions.

        Returns:
            tokens int64 [n] and confidence float32 [n].
        """
        params, diffusion = answer.params, answer.params.diffusion
        suppressed = list(diffusion.suppress_token_ids or ())
        if diffusion.suppress_end == "logits":
            logits = logits.index_fill(-1, torch.tensor(suppressed, device=logits.device), -torch.inf)
        allowed = logits.index_fill(-1, torch.tensor([self.config.mask_id], device=logits.device), -torch.inf)
        if params.temperature > 0:
            tempered = filter_logits(allowed.double() / params.temperature, params.top_k, params.top_p)
            rows = torch.tensor(positions, device=logits.device)
            noise = uniform(answer.seed, answer.steps, 0, rows, logits.shape[-1])
            tokens = (tempered - torch.log(-torch.log(noise))).argmax(-1)
        else:
            tokens = allowed.argmax(-1)
        if diffusion.suppress_end == "confidence":
            logits = logits.index_fill(-1, torch.tensor(suppressed, device=logits.device), -torch.inf)
        # Not exp(logit - logsumexp): near 1 its rounding reorders positions that softmax tells apart.
        return tokens, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def unmask_tokens(self, answer: Answer, positions: list[int], tokens: Tensor, confidence: Tensor) -> Commit:
        """Let the answer's rule choose among its masked positions, and write the chosen tokens into its canvas."""
        rows = torch.tensor(positions, device=confidence.device)
        quota = answer.quota[min(answer.block_step, len(answer.quota) - 1)]
        given = RuleInput(
            confidence=confidence,
            quota=min(quota, len(positions)),
            params=answer.params.diffusion,
            uniform=lambda: uniform(answer.seed, answer.steps, 1, rows, 1)[:, 0].float(),
        )
        picked = RULES[answer.params.diffusion.algorithm].select(given).sort().values
        chosen = [positions[i] for i in picked.tolist()]
        ids: list[int] = tokens[picked].tolist()
        for position, token in zip(chosen, ids, strict=True):
            answer.canvas[position] = token
        return Commit(answer, chosen, ids, confidence[picked].tolist())

    @torch.inference_mode()
    def diffusion_step(self, answers: list[Answer]) -> list[Commit]:
        """One denoising step of all `answers` in shared forwards. A row with NaN or infinity fails its answer alone."""
        commits = []
        for answer, logits in zip(answers, block_logits(self.model, answers, self.config.mask_id), strict=True):
            answer.forwards += 1
            if not bool(torch.isfinite(logits).all()):
                error = NotFinite("the model produced NaN or infinite logits for this request")
                commits.append(Commit(answer, [], [], [], error))
                continue
            positions = masked_positions(answer, self.config.mask_id)
            tokens, confidence = self.calculate_confidence(logits, answer, positions)
            commits.append(self.unmask_tokens(answer, positions, tokens, confidence))
            answer.steps += 1
            answer.block_step += 1
        return commits

    def generate(self, request: EngineRequest) -> None:
        """Denoise one request to its end, without an engine. Raises what a step reports (NotFinite)."""
        if not request.sequences:
            request.make_sequences(self.tokenizer, self.config.mask_id)
        while live := [a for a in request.sequences if a.finish_reason is None]:
            for commit in self.diffusion_step(live):
                if commit.error is not None:
                    raise commit.error
                advance(commit.answer, commit.positions, self.config.mask_id)
