"""Loading: every way a checkpoint can be wrong names what is wrong; shards, dtypes, int8, other
architectures, verifiers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.diffusion_params import DiffusionParams
from shared.errors import ConfigurationError, ModelLoadError
from shared.sampling_params import SamplingParams
from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import ModelConfig, VDiffConfig, VDiffEngine
from worker.engine.loader import load

Change = Callable[[dict[str, torch.Tensor]], None]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def copied(
    tmp_path: Path, family: str = "llada", change: Change | None = None, **config: Any
) -> Path:
    """A golden checkpoint with changed tensors or config keys."""
    folder = tmp_path / family
    shutil.copytree(GOLDEN / family, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        raw = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(raw))
    return folder


def refusal(folder: Path, error: type[Exception] = ModelLoadError, **options: Any) -> str:
    with pytest.raises(error) as wrong:
        load(VDiffConfig(model=str(folder), device="cpu", **options))
    return str(wrong.value)


Q = "model.transformer.blocks.1.q_proj.weight"


def test_a_missing_a_misshapen_and_an_unknown_tensor_are_named(tmp_path: Path) -> None:
    missing = copied(tmp_path / "a", change=lambda t: t.__delitem__(Q))
    assert f"tensor {Q} is missing" in refusal(missing)
    bent = copied(tmp_path / "b", change=lambda t: t.update({Q: t[Q][:-1].contiguous()}))
    assert f"tensor {Q} has shape [63, 64], wanted [64, 64]" in refusal(bent)
    extra = copied(
        tmp_path / "c",
        change=lambda t: t.update({"model.transformer.blocks.1.q_proj.bias": torch.zeros(64)}),
    )
    assert "q_proj.bias does not belong" in refusal(extra)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(folder)


def test_what_is_not_built_is_refused_by_its_key(tmp_path: Path) -> None:
    assert "alibi = True" in refusal(copied(tmp_path / "a", alibi=True))
    assert "lacks d_model" in refusal(copied(tmp_path / "b", d_model=None))
    assert "rope_scaling" not in refusal(
        copied(tmp_path / "c", "dream", rope_scaling={"rope_type": "yarn"})
    )
    assert "yarn" in refusal(tmp_path / "c" / "dream")
    assert "use_sliding_window" in refusal(copied(tmp_path / "d", "sdar", use_sliding_window=True))
    (tmp_path / "e").mkdir()
    assert "config.json" in refusal(tmp_path / "e")
    unknown = refusal(copied(tmp_path / "f", architectures=["MysteryModel"]))
    assert (
        "MysteryModel" in unknown and "--trust-remote-code" in unknown and "LLaDAModelLM" in unknown
    )


def test_shards_say_the_same_as_one_file(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({n: tensors[n] for n in some}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, some in halves.items() for n in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with (
        VDiffEngine(VDiffConfig(model=str(folder), device="cpu")) as sharded,
        VDiffEngine(VDiffConfig(model=str(GOLDEN / "llada"), device="cpu")) as single,
    ):
        ask = {"prompt_token_ids": [5, 6, 7]}
        assert (
            sharded.generate(ask, GREEDY).outputs[0].token_ids
            == single.generate(ask, GREEDY).outputs[0].token_ids
        )
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in refusal(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str) -> None:
    for family in ("llada", "llada2_moe", "dream"):
        with VDiffEngine(
            VDiffConfig(model=str(GOLDEN / family), device="cpu", dtype=dtype)
        ) as engine:
            assert engine.card.dtype == dtype
            cache = "dual" if engine.card.regime == "full" else "exact"
            params = SamplingParams(
                max_tokens=8,
                temperature=0.0,
                ignore_eos=True,
                diffusion=DiffusionParams(cache=cache),
            )
            output = engine.generate({"prompt_token_ids": [5, 6, 7]}, params).outputs[0]
            assert len(output.token_ids) == 8


def test_int8_weights_are_close_and_smaller() -> None:
    exact = load(VDiffConfig(model=str(GOLDEN / "llada"), device="cpu")).model
    small = load(VDiffConfig(model=str(GOLDEN / "llada"), device="cpu", quantization="int8")).model
    assert "Int8" in type(small.layers[0].qkv.weight).__name__
    from worker.engine.batch import Pass

    with torch.inference_mode():
        [a] = exact.compute([Pass([5, 6, 7, 8], [1, 2])])
        [b] = small.compute([Pass([5, 6, 7, 8], [1, 2])])
    assert 0 < float((a - b).abs().max()) < 0.1 * float(a.abs().max())
    assert "mixtures of experts" in refusal(
        GOLDEN / "llada_moe", ConfigurationError, quantization="int8"
    )


def test_options_are_checked_by_name() -> None:
    for options, param in (
        ({"quantization": "int3"}, "quantization"),
        ({"enable_apd": True}, "enable_apd"),
        ({"dtype": "int8"}, "dtype"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"cache_tokens": 0}, "cache_tokens"),
        ({"watchdog_seconds": 0.0}, "watchdog_seconds"),
    ):
        with pytest.raises(ConfigurationError) as wrong:
            VDiffConfig(model="x", **options)
        assert wrong.value.param == param


def test_every_family_is_told_by_its_card() -> None:
    for family, regime, caches in (
        ("llada", "full", ["none", "prefix", "dual", "window"]),
        ("dream", "full", ["none", "prefix", "dual", "window"]),
        ("llada_moe", "full", ["none", "prefix", "dual", "window"]),
        ("llada2_moe", "block_causal", ["exact", "none"]),
        ("sdar", "block_causal", ["exact", "none"]),
    ):
        card = load(VDiffConfig(model=str(GOLDEN / family), device="cpu")).card
        assert (card.family, card.regime, card.capabilities["caches"]) == (family, regime, caches)
        assert "apd" not in card.capabilities["algorithms"]
    assert ModelConfig.from_folder(GOLDEN / "sdar").block_length == 4


# Architectures that only transformers knows


def bert(tmp_path: Path, *, mask: bool = True) -> Path:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=481,
        eos_token_id=481,
        bos_token_id=480,
        cls_token_id=480,
        sep_token_id=481,
    )
    folder = tmp_path / "bert"
    ModernBertForMaskedLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "llada" / name, folder / name)
    return folder


def test_any_masked_model_of_transformers_runs_when_trusted(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    assert "--trust-remote-code" in refusal(folder)
    with VDiffEngine(
        VDiffConfig(model=str(folder), device="cpu", trust_remote_code=True)
    ) as engine:
        assert engine.card.capabilities["caches"] == ["none"]
        alone = [
            engine.generate({"prompt_token_ids": [5, 6, i]}, GREEDY).outputs[0].token_ids
            for i in range(4)
        ]
        together = engine.generate([{"prompt_token_ids": [5, 6, i]} for i in range(4)], GREEDY)
        assert [o.outputs[0].token_ids for o in together] == alone
        with pytest.raises(Exception, match="cache"):
            engine.generate(
                {"prompt_token_ids": [5]}, SamplingParams(diffusion=DiffusionParams(cache="dual"))
            )


REPOSITORY_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, BaseModelOutput

class TinyConfig(PretrainedConfig):
    model_type = "tiny_diffusion"
    def __init__(self, vocab_size=512, hidden_size=16, max_position_embeddings=128, **rest):
        self.vocab_size, self.hidden_size, self.max_position_embeddings = vocab_size, hidden_size, max_position_embeddings
        super().__init__(**rest)

class TinyBackbone(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()
    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        return BaseModelOutput(last_hidden_state=hidden + hidden.mean(1, keepdim=True))

class TinyForDiffusion(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = TinyBackbone(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
    def forward(self, input_ids, attention_mask=None):
        return MaskedLMOutput(logits=self.head(self.model(input_ids).last_hidden_state))
"""


def test_a_repository_with_its_own_code_runs_when_trusted(tmp_path: Path) -> None:
    """AutoModel is the bare layers, as for Dream and SDAR; the causal entry of `auto_map` is the
    model that has a head.
    """
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(REPOSITORY_CODE)
    space: dict[str, Any] = {}
    exec(REPOSITORY_CODE, space)
    torch.manual_seed(0)
    config = space["TinyConfig"](
        architectures=["TinyForDiffusion"],
        mask_token_id=487,
        eos_token_id=481,
        bos_token_id=480,
        pad_token_id=481,
        auto_map={
            "AutoConfig": "modeling_tiny.TinyConfig",
            "AutoModel": "modeling_tiny.TinyBackbone",
            "AutoModelForCausalLM": "modeling_tiny.TinyForDiffusion",
        },
    )
    model = space["TinyForDiffusion"](config)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**raw, "architectures": ["TinyForDiffusion"], "auto_map": config.auto_map})
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "llada" / name, folder / name)
    assert "--trust-remote-code" in refusal(folder)
    with VDiffEngine(
        VDiffConfig(model=str(folder), device="cpu", trust_remote_code=True)
    ) as engine:
        output = engine.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY).outputs[0]
        assert len(output.token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize(
    "family,change,words",
    [
        ("dream", {"vocab_size": "x"}, "vocab_size = 'x'"),
        ("dream", {"eos_token_id": "481"}, "eos_token_id = '481'"),
        ("dream", {"mask_token_id": "487"}, "mask_token_id = '487'"),
        ("dream", {"rope_theta": "abc"}, "rope_theta = 'abc'"),
        ("dream", {"rope_parameters": [1]}, "rope_parameters that is no object"),
        ("dream", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ("dream", {"rms_norm_eps": -1}, "rms_norm_eps = -1"),
        ("sdar", {"block_size": 0}, "block_size = 0"),
        ("llada", {"mlp_ratio": "4", "mlp_hidden_size": None}, "mlp_ratio = '4'"),
        ("llada", {"mask_token_id": True}, "mask_token_id = True"),
        ("llada_moe", {"num_experts_per_tok": 99}, "num_experts_per_tok 99 is more than there are"),
        ("llada2_moe", {"n_group": 3}, "equal groups"),
        ("llada2_moe", {"topk_group": 99}, "topk_group 99"),
        ("llada2_moe", {"rotary_dim": None, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(
    tmp_path: Path, family: str, change: dict[str, Any], words: str
) -> None:
    assert words in refusal(copied(tmp_path, family, **change))


def test_positions_turn_the_same_share_wherever_the_config_says_it(tmp_path: Path) -> None:
    original = json.loads((GOLDEN / "llada2_moe" / "config.json").read_text())
    head_dim = (
        original.get("head_dim") or original["hidden_size"] // original["num_attention_heads"]
    )
    share = (
        original.get("rotary_dim", head_dim * original.get("partial_rotary_factor", 1.0)) / head_dim
    )
    assert share < 1
    parameters = {
        "rope_type": "default",
        "rope_theta": original["rope_theta"],
        "partial_rotary_factor": share,
    }
    folder = copied(
        tmp_path,
        "llada2_moe",
        rotary_dim=None,
        partial_rotary_factor=None,
        rope_theta=None,
        rope_parameters=parameters,
    )
    assert ModelConfig.from_folder(folder) == ModelConfig.from_folder(GOLDEN / "llada2_moe")


def gpt2(tmp_path: Path, vocab_size: int = 512) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path / f"gpt2-{vocab_size}"
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_any_causal_model_verifies(tmp_path: Path) -> None:
    """A verifier that only transformers knows: at weight 0 the text is its own greedy continuation
    of the first draft token.
    """
    folder = gpt2(tmp_path)
    with VDiffEngine(
        VDiffConfig(model=str(GOLDEN / "dream"), device="cpu", verifier=str(folder))
    ) as engine:
        diffusion = DiffusionParams(algorithm="apd", mixture_weight=0.5, max_lookahead=6)
        params = SamplingParams(
            max_tokens=12, temperature=0.0, ignore_eos=True, diffusion=diffusion
        )
        alone = [engine.generate({"prompt_token_ids": [5, 6, i]}, params) for i in range(3)]
        together = engine.generate([{"prompt_token_ids": [5, 6, i]} for i in range(3)], params)
        assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
        assert engine.card.verifier == "gpt2-512"


def test_a_verifier_with_fewer_tokens_accepts_what_it_lacks_only_first(tmp_path: Path) -> None:
    from worker.engine.verifier import Verifier

    verifier = Verifier(None, 10, "small")  # type: ignore[arg-type]
    assert verifier.known([3, 12, 9]) == [3, 0, 9]
    assert verifier.comparable(torch.tensor([3, 4, 12, 5])).tolist() == [True, True, True, False]
    assert verifier.comparable(torch.tensor([12, 4])).tolist() == [True, False]
    fitted = verifier.fit(torch.zeros(2, 10), 12)
    assert fitted.shape == (2, 12) and bool((fitted[:, 10:] == -torch.inf).all())
    assert verifier.fit(torch.zeros(2, 15), 12).shape == (2, 12)
    # The model has 480 tokens of text; the verifier knows 470 of them, so it is told apart by size
    # only without a tokenizer.
    message = refusal(GOLDEN / "dream", ConfigurationError, verifier=str(gpt2(tmp_path, 400)))
    assert "smaller than the tokenizer's" in message


def test_a_verifier_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = gpt2(tmp_path)
    shutil.copy(GOLDEN / "llada" / "tokenizer.json", folder / "tokenizer.json")
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    assert "does not fit the model's" in refusal(
        GOLDEN / "llada", ConfigurationError, verifier=str(folder)
    )
    assert "APD does not fit sdar" in refusal(
        GOLDEN / "sdar", ConfigurationError, verifier=str(folder)
    )
    disabled = load(
        VDiffConfig(
            model=str(GOLDEN / "llada"), device="cpu", verifier=str(folder), enable_apd=False
        )
    )
    assert disabled.verifier is None
