"""Quantised checkpoints that cannot be read: each error names the tensor or the key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import ConfigurationError, ModelLoadError
from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import VDiffConfig
from worker.engine.config import RawConfig
from worker.engine.loader import load
from worker.engine.quantized import Quantization, read_quantization

V = "model.layers.0.self_attn.v_proj"


def spoiled(tmp_path: Path, family: str, **tensors: torch.Tensor | None) -> Path:
    """Copy a golden checkpoint; replace tensors of one projection, or drop those given as None."""
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    stored = load_file(folder / "model.safetensors")
    for leaf, tensor in tensors.items():
        if tensor is None:
            del stored[f"{V}.{leaf}"]
        else:
            stored[f"{V}.{leaf}"] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises((ModelLoadError, ConfigurationError)) as refused:
        load(VDiffConfig(model=str(folder), device="cpu", **options))
    return str(refused.value)


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    assert f"{V}.weight_scale is missing" in refusal(
        spoiled(tmp_path, "sdar_fp8", weight_scale=None)
    )


@pytest.mark.parametrize("family", ["sdar_fp8", "sdar_fp8_block", "sdar_nvfp4"])
def test_a_scale_of_another_shape_is_named(tmp_path: Path, family: str) -> None:
    said = refusal(spoiled(tmp_path, family, weight_scale=torch.ones(3, 5)))
    assert f"{V}.weight_scale has shape [3, 5]" in said


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("quant_method",), "gptq", "quant_method 'gptq'"),
        (("config_groups", "group_0", "weights", "strategy"), "group", "strategy 'group'"),
        (("config_groups", "group_0", "weights", "type"), "int", "type = 'int'"),
        (("config_groups", "group_1"), {}, "2 groups"),
    ],
)
def test_a_format_that_is_not_read_is_named(
    tmp_path: Path, path: tuple[str, ...], value: Any, said: str
) -> None:
    folder = spoiled(tmp_path, "sdar_fp8")
    config = json.loads((folder / "config.json").read_text())
    inner = config["quantization_config"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert said in refusal(folder)


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    assert "quantised already" in refusal(GOLDEN / "sdar_fp8", quantization="int8")


def test_llada2s_expert_form_is_read_in_its_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "llada2"
    folder.mkdir()
    key = {
        "enabled": True,
        "format": "e4m3fn",
        "weight_granularity": "per_expert_2d_block",
        "weight_block_size": [2, 4],
    }
    (folder / "config.json").write_text(json.dumps({"llada_fp8_experts": key}))
    found = read_quantization(RawConfig(folder))
    assert found == Quantization("llada_fp8_experts", (2, 4))
    weight = torch.full((3, 6), 2.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    stored = {"e.weight": weight, "e.weight_scale_inv": scale}
    read = found.read("e.weight", stored.__getitem__, stored)
    assert read.tolist() == [[2.0] * 4 + [20.0] * 2] * 2 + [[200.0] * 4 + [2000.0] * 2]


def test_the_older_key_of_llada2_means_blocks_of_128(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"use_fp8_experts": True}))
    assert read_quantization(RawConfig(tmp_path)) == Quantization("llada_fp8_experts", (128, 128))
