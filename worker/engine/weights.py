"""Weights from safetensors files into a module made on the meta device, tensor by tensor: no second
copy in memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import ConfigurationError, ModelLoadError
from worker.engine.models.family import Source
from worker.engine.models.transformer import Transformer
from worker.engine.quantized import Get, Quantization

_IGNORED = ("inv_freq", "masked_bias")  # buffers that some files carry


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. Raises ModelLoadError."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as exc:
            raise ModelLoadError(f"{index} is malformed: {exc}") from exc
        for file in sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise ModelLoadError(f"{folder}: the index names {file}, which is missing")
        return {name: folder / file for name, file in weight_map.items()}
    if not single.is_file():
        raise ModelLoadError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json"
        )
    with opened(single) as file:
        return dict.fromkeys(file.keys(), single)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped. Raises ModelLoadError."""
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as exc:
        raise ModelLoadError(f"{path}: truncated or not a safetensors file: {exc}") from exc
    with file:
        yield file


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], object]]:
    """A bar on a terminal's stderr; call what it yields once for each part done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def fill(
    module: Transformer,
    folder: Path,
    sources: Iterable[Source],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> None:
    """Materialise every parameter of `module` on `device` and fill it from the checkpoint.

    Quantised weights are dequantised one by one as they are read.

    Raises:
        ModelLoadError: naming the first missing, misshapen or unknown tensor, or the truncated
            file.
    """
    files = shards(folder)
    wanted = list(sources)
    known = {source.name for source in wanted}
    if quantization is not None:
        known = {quantization.stored_name(name, files) for name in known}
    for name in files:
        companion = quantization is not None and quantization.is_companion(name)
        if name not in known and not companion and not name.endswith(_IGNORED):
            raise ModelLoadError(f"{folder}: tensor {name} does not belong to this architecture")
    by_file: dict[Path, list[Source]] = {}
    for source in wanted:
        stored = (
            source.name if quantization is None else quantization.stored_name(source.name, files)
        )
        if stored in files and source.target:
            by_file.setdefault(files[stored], []).append(source)
        elif stored not in files and not source.optional:
            raise ModelLoadError(f"{folder}: tensor {source.name} is missing")
    made: dict[str, nn.Parameter] = {}
    with progress(len(wanted), "loading weights") as advance:
        for path, mine in by_file.items():
            with opened(path) as file:
                for source in mine:
                    if source.target not in made:
                        made[source.target] = _materialised(module, source.target, dtype, device)
                    read = _reader(file, path, files, quantization)
                    _copy(read, path, source, made[source.target])
                    advance()
    if module.config.tied:
        module.head.weight = module.embedding.weight
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ModelLoadError(f"{folder}: nothing fills parameter {name}")


def copy_tensors(
    module: nn.Module,
    folder: Path,
    wanted: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    skip: Callable[[str], bool],
) -> None:
    """Fill a module of another library, made on the meta device, from a checkpoint that has its
    names.

    Args:
        wanted: parameters and buffers by name; every one must be there.
        skip: whether a tensor of the checkpoint that is not wanted is left out on purpose.

    Raises:
        ModelLoadError: naming the first missing, misshapen or unknown tensor, or the truncated
            file.
    """
    files = shards(folder)
    for name in files:
        if name not in wanted and not skip(name):
            raise ModelLoadError(f"{folder}: tensor {name} does not belong to this architecture")
    for name in wanted:
        if name not in files:
            raise ModelLoadError(f"{folder}: tensor {name} is missing")
    with progress(len(wanted), "loading weights") as advance:
        for path in sorted({files[name] for name in wanted}):
            with opened(path) as file:
                for name in (n for n in wanted if files[n] == path):
                    tensor = _shaped(_tensor(file, path, name), path, name, wanted[name].shape)
                    _place(module, name, tensor.to(device, dtype))
                    advance()


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _materialised(
    module: nn.Module, name: str, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    empty = torch.empty(getattr(owner, leaf).shape, dtype=dtype, device=device)
    parameter = nn.Parameter(empty, requires_grad=False)
    setattr(owner, leaf, parameter)
    return parameter


def _copy(read: Get, path: Path, source: Source, parameter: nn.Parameter) -> None:
    part = parameter.data[source.at] if source.at else parameter.data
    part.copy_(_shaped(read(source.name), path, source.name, part.shape))


def _reader(
    file: Any, path: Path, files: Mapping[str, Path], quantization: Quantization | None
) -> Get:
    """Return what reads a tensor by the name that it has in an unquantised checkpoint; scales may
    be in another shard.
    """

    def stored(name: str) -> Tensor:
        if files.get(name, path) == path:
            return _tensor(file, path, name)
        with opened(files[name]) as other:
            return _tensor(other, files[name], name)

    def read(name: str) -> Tensor:
        assert quantization is not None
        try:
            return quantization.read(name, stored, files)
        except ModelLoadError as exc:
            raise ModelLoadError(f"{path}: {exc}") from exc

    return stored if quantization is None else read


def _tensor(file: Any, path: Path, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as exc:
        raise ModelLoadError(f"{path}: tensor {name} cannot be read: {exc}") from exc
    return tensor


def _shaped(tensor: Tensor, path: Path, name: str, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise ModelLoadError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}, wanted {list(shape)}"
        )
    return tensor


def quantize(module: nn.Module, scheme: str) -> None:
    """int8: the weights of all linear layers but the head as 8-bit integers with a scale per row
    (torchao).

    Raises:
        ConfigurationError: torchao is missing.
    """
    assert scheme == "int8"
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as exc:
        raise ConfigurationError(
            "quantization int8 needs `pip install torchao`", param="quantization"
        ) from exc
    quantize_(
        module,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "head",
    )
