"""The verifier of Adaptive Parallel Decoding: a small autoregressive model with the diffusion
model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.errors import ConfigurationError
from shared.tokenizer import TokenizerWrapper
from worker.engine.batch import Pass


class CausalModel(Protocol):
    """A causal language model over passes with caches of its own making."""

    @property
    def cache_bytes_per_token(self) -> int: ...
    def compute(self, passes: Sequence[Pass]) -> Any: ...
    def new_cache(self, capacity: int) -> Any: ...


class Verifier:
    """Scores drafts. Its vocabulary may be smaller or larger than the model's.

    Tokens that it lacks have probability zero from it; behind one of them its context would be
    wrong, so such a token is accepted only as a draft's first, and ends it.
    """

    def __init__(self, model: CausalModel, vocab_size: int, name: str) -> None:
        self.model, self.vocab_size, self.name = model, vocab_size, name

    @property
    def cache_bytes_per_token(self) -> int:
        return self.model.cache_bytes_per_token

    def new_cache(self, capacity: int) -> Any:
        return self.model.new_cache(capacity)

    def known(self, tokens: list[int]) -> list[int]:
        """Tokens that it lacks, replaced by its first: something has to stand in their place."""
        return [token if token < self.vocab_size else 0 for token in tokens]

    def comparable(self, draft: Tensor) -> Tensor:
        """Bool [m]: positions that may be accepted as far as its vocabulary goes."""
        lacking = (draft >= self.vocab_size).long()
        return (lacking.cumsum(0) - lacking) == 0

    def score(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Log-softmax [wanted, own vocabulary] of each pass, in one forward."""
        return [logits[:].log_softmax(-1) for logits in self.model.compute(passes)]

    def fit(self, log_p: Tensor, vocab_size: int) -> Tensor:
        """The same over the model's vocabulary: cut, or filled with -inf."""
        width = log_p.shape[-1]
        if width >= vocab_size:
            return log_p[:, :vocab_size]
        filling = torch.full(
            (len(log_p), vocab_size - width), -torch.inf, dtype=log_p.dtype, device=log_p.device
        )
        return torch.cat((log_p, filling), dim=-1)


def check_tokenizers(model: TokenizerWrapper, verifier: TokenizerWrapper) -> None:
    """Raises ConfigurationError unless the tokens that both know have the same ids."""
    ours, theirs = model.vocabulary(), verifier.vocabulary()
    common = set(ours) & set(theirs)
    if len(common) < 0.9 * min(len(ours), len(theirs)):
        message = f"the verifier's tokenizer shares only {len(common)} of {len(ours)} tokens with the model's"
        raise ConfigurationError(message, param="verifier")
    for token in common:
        if ours[token] != theirs[token]:
            ids = f"{token!r} is {theirs[token]} there and {ours[token]} here"
            message = f"the verifier's tokenizer does not fit the model's: {ids}"
            raise ConfigurationError(message, param="verifier")
