"""The model call of one step: every answer's rows, guidance's second copies among them, and only the rows wanted through
the head."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.engine.batch import group, masked_positions, pack
from worker.engine.models.transformer import Transformer
from worker.engine.request import Answer


@torch.inference_mode()
def block_logits(model: Transformer, answers: list[Answer], mask: int) -> list[Tensor]:
    """Logits of each answer's masked positions in its open block: one [n_i, vocab] float32 tensor an answer.

    With cfg_scale s > 0 a second row has the prompt masked, and the result is u + (s + 1)(c - u) (LLaDA).
    """
    rows: list[list[int]] = []
    wanted: list[list[int]] = []
    for answer in answers:
        prompt = answer.request.prompt_token_ids
        positions = [len(prompt) + p for p in masked_positions(answer, mask)]
        rows.append(prompt + answer.canvas)
        wanted.append(positions)
        if answer.params.diffusion.cfg_scale > 0:
            rows.append([mask] * len(prompt) + answer.canvas)
            wanted.append(positions)
    device = model.embedding.weight.device
    results: list[Tensor | None] = [None] * len(rows)
    for indices in group([len(row) for row in rows]):
        packed = pack([rows[i] for i in indices], [wanted[i] for i in indices], mask, device)
        hidden = model.hidden(packed.ids, packed.lengths)
        logits = model.logits(hidden[packed.take[:, 0], packed.take[:, 1]])  # [wanted, vocab]
        for i, part in zip(indices, torch.split(logits, [len(wanted[i]) for i in indices]), strict=True):
            results[i] = part
    out: list[Tensor] = []
    row = 0
    for answer in answers:
        conditional = results[row]
        assert conditional is not None
        row += 1
        scale = answer.params.diffusion.cfg_scale
        if scale > 0:
            unconditional = results[row]
            assert unconditional is not None
            row += 1
            conditional = unconditional + (scale + 1) * (conditional - unconditional)
        out.append(conditional)
    return out
