"""The models that were ever served, as the API needs them: card and tokenizer, cached; statements
in `shared.serving`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime

from shared import serving
from shared.db.session import AsyncDatabase
from shared.errors import ModelNotFound
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper

CARD_SECONDS = 1.0  # how long a card is trusted; a worker that registers anew is seen after so long


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    card: ModelCard
    tokenizer_hash: str
    created_at: datetime


class ServedModels:
    """Cards are re-read every second, tokenizers are built once per content."""

    def __init__(self, database: AsyncDatabase) -> None:
        self._database = database
        self._models: dict[str, ServedModel] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self._tokenizers: dict[
            str, tuple[str, TokenizerWrapper]
        ] = {}  # by model: (hash, tokenizer)

    async def all(self) -> list[ServedModel]:
        """In the order of first registration."""
        async with self._reading:
            if time.monotonic() - self._read_at > CARD_SECONDS:
                async with self._database.read() as session:
                    rows = (await session.execute(serving.list_models())).all()
                self._models = {
                    r.name: ServedModel(
                        r.name, ModelCard.from_json(r.card), r.tokenizer_hash, r.created_at
                    )
                    for r in rows
                }
                self._read_at = time.monotonic()
        return list(self._models.values())

    async def get(self, name: str) -> ServedModel:
        """Raises ModelNotFound when nobody ever served it, naming those that were."""
        await self.all()
        if name not in self._models:
            known = ", ".join(list(self._models)[:5]) or "none yet; is a worker running?"
            raise ModelNotFound(
                f"model {name[:200]!r} was never served here; served: {known}", param="model"
            )
        return self._models[name]

    async def tokenizer(self, model: ServedModel) -> TokenizerWrapper:
        """The model's tokenizer, built in a thread the first time."""
        cached = self._tokenizers.get(model.name)
        if cached is not None and cached[0] == model.tokenizer_hash:
            return cached[1]
        async with self._database.read() as session:
            row = (await session.execute(serving.get_model(model.name))).one()
        tokenizer = await asyncio.to_thread(TokenizerWrapper.from_files, row.tokenizer_files)
        self._tokenizers[model.name] = (row.tokenizer_hash, tokenizer)
        return tokenizer
