"""RenoiseDecoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper
from worker.engine.decoder import Commit
from worker.engine.request import Answer


class RenoiseDecoder:
    def __init__(self, model: Any, tokenizer: TokenizerWrapper, *, card: ModelCard) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card

    def renoise_step(self, answers: Sequence[Answer]) -> list[Commit]:
        raise NotImplementedError
