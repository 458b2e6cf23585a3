"""From a model folder or hub id to weights on the device, a tokenizer and a model card.

Native families execute no repository's code. Anything else that transformers knows runs only with
trust_remote_code.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.algorithms import CACHES, FULL, PARAMETERS, algorithms_of
from shared.errors import ConfigurationError, ModelLoadError
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper
from worker.engine import models
from worker.engine.batch import Pass
from worker.engine.config import ModelConfig, RawConfig, VDiffConfig
from worker.engine.models import causal, diffusion_gemma, generic
from worker.engine.models.attention import varlen_of
from worker.engine.models.family import Family
from worker.engine.models.graphs import record
from worker.engine.models.transformer import Transformer
from worker.engine.quantized import read_quantization
from worker.engine.verifier import Verifier, check_tokenizers
from worker.engine.weights import fill, quantize

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
_FACTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_HUB_CODE = ["*.py"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any  # Transformer, or an adapter around a transformers class
    facts: ModelConfig
    tokenizer: TokenizerWrapper
    card: ModelCard
    verifier: Verifier | None = None


def resolve_folder(
    model: str, revision: str | None = None, *, code: bool = False, param: str = "model"
) -> Path:
    """A local folder as it is; anything else is a hub id and is fetched (weights, configs and
    tokenizer files only).

    Raises:
        ConfigurationError: no such folder, and no such repository to be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigurationError(f"{param} {model!r}: no such folder", param=param)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = _HUB_FILES + (_HUB_CODE if code else [])
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ConfigurationError(
            f"{param} {model!r}: no such folder, and the hub says: {reason}", param=param
        ) from exc


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU. Raises ConfigurationError when the device is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigurationError(
            f"device {name!r} is not cpu, cuda, cuda:N or mps", param="device"
        ) from exc
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigurationError(f"device {name!r} is not cpu, cuda, cuda:N or mps", param="device")
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type] or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigurationError(
            f"device {name!r} is not available on this machine", param="device"
        )
    return device


def default_threads() -> int:
    """Cores less one, at least one: with all of them, any other busy process makes every matrix
    product wait for a thread that is not scheduled (measured on 2 cores beside one busy process: a
    1,000-fold slower step).
    """
    return max(
        1,
        len(
            os.sched_getaffinity(0)
            if hasattr(os, "sched_getaffinity")
            else range(os.cpu_count() or 1)
        )
        - 1,
    )


def _revision(folder: Path) -> str:
    """Hash of the checkpoint's configs and of its weights' names and sizes: tells two checkpoints
    apart, cheaply.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
        elif path.name in _FACTS:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _defaults(config: VDiffConfig, facts: ModelConfig) -> dict[str, Any]:
    """The generation_config's keys that vdiff knows over the family's, under the server's own
    settings.
    """
    generation = facts.generation
    defaults: dict[str, Any] = {
        k: generation[k] for k in ("temperature", "top_p", "top_k") if generation.get(k) is not None
    }
    if defaults.get("top_k") == 0:
        del defaults["top_k"]  # transformers writes 0 for "off"
    if generation.get("max_new_tokens"):
        defaults["max_tokens"] = int(generation["max_new_tokens"])
    diffusion = dict(facts.defaults)
    names = ("algorithm", "block_length", "cfg_scale", *PARAMETERS)
    diffusion.update({k: generation[k] for k in names if generation.get(k) is not None})
    sampler = generation.get("sampler_config")
    if isinstance(sampler, dict) and sampler.get("entropy_bound") is not None:
        diffusion["entropy_bound"] = float(sampler["entropy_bound"])
    if config.block_size is not None and "block_length" not in generation:
        diffusion["block_length"] = config.block_size
    if config.diffusion_steps is not None and "steps" not in generation:
        diffusion["steps"] = config.diffusion_steps
    if diffusion:
        defaults["diffusion"] = diffusion
    return defaults


def _mask_token(
    facts: ModelConfig, family: Family, folder: Path, tokenizer: TokenizerWrapper
) -> int:
    mask = facts.mask_token_id
    for token in (tokenizer.special_tokens.get("mask_token"), *family.mask_tokens):
        if mask is None and token is not None:
            mask = tokenizer.token_id(token)
    if mask is None:
        mask = family.mask_token_id
    if mask is None:
        raise ModelLoadError(f"{folder}: neither config.json nor the tokenizer names a mask token")
    if not 0 <= mask < facts.vocab_size:
        raise ModelLoadError(
            f"{folder}: mask token id {mask} is outside the vocabulary of {facts.vocab_size}"
        )
    return mask


def _ends(facts: ModelConfig, family: Family, tokenizer: TokenizerWrapper) -> tuple[int, ...]:
    eos = facts.eos_token_ids or (tokenizer.special_id("eos_token"),)
    listed = facts.generation.get("eos_token_id")
    more = listed if isinstance(listed, list) else [listed]
    named = (tokenizer.token_id(token) for token in family.end_tokens)
    return tuple(t for t in dict.fromkeys((*eos, *more, *named)) if t is not None)


def _name(config: VDiffConfig, folder: Path) -> str:
    if config.served_model_name:
        return config.served_model_name
    return folder.resolve().name if Path(config.model).expanduser().is_dir() else config.model


def make_card(
    config: VDiffConfig,
    facts: ModelConfig,
    family: Family,
    folder: Path,
    tokenizer: TokenizerWrapper,
    *,
    device: str,
    dtype: str,
    verifier: Verifier | None,
    caches: tuple[str, ...] | None = None,
) -> ModelCard:
    """Build the model card, which says what requests may ask for. Raises ModelLoadError,
    ConfigurationError.
    """
    uniform = facts.regime not in CACHES or facts.regime == "uniform"
    mask = -1 if uniform else _mask_token(facts, family, folder, tokenizer)
    ends = _ends(facts, family, tokenizer)
    context = facts.context_length
    if config.max_model_len is not None:
        if config.max_model_len > context:
            message = (
                f"max_model_len {config.max_model_len} is beyond the model's context of {context}"
            )
            raise ConfigurationError(message, param="max_model_len")
        context = config.max_model_len
    endpoints = ["/v1/completions"] + (
        ["/v1/chat/completions", "/v1/responses"] if tokenizer.has_chat_template else []
    )
    endpoints += (["/v1/infill"] if facts.regime == FULL else []) + (
        [] if uniform else ["/v1/loglikelihood"]
    )
    algorithms = [
        name
        for name in algorithms_of(facts.regime, verifier=verifier is not None)
        if (caches is None or name != "apd")
        and (facts.algorithms is None or name in facts.algorithms)
    ]
    return ModelCard(
        name=_name(config, folder),
        family=facts.family,
        context_length=context,
        vocab_size=facts.vocab_size,
        mask_token_id=mask,
        end_token_ids=ends,
        suppress_token_ids={"logits": ends[:1], "confidence": ends},
        capabilities={
            "algorithms": algorithms,
            "caches": list(caches or facts.caches or CACHES[facts.regime]),
            "logprobs": not uniform,
            "infill": facts.regime == FULL,
            "endpoints": endpoints,
            **(
                {}
                if facts.sub_block_length is None
                else {"sub_block_length": facts.sub_block_length}
            ),
            **(
                {}
                if facts.max_block_length is None
                else {"max_block_length": facts.max_block_length}
            ),
        },
        defaults=_defaults(config, facts),
        revision=config.revision or _revision(folder),
        dtype=dtype,
        device=device,
        max_num_seqs=config.max_num_seqs,
        regime=facts.regime,
        block_length=facts.block_length,
        verifier=None if verifier is None else verifier.name,
    )


def load(config: VDiffConfig) -> LoadedModel:
    """Load what `config` names.

    Raises:
        ConfigurationError: no such model or device.
        ModelLoadError: the checkpoint is wrong; names the file or tensor.
    """
    folder = resolve_folder(config.model, config.revision, code=config.trust_remote_code)
    device = resolve_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or default_threads())
    dtype = _DTYPES.get(config.dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    raw = RawConfig(folder)
    tokenizer = TokenizerWrapper.from_folder(
        resolve_folder(config.tokenizer, param="tokenizer") if config.tokenizer else folder
    )
    caches: tuple[str, ...] | None = None
    if raw.architecture not in models.KNOWN and config.trust_remote_code:
        family, caches = generic.FAMILY, ("none",)
    else:
        family = models.family_of(raw)
    facts = family.read(raw)
    if family in models.FAMILIES:
        model: Any = _native(raw, family, facts, config, dtype, device)
    else:
        if family is not generic.FAMILY and raw.get("quantization_config") is not None:
            raise ModelLoadError(
                f"{folder}: quantization_config is not supported for {raw.architecture}"
            )
        _refuse_quantization(config, raw.architecture)
        if config.compile:
            raise ConfigurationError(
                f"compile is not built for {raw.architecture}; leave it out", param="compile"
            )
        if config.cuda_graphs:
            message = f"CUDA graphs are not built for {raw.architecture}; leave --cuda-graphs out"
            raise ConfigurationError(message, param="cuda_graphs")
        theirs = generic if family is generic.FAMILY else diffusion_gemma
        model = theirs.load(folder, facts, dtype=dtype, device=device)
    if tokenizer.vocab_size > facts.vocab_size:
        message = (
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {facts.vocab_size}"
        )
        raise ModelLoadError(f"{folder}: {message}")
    verifier = _verifier(config, facts, tokenizer, dtype, device)
    card = make_card(
        config,
        facts,
        family,
        folder,
        tokenizer,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        verifier=verifier,
        caches=caches,
    )
    return LoadedModel(model, facts, tokenizer, card, verifier)


def _refuse_quantization(config: VDiffConfig, name: str) -> None:
    if config.quantization is not None:
        raise ConfigurationError(
            f"quantization is not built for {name}; leave it out", param="quantization"
        )


def _native(
    raw: RawConfig,
    family: Family,
    facts: ModelConfig,
    config: VDiffConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    if config.quantization is not None and facts.moe is not None:
        _refuse_quantization(config, f"mixtures of experts such as {family.name}")
    with torch.device("meta"):
        model = Transformer(facts)
    quantization = read_quantization(raw)
    if quantization is not None and config.quantization is not None:
        message = (
            f"the checkpoint is quantised already ({quantization.method}); leave quantization out"
        )
        raise ConfigurationError(message, param="quantization")
    fill(
        model,
        raw.path,
        family.sources(facts),
        dtype=dtype,
        device=device,
        quantization=quantization,
    )
    if config.quantization is not None:
        quantize(model, config.quantization)
    model.varlen = varlen_of(device, dtype, facts.heads, facts.kv_heads, facts.head_dim)
    model.eval()
    if config.compile:
        _fuse(model)
    _record(model, config)
    return model


def _fuse(model: Transformer) -> None:
    """Compile now, not in the first request's steps. Raises ConfigurationError where torch.compile
    does not work.
    """
    model.fuse()
    try:
        with torch.inference_mode():
            for rows in (3, 2, 1):  # one row is compiled apart
                next(model.compute([Pass([0] * rows, [0])]))
    # from torch's compiler, a C++ compiler, Triton: whoever fails, the advice is the same
    except Exception as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ConfigurationError(
            f"torch.compile does not work here ({reason}); leave --compile out", param="compile"
        ) from exc


def _record(model: Transformer, config: VDiffConfig) -> None:
    """CUDA graphs where they work. Raises ConfigurationError where they were asked for by name and
    do not.
    """
    if config.cuda_graphs is False or (config.cuda_graphs is None and model.device.type != "cuda"):
        return
    reason = record(model)
    if reason is not None and config.cuda_graphs:
        raise ConfigurationError(
            f"no CUDA graphs here: {reason}; leave --cuda-graphs out", param="cuda_graphs"
        )
    if reason is not None:
        log.warning(
            "no CUDA graphs of %s (%s); its kernels are launched one by one", config.model, reason
        )


def _verifier(
    config: VDiffConfig,
    facts: ModelConfig,
    tokenizer: TokenizerWrapper,
    dtype: torch.dtype,
    device: torch.device,
) -> Verifier | None:
    """The verifier of APD. Raises ConfigurationError when its tokenizer does not fit."""
    if config.verifier is None or config.enable_apd is False:
        return None
    if facts.regime != FULL:
        raise ConfigurationError(
            f"APD does not fit {facts.family} models; leave --verifier out", param="verifier"
        )
    folder = resolve_folder(config.verifier, param="verifier")
    if TokenizerWrapper.is_in(folder):
        check_tokenizers(tokenizer, TokenizerWrapper.from_folder(folder))
    raw = RawConfig(folder)
    if raw.architecture in causal.FAMILY.architectures:
        own = causal.FAMILY.read(raw)
        with torch.device("meta"):
            model: Any = Transformer(own)
        fill(model, folder, causal.tensors(own), dtype=dtype, device=device)
        model, vocab_size = model.eval(), own.vocab_size
        _record(model, config)
    else:
        model, vocab_size = generic.load_causal(
            folder, dtype=dtype, device=device, trust=config.trust_remote_code
        )
    if not TokenizerWrapper.is_in(folder) and vocab_size < tokenizer.vocab_size:
        message = f"the verifier's vocabulary of {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        raise ConfigurationError(message, param="verifier")
    return Verifier(model, vocab_size, folder.resolve().name)
