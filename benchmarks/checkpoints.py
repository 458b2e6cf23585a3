"""Random-weight checkpoints in LLaDA's layout, made on the fly: speed does not depend on what the
weights say.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from vdiff import bundled
from worker.engine import VDiffConfig, VDiffEngine
from worker.engine.config import ModelConfig
from worker.engine.models import llada
from worker.engine.models.transformer import Transformer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Shape:
    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 768
    vocab: int = 757  # at least that of vdiff-tiny's tokenizer, which goes with it
    context: int = 1024


def make(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the checkpoint; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = bundled.folder(bundled.DEFAULT_MODEL)
    for name in _TOKENIZER_FILES:
        shutil.copy(tiny / name, folder / name)
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    config |= {
        "d_model": shape.width,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.heads,
        "mlp_hidden_size": shape.mlp,
        "embedding_size": shape.vocab,
        "vocab_size": shape.vocab,
        "max_sequence_length": shape.context,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text('{"temperature": 0.0}', encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    facts = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        ours = dict(Transformer(facts).named_parameters())
    tensors = {}
    for source in llada.tensors(facts):
        size = ours[source.target][source.at].shape if source.at else ours[source.target].shape
        tensors[source.name] = torch.ones(size) if len(size) == 1 else weight(*size)
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    return folder


def step_ms(
    model: Path, *, slots: int, prompt_tokens: int, max_tokens: int, threads: int | None = None
) -> float:
    """Mean time of a full batch's step, milliseconds."""
    from shared.sampling_params import SamplingParams

    config = VDiffConfig(model=str(model), device="cpu", max_num_seqs=slots, num_threads=threads)
    with VDiffEngine(config) as engine:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for _ in range(2):  # the first warms up
            before, began = engine.stats.steps, time.perf_counter()
            handles = [
                engine.submit(f"r{i}", [i + 1] * prompt_tokens, params) for i in range(slots)
            ]
            for handle in handles:
                handle.result()
            elapsed, steps = time.perf_counter() - began, engine.stats.steps - before
    return 1000 * elapsed / steps


def make_slow(
    folder: Path, *, at_least_ms: float, slots: int, prompt_tokens: int, max_tokens: int
) -> tuple[Path, float]:
    """A model whose step takes that long here, and what it takes: layers are added until it does."""
    layers = 4
    for attempt in range(6):
        model = make(folder / f"slow-{attempt}", Shape(width=384, heads=6, mlp=1024, layers=layers))
        measured = step_ms(
            model, slots=slots, prompt_tokens=prompt_tokens, max_tokens=min(max_tokens, 8)
        )
        if measured >= at_least_ms:
            return model, measured
        shutil.rmtree(model)
        layers = max(layers + 1, math.ceil(layers * 1.2 * at_least_ms / measured))
    raise RuntimeError(f"no model with a step of {at_least_ms} ms: {layers} layers were not enough")
