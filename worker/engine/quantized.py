"""Quantised checkpoints: how stored 8-bit and 4-bit weights become numbers.

Weight-only: activations stay as they are. Formats:

- compressed-tensors (https://github.com/vllm-project/compressed-tensors) with FP8 weights, scaled
  per channel, per tensor or per block, and with NVFP4 weights;
- `quant_method: fp8`, DeepSeek-V3's layout, whose `weight_scale_inv` multiplies despite its name;
- the expert form of LLaDA2's FP8 checkpoints.

Reading only: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import ModelLoadError
from worker.engine.config import RawConfig

# What stands beside a quantised weight. Scales of activations and of the K/V cache are not needed
# to read weights.
_SCALES = ("weight_scale", "weight_scale_inv", "weight_global_scale")
_UNUSED = ("input_scale", "input_global_scale", "k_scale", "v_scale")
_PACKED = "weight_packed"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of a 4-bit float; bit 3 is the sign
NVFP4_GROUP = 16

Get = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Quantization:
    """The storage format of a checkpoint's weights.

    `block` is the (rows, columns) that share a scale, for formats that scale in blocks.
    """

    method: str
    block: tuple[int, int] | None = None

    def is_companion(self, name: str) -> bool:
        """Return whether a tensor of the file only says how to read another one."""
        return name.rpartition(".")[2] in (*_SCALES, *_UNUSED)

    def stored_name(self, name: str, names: Collection[str]) -> str:
        """Return the name under which a weight stands in the file."""
        base, _, leaf = name.rpartition(".")
        packed = f"{base}.{_PACKED}"
        return packed if leaf == "weight" and name not in names and packed in names else name

    def read(self, name: str, get: Get, names: Collection[str]) -> Tensor:
        """Return a tensor in float32 if it is quantised, else as it is stored.

        Args:
            name: its name in an unquantised checkpoint.
            get: reads a tensor of the file by its name there.
            names: every tensor of the checkpoint.

        Raises:
            ModelLoadError: naming a scale that is missing or has the wrong shape.
        """
        base = name.rpartition(".")[0]
        stored = self.stored_name(name, names)
        if stored.endswith(_PACKED):
            return self._nvfp4(base, get)
        weight = get(name)
        if not weight.dtype.is_floating_point or weight.dtype.itemsize > 1:
            return weight
        scale = next(
            (f"{base}.{s}" for s in ("weight_scale", "weight_scale_inv") if f"{base}.{s}" in names),
            None,
        )
        if scale is None:
            raise ModelLoadError(
                f"tensor {name} is stored in 8 bits, and {base}.weight_scale is missing"
            )
        return weight.float() * self._spread(get(scale).float(), weight.shape, scale)

    def _spread(self, scale: Tensor, shape: torch.Size, name: str) -> Tensor:
        """Return scales that multiply a weight of `shape` [out, in], from one per tensor, row or
        block.
        """
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        if tuple(scale.shape) in ((shape[0], 1), (shape[0],)) and self.block is None:
            return scale.reshape(-1, 1)
        if self.block is not None:
            rows, columns = self.block
            if tuple(scale.shape) == (-(-shape[0] // rows), -(-shape[1] // columns)):
                wide = scale.repeat_interleave(rows, 0)[: shape[0]]
                return wide.repeat_interleave(columns, 1)[:, : shape[1]]
        raise ModelLoadError(
            f"tensor {name} has shape {list(scale.shape)}, which fits no weight of shape {list(shape)}"
            + ("" if self.block is None else f" in blocks of {list(self.block)}")
        )

    @staticmethod
    def _nvfp4(base: str, get: Get) -> Tensor:
        packed, scale = get(f"{base}.{_PACKED}"), get(f"{base}.weight_scale").float()
        codes = (
            torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).long()
        )  # low nibble first
        magnitudes = torch.tensor(_E2M1)[codes & 0x7]
        values = torch.where(codes >= 8, -magnitudes, magnitudes)
        rows, columns = values.shape
        if tuple(scale.shape) != (rows, columns // NVFP4_GROUP) or columns % NVFP4_GROUP:
            raise ModelLoadError(
                f"tensor {base}.weight_scale has shape {list(scale.shape)} for a weight of {[rows, columns]}"
            )
        return (
            values
            * scale.repeat_interleave(NVFP4_GROUP, 1)
            / get(f"{base}.weight_global_scale").float()
        )


def read_quantization(raw: RawConfig) -> Quantization | None:
    """Return how a checkpoint is quantised, by its config.json; None when it is not.

    A `quantization_config` takes precedence over LLaDA2's own keys.

    Raises:
        ModelLoadError: naming a method, format or block that is not supported.
    """
    if raw.get("quantization_config") is not None:
        return _standard(raw.section("quantization_config"))
    if raw.get("llada_fp8_experts") is not None:
        own = raw.section("llada_fp8_experts")
        if not own.get("enabled", True):
            return None
        own.only(format="e4m3fn", weight_granularity="per_expert_2d_block")
        return Quantization("llada_fp8_experts", _block(own, "weight_block_size", [128, 128]))
    return Quantization("llada_fp8_experts", (128, 128)) if raw.get("use_fp8_experts") else None


def _standard(raw: RawConfig) -> Quantization:
    method = raw.get("quant_method")
    if method == "fp8":
        return Quantization("fp8", _block(raw, "weight_block_size", None))
    if method != "compressed-tensors":
        raise ModelLoadError(
            f"{raw.path}: {raw.where} quant_method {method!r} is not one of compressed-tensors, fp8"
        )
    groups = raw.section("config_groups")
    if len(groups.values) != 1:
        raise ModelLoadError(
            f"{raw.path}: {groups.where} has {len(groups.values)} groups; one is supported"
        )
    weights = groups.section(next(iter(groups.values))).section("weights")
    weights.only(type="float", symmetric=True, dynamic=False)
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if (bits, strategy) == (4, "tensor_group"):
        weights.only(group_size=NVFP4_GROUP)
        return Quantization("nvfp4")
    if bits != 8 or strategy not in ("channel", "tensor", "block"):
        raise ModelLoadError(
            f"{raw.path}: {weights.where} num_bits {bits!r} with strategy {strategy!r} is not supported; "
            "8 bits per channel, tensor or block and 4 bits per tensor_group are"
        )
    return Quantization(
        "fp8", _block(weights, "block_structure", None) if strategy == "block" else None
    )


def _block(raw: RawConfig, key: str, default: list[int] | None) -> tuple[int, int] | None:
    value = raw.get(key, default)
    if value is None:
        return None
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and n > 0 for n in value)
    ):
        raise ModelLoadError(
            f"{raw.path}: {raw.where} has {key} = {value!r}; two positive integers are needed"
        )
    return value[0], value[1]
