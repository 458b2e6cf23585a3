"""From a model folder or hub id to weights on the device, a tokenizer and a model card. Executes no repository's code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import ConfigurationError, ModelLoadError
from shared.model_card import ModelCard
from shared.sampling_params import CACHES, RULE_PARAMETERS
from shared.tokenizer import TokenizerWrapper
from worker.engine.config import ModelConfig, VDiffConfig
from worker.engine.models import llada
from worker.engine.models.transformer import Transformer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Transformer
    tokenizer: TokenizerWrapper
    card: ModelCard


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """A local folder as it is; anything else is a hub id and is fetched (weights, configs and tokenizer files only).

    Raises:
        ConfigurationError: no such folder, and no such repository to be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigurationError(f"model {model!r}: no such folder", param="model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ConfigurationError(f"model {model!r}: no such folder, and the hub says: {reason}", param="model") from exc


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU. Raises ConfigurationError when the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigurationError(f"device {name!r} is not cpu, cuda, cuda:N or mps", param="device") from exc
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigurationError(f"device {name!r} is not cpu, cuda, cuda:N or mps", param="device")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(f"device {name!r} is not available on this machine", param="device")
    return device


def default_threads() -> int:
    """Cores less one, at least one: with all of them, any other busy process makes every matrix product wait for a
    thread that is not scheduled (measured on 2 cores beside one busy process: a 1,000-fold slower step)."""
    return max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) - 1)


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError) as exc:
            raise ModelLoadError(f"{index} is malformed: {exc}") from exc
    if not single.is_file():
        raise ModelLoadError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as exc:
        raise ModelLoadError(f"{path}: truncated or not a safetensors file: {exc}") from exc


def load_weights(
    model: Transformer, folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the checkpoint's tensors, one by one, into a model made on the meta device.

    Raises:
        ModelLoadError: naming the first missing or misshapen tensor, or the truncated file.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    names = llada.tensor_names(config)
    shards = _shards(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    columns = (TextColumn("loading weights"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for ours, theirs in names.items():
        if theirs not in shards:
            raise ModelLoadError(f"{folder}: tensor {theirs} is missing")
        by_file.setdefault(shards[theirs], []).append((ours, theirs))
    with contextlib.ExitStack() as stack:
        from rich.console import Console

        progress = stack.enter_context(
            Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        )
        task = progress.add_task("load", total=len(names))
        for path, pairs in by_file.items():
            with _opened(path) as file:
                for ours, theirs in pairs:
                    try:
                        tensor = file.get_tensor(theirs)
                    except SafetensorError as exc:
                        raise ModelLoadError(f"{path}: tensor {theirs} cannot be read: {exc}") from exc
                    if tuple(tensor.shape) != shapes[ours]:
                        wanted = list(shapes[ours])
                        raise ModelLoadError(f"{path}: tensor {theirs} has shape {list(tensor.shape)}, wanted {wanted}")
                    owner, _, leaf = ours.rpartition(".")
                    module = model.get_submodule(owner)
                    parameter = torch.nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
                    setattr(module, leaf, parameter)
                    progress.advance(task)
    if config.tied:
        model.head.weight = model.embedding.weight


def _revision(folder: Path) -> str:
    """Hash of the checkpoint's configs and of its weights' names and sizes: tells two checkpoints apart, cheaply."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
        elif path.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _defaults(config: VDiffConfig, generation: dict[str, Any]) -> dict[str, Any]:
    """The generation_config's keys that vdiff knows, under the server's own settings where those are given."""
    defaults: dict[str, Any] = {
        k: generation[k] for k in ("temperature", "top_p", "top_k") if generation.get(k) is not None
    }
    if defaults.get("top_k") == 0:
        del defaults["top_k"]  # transformers writes 0 for "off"
    if generation.get("max_new_tokens"):
        defaults["max_tokens"] = int(generation["max_new_tokens"])
    diffusion = {
        k: generation[k] for k in ("algorithm", "block_length", "threshold", "steps") if generation.get(k) is not None
    }
    if config.block_size is not None and "block_length" not in diffusion:
        diffusion["block_length"] = config.block_size
    if config.diffusion_steps is not None and "steps" not in diffusion:
        diffusion["steps"] = config.diffusion_steps
    if diffusion:
        defaults["diffusion"] = diffusion
    return defaults


def _card(
    config: VDiffConfig, facts: ModelConfig, folder: Path, tokenizer: TokenizerWrapper, where: str, dtype: str
) -> ModelCard:
    mask = facts.mask_token_id
    for token in (tokenizer.special_tokens.get("mask_token"), *llada.MASK_TOKENS):
        if mask is None and token is not None:
            mask = tokenizer.token_id(token)
    if mask is None:
        mask = llada.MASK_TOKEN_ID
    if not 0 <= mask < facts.vocab_size:
        raise ModelLoadError(f"{folder}: mask token id {mask} is outside the vocabulary of {facts.vocab_size}")
    eos = facts.eos_token_id if facts.eos_token_id is not None else tokenizer.special_id("eos_token")
    eot = tokenizer.token_id(llada.END_OF_TURN_TOKEN)
    ends = tuple(t for t in dict.fromkeys((eos, eot)) if t is not None)
    if not ends:
        raise ModelLoadError(f"{folder}: neither config.json nor the tokenizer names an end token")
    context = facts.context_length
    if config.max_model_len is not None:
        if config.max_model_len > context:
            message = f"max_model_len {config.max_model_len} is beyond the model's context of {context}"
            raise ConfigurationError(message, param="max_model_len")
        context = config.max_model_len
    endpoints = ["/v1/completions"] + (["/v1/chat/completions"] if tokenizer.has_chat_template else [])
    return ModelCard(
        name=config.served_model_name or folder.resolve().name
        if Path(config.model).is_dir()
        else config.served_model_name or config.model,
        family=llada.FAMILY,
        context_length=context,
        vocab_size=facts.vocab_size,
        mask_token_id=mask,
        end_token_ids=ends,
        suppress_token_ids={"logits": ends[:1], "confidence": ends},
        capabilities={
            "algorithms": list(RULE_PARAMETERS),
            "caches": list(CACHES),
            "logprobs": False,
            "endpoints": endpoints,
        },
        defaults=_defaults(config, facts.generation),
        revision=config.revision or _revision(folder),
        dtype=dtype,
        device=where,
        max_num_seqs=config.max_num_seqs,
    )


def load(config: VDiffConfig) -> LoadedModel:
    """Load what `config` names.

    Raises:
        ConfigurationError: no such model or device.
        ModelLoadError: the checkpoint is wrong; names the file or tensor.
    """
    folder = resolve_folder(config.model, config.revision)
    facts = ModelConfig.from_folder(folder)
    tokenizer = TokenizerWrapper.from_folder(resolve_folder(config.tokenizer) if config.tokenizer else folder)
    if tokenizer.vocab_size > facts.vocab_size:
        message = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {facts.vocab_size}"
        raise ModelLoadError(f"{folder}: {message}")
    device = resolve_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or default_threads())
    dtype = _DTYPES.get(config.dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    card = _card(config, facts, folder, tokenizer, str(device), str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        model = Transformer(facts)
    load_weights(model, folder, facts, dtype, device)
    return LoadedModel(model.eval(), tokenizer, card)
