"""OpenAI's list of models, with vdiff's facts beside."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter, Depends

from api.auth import principal_of
from api.dependencies import Context, ContextDep
from shared import serving
from shared.served_models import ServedModel

router = APIRouter(
    prefix="/v1/models", tags=["models"], dependencies=[Depends(principal_of)]
)  # any key will do


async def _workers(context: Context) -> Counter[str]:
    async with context.database.read() as session:
        statement = serving.live_workers(stale_seconds=context.settings.worker_stale_seconds)
        return Counter(row.model for row in (await session.execute(statement)).all())


def model_object(model: ServedModel, workers: int) -> dict[str, Any]:
    card = model.card
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "vdiff",
        "family": card.family,
        "context_length": card.context_length,
        "vocab_size": card.vocab_size,
        "capabilities": card.capabilities,
        "defaults": card.defaults,
        "revision": card.revision,
        "dtype": card.dtype,
        "device": card.device,
        "slots": card.max_num_seqs,
        "workers": workers,
    }


@router.get("")
async def list_models(context: ContextDep) -> dict[str, Any]:
    """All models that were ever served, in the order of their first registration; `workers` says
    how many live now.
    """
    workers = await _workers(context)
    return {
        "object": "list",
        "data": [model_object(m, workers[m.name]) for m in await context.models.all()],
    }


@router.get("/{name:path}")
async def get_model(name: str, context: ContextDep) -> dict[str, Any]:
    model = await context.models.get(name)
    return model_object(model, (await _workers(context))[model.name])
