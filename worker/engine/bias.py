"""`logit_bias` on a request's own logits, before anything else looks at them: bans, nudges, picks."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.logit_bias import added
from shared.sampling_params import SamplingParams


def add_bias(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [n, vocab] with the request's bias, changed in place; untouched where there is none."""
    if not params.logit_bias:
        return logits
    tokens = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
    numbers = torch.tensor(added(params.logit_bias), dtype=logits.dtype, device=logits.device)
    logits[:, tokens] += numbers
    return logits
