"""Which checkpoints load: a config.json that needs another computation is refused, with the key
that says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelLoadError
from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import ModelConfig

CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# One key of each kind that changes what a forward or a step computes.
FOREIGN: dict[str, Any] = {
    "expert_capacity_factor": 48,
    "delete_token_id": 156930,
    "rope_scaling": {"rope_type": "longrope", "factor": 4.0},
    "rope_interleaved": True,
    "sliding_window_pattern": 4,
    "attn_logit_softcapping": 50.0,
    "embedding_multiplier": 12.0,
    "use_fp4_experts": True,
    "num_nextn_predict_layers": 1,
    "attention_chunk_size": 8192,
    "quantization_config": {"quant_method": "awq", "bits": 4},
}


def changed(tmp_path: Path, checkpoint: str, **keys: Any) -> Path:
    """Copy the config files of a golden checkpoint and change keys."""
    folder = tmp_path / checkpoint
    folder.mkdir(parents=True)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(GOLDEN / checkpoint / file, folder)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_golden_checkpoint_is_read(checkpoint: str) -> None:
    assert ModelConfig.from_folder(GOLDEN / checkpoint).vocab_size == 512


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, checkpoint: str, key: str
) -> None:
    from worker.engine.config import RawConfig
    from worker.engine.quantized import read_quantization

    folder = changed(tmp_path, checkpoint, **{key: FOREIGN[key]})
    with pytest.raises(ModelLoadError) as refused:
        ModelConfig.from_folder(folder)
        read_quantization(RawConfig(folder))
    assert key in str(refused.value) or "RoPE scaling" in str(refused.value)


@pytest.mark.parametrize(
    "key", ["torch_dtype", "transformers_version", "use_cache", "initializer_range", "my_note"]
)
def test_a_key_that_changes_nothing_is_no_matter(tmp_path: Path, key: str) -> None:
    ModelConfig.from_folder(changed(tmp_path, "sdar", **{key: 1.5}))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"use_regular_causal": True}, "I-DLM"),
        ({"block_size": 1}, "I-DLM"),
    ],
)
def test_a_checkpoint_with_another_familys_tag_is_named(
    tmp_path: Path, keys: dict[str, Any], name: str
) -> None:
    with pytest.raises(ModelLoadError, match=name):
        ModelConfig.from_folder(changed(tmp_path, "sdar", **keys))


def test_block_routing_under_the_tag_of_llada2_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"LLaDA2\.2"):
        ModelConfig.from_folder(changed(tmp_path, "llada2_moe", expert_capacity=48))
