"""The facts about a served model that a worker registers and the API validates requests against.

Pure data; travels as JSON in the `models` table. Built by `worker.engine.loader`, read by `api` and
`shared.sampling_params`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts of one served model.

    `capabilities` lists what a request may ask for: `{"algorithms": [...], "caches": [...],
    "logprobs": bool, "endpoints": [...]}`. `defaults` is the model's generation_config reduced to
    the keys that vdiff knows (`temperature`, `top_p`, `top_k`, `max_tokens`, and under `diffusion`
    the diffusion keys).
    """

    name: str
    family: str
    context_length: int  # tokens, prompt and answer together
    vocab_size: int
    mask_token_id: int  # -1 where the family has none
    end_token_ids: tuple[int, ...]
    suppress_token_ids: dict[str, tuple[int, ...]]  # "logits" -> ids, "confidence" -> ids
    capabilities: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None  # hash of the weights' file list and sizes, or the hub revision
    dtype: str = "float32"
    device: str = "cpu"
    max_num_seqs: int = 8  # slots of the engine
    regime: str = "full"  # see `shared.algorithms`
    block_length: int | None = 32  # the family's default, tokens; None: the whole answer
    verifier: str | None = None  # the name of the verifier beside it, for APD

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelCard:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["end_token_ids"] = tuple(known["end_token_ids"])
        known["suppress_token_ids"] = {k: tuple(v) for k, v in known["suppress_token_ids"].items()}
        return cls(**known)
