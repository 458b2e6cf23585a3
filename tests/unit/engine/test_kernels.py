"""Paths of accelerators, held against the CPU: ragged attention, grouped experts, fused layers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from shared.errors import ConfigurationError
from tests.unit.engine.conftest import make_engine
from tests.unit.engine.golden_cases import ALL
from tests.unit.engine.test_golden import check, submit
from worker.engine.batch import Pass, Ragged, arrange
from worker.engine.memory import Need
from worker.engine.models.attention import agrees, segment_sdpa, varlen_of
from worker.engine.models.moe import MoE
from worker.engine.models.transformer import Transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llada_gqa", "dream", "sdar"])
def test_ragged_attention_changes_nothing(family: str) -> None:
    """All golden cases of a family in one batch, sequences of every length in one attention call."""
    engine = make_engine(family, max_num_seqs=16)
    widest = 0

    def counted(q: Any, k: Any, v: Any, ragged: Ragged) -> Any:
        nonlocal widest
        widest = max(widest, len(ragged.row_ends) - 1)
        return segment_sdpa(q, k, v, ragged)

    engine.model.varlen = counted
    try:
        handles = [(one, submit(engine, one)) for one in ALL if one.family == family]
        for one, handle in handles:
            output = handle.result(120).outputs[0]
            check(one, output.token_ids, output.forwards)
        assert widest > 4
    finally:
        engine.shutdown()


def test_ragged_units_hold_what_sees_everything_and_nothing_else() -> None:
    cases = [
        Pass([1, 2, 3], [0]),
        Pass([1, 2], [1], 0, "causal"),
        Pass([4], [0]),
        Pass([1, 2, 3, 4], [3], 0, "block", 2),
        Pass([5, 6], [0, 1], 0, "block", 2),
    ]
    layout = arrange(cases, CPU, pad=False, varlen=True)
    assert [unit.ragged is not None for unit in layout.units] == [True, False, False]
    ragged = layout.units[0].ragged
    assert ragged is not None
    assert ragged.row_ends.tolist() == ragged.key_ends.tolist() == [0, 3, 4, 6]
    assert layout.ids.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 1, 2, 3, 4]
    assert layout.take.tolist() == [
        0,
        7,
        3,
        11,
        4,
        5,
    ]  # in the order of the passes, wherever their rows lie


def test_a_ragged_kernel_is_used_only_when_it_agrees(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(q: Any, k: Any, v: Any, ragged: Ragged) -> Any:
        return segment_sdpa(q, k, v, ragged) + 0.1

    def missing(q: Any, k: Any, v: Any, ragged: Ragged) -> Any:
        raise RuntimeError("no kernel image is available")

    assert agrees(segment_sdpa, CPU, torch.bfloat16, 4, 2, 16)
    with caplog.at_level(logging.WARNING):
        assert not agrees(wrong, CPU, torch.bfloat16, 4, 2, 16)
        assert not agrees(missing, CPU, torch.bfloat16, 4, 2, 16)
    assert "padded instead" in caplog.text
    assert "no kernel image" in caplog.text
    assert varlen_of(CPU, torch.float32, 4, 2, 16) is None


@pytest.mark.parametrize("family", ["llada_moe", "llada2_moe"])
def test_grouped_experts_equal_one_after_the_other(family: str) -> None:
    engine = make_engine(family)
    model: Transformer = engine.model
    sparse = [m for m in model.modules() if isinstance(m, MoE)]
    assert sparse
    try:
        x = torch.randn(37, model.config.width, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            for layer in sparse:
                made = []
                for grouped in (False, True):
                    layer.grouped = grouped
                    made.append(layer(x))
                assert torch.allclose(made[0], made[1], atol=1e-5)
    finally:
        engine.shutdown()


def test_fused_layers_say_the_same() -> None:
    """Traced by torch.compile; what its backend makes of the trace is torch's business, and takes a
    minute.
    """
    engine = make_engine("dream")
    try:
        sizes = (1, 5, 17)
        with torch.inference_mode():
            before = [
                next(engine.model.compute([Pass(list(range(n)), list(range(n)))])) for n in sizes
            ]
            engine.model.fuse(backend="eager")
            after = [
                next(engine.model.compute([Pass(list(range(n)), list(range(n)))])) for n in sizes
            ]
        for a, b in zip(before, after, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    finally:
        engine.shutdown()


def test_where_torch_compile_fails_the_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> Any:
        def call(*args: object) -> Any:
            raise RuntimeError("no C++ compiler was found\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        ConfigurationError, match=r"no C\+\+ compiler was found\); leave --compile out"
    ) as wrong:
        make_engine("llada", compile=True)
    assert wrong.value.param == "compile"


def test_apds_verifier_counts_in_the_memory_budget() -> None:
    engine = make_engine("dream")
    verifier = engine.apd.verifier
    assert verifier is not None
    try:
        need = Need(engine.model, verifier)
        share = verifier.cache_bytes_per_token / engine.model.cache_bytes_per_token
        assert share > 0
        made = {}
        for name, diffusion in {
            "apd": {"algorithm": "apd", "apd": {"kv_window": 4}},
            "alone": {"algorithm": "apd", "apd": {"kv_window": 4, "mixture_weight": 1.0}},
            "no cache": {"algorithm": "apd", "apd": {}},
        }.items():
            one = next(c for c in ALL if c.family == "dream")
            handle = engine.submit(
                name,
                one.prompt,
                resolve(engine, {"max_tokens": 10, "diffusion": diffusion}, len(one.prompt)),
            )
            handle.result(60)
            made[name] = need(handle.request.sequences[0]), len(one.prompt) + 10
        positions = made["apd"][1]
        assert made["alone"][0] == positions
        assert made["apd"][0] == positions + -(-positions * share // 1)
        assert made["no cache"][0] == made["apd"][0] - positions
    finally:
        engine.shutdown()


def resolve(engine: Any, fields: dict[str, Any], prompt_tokens: int) -> Any:
    from shared.sampling_params import resolve_params

    return resolve_params(fields, card=engine.card, prompt_tokens=prompt_tokens)
