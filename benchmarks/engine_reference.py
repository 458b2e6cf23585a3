"""The engine against a plain loop, same weights and same steps.

The loop is written as published programs are (LLaDA's generate.py): each step a forward over prompt
and whole answer, the head over every position, a softmax in float64 over the whole vocabulary, the
surest masked position committed. It has no batching of its own: several requests go one after
another, or, where their prompts are of one length, in one tensor.
"""

from __future__ import annotations

import time
from typing import Any

import checkpoints
import torch
import torch.nn.functional as F
from report import progress, say
from servers import public_folder

from shared.diffusion_params import DiffusionParams
from shared.sampling_params import SamplingParams
from worker.engine import VDiffConfig, VDiffEngine
from worker.engine.batch import Pass, arrange
from worker.engine.models.transformer import Transformer


def full_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """The head over every position of every row: ids [batch, length] -> [batch, length, vocab]."""
    whole = [Pass(row, list(range(len(row)))) for row in ids.tolist()]
    layout = arrange(whole, ids.device, pad=False)
    return model.logits(model.hidden(layout, ids.shape[1])).view(*ids.shape, -1)


@torch.inference_mode()
def plain_loop(
    model: Transformer, prompts: list[list[int]], mask: int, max_tokens: int
) -> list[list[int]]:
    """One block, one token a step. Prompts of one length."""
    start = len(prompts[0])
    ids = torch.tensor([prompt + [mask] * max_tokens for prompt in prompts])  # [batch, length]
    for _ in range(max_tokens):
        masked = ids == mask
        logits = full_logits(model, ids)
        logits[:, :, mask] = -torch.inf
        chosen = logits.argmax(-1)
        probability = F.softmax(logits.to(torch.float64), dim=-1)
        confidence = probability.gather(-1, chosen[..., None])[..., 0]
        confidence = confidence.masked_fill(~masked, -torch.inf)
        best = confidence.argmax(-1)
        rows = torch.arange(len(prompts))
        ids[rows, best] = chosen[rows, best]
    return [row[start:].tolist() for row in ids]


def _timed(work: Any) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    answers = work()
    return time.perf_counter() - began, answers


def run(
    *, width: int, layers: int, vocab: int, prompt_tokens: int, max_tokens: int, batches: list[int]
) -> list[dict[str, Any]]:
    """A row per number of concurrent requests."""
    shape = checkpoints.Shape(
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        mlp=3 * width,
        vocab=vocab,
        context=prompt_tokens + max_tokens,
    )
    rows = []
    with public_folder() as folder:
        model = checkpoints.make(folder / "model", shape)
        config = VDiffConfig(model=str(model), device="cpu", max_num_seqs=max(batches))
        with VDiffEngine(config) as engine:
            mask = engine.card.mask_token_id
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                diffusion=DiffusionParams(block_length=max_tokens),
            )

            def batched(prompts: list[list[int]]) -> list[list[int]]:
                handles = [
                    engine.submit(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)
                ]
                return [handle.result().outputs[0].token_ids for handle in handles]

            say(f"engine: {torch.get_num_threads()} torch threads")
            batched([[1] * prompt_tokens])  # warms up
            for count in progress(batches, len(batches), "engine"):
                prompts = [[(7 * i + j) % 256 for j in range(prompt_tokens)] for i in range(count)]
                ours, answers = _timed(lambda prompts=prompts: batched(prompts))
                one_by_one, expected = _timed(
                    lambda prompts=prompts: [
                        plain_loop(engine.model, [p], mask, max_tokens)[0] for p in prompts
                    ]
                )
                together = one_by_one
                if count > 1:
                    together, _ = _timed(
                        lambda prompts=prompts: plain_loop(engine.model, prompts, mask, max_tokens)
                    )
                tokens = count * max_tokens
                same = sum(
                    a == b
                    for mine, its in zip(answers, expected, strict=True)
                    for a, b in zip(mine, its, strict=True)
                )
                rows.append(
                    {
                        "concurrent": count,
                        "steps": max_tokens,
                        "engine_tokens_per_s": tokens / ours,
                        "loop_tokens_per_s": tokens / one_by_one,
                        "loop_batched_tokens_per_s": tokens / together,
                        "ratio": one_by_one / ours,
                        "ratio_to_batched": together / ours,
                        "same_tokens": f"{same}/{tokens}",
                    }
                )
    return rows
