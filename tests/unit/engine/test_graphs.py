"""CUDA graphs without CUDA: the pieces are recorded as a tape of torch's operations and replayed on
the same tensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.errors import ConfigurationError
from tests.unit.engine.conftest import make_engine
from tests.unit.engine.golden_cases import ALL
from tests.unit.engine.test_golden import check, submit
from worker.engine import loader
from worker.engine.batch import Pass
from worker.engine.models.graphs import CudaRecorder, record
from worker.engine.models.moe import MoE
from worker.engine.models.transformer import Transformer

SIZES = (4, 16, 64)


class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph: the operations with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if (
                    old.data_ptr() != new.data_ptr()
                ):  # else a view, which still looks at the same memory
                    old.copy_(new)


class TapeRecorder:
    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            work()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


def grouped(model: Transformer) -> Transformer:
    for module in model.modules():
        if isinstance(module, MoE):
            module.grouped = True
    return model


@pytest.mark.parametrize("family", ["llada_gqa", "dream", "sdar", "llada2_moe"])
def test_all_golden_cases_through_graphs(family: str) -> None:
    """All cases of a family in one batch: forwards of every number of rows, caches and masks
    included.
    """
    engine = make_engine(family, max_num_seqs=16)
    recorder = TapeRecorder()
    assert record(grouped(engine.model), recorder, (16, 64, 512)) is None
    tried = recorder.replayed
    try:
        handles = [(one, submit(engine, one)) for one in ALL if one.family == family]
        for one, handle in handles:
            output = handle.result(120).outputs[0]
            check(one, output.token_ids, output.forwards)
        assert recorder.replayed > tried
    finally:
        engine.shutdown()


@pytest.mark.parametrize("rows", [1, 4, 5, 64, 65])
def test_a_forward_of_any_number_of_rows(rows: int) -> None:
    """On a recorded size, between two, and beyond the largest, which runs plainly."""
    engine = make_engine("llada")
    recorder = TapeRecorder()
    model: Transformer = engine.model
    passes = [Pass([(3 * i) % 50 for i in range(rows)], [0, rows - 1])]
    try:
        with torch.inference_mode():
            plain = next(iter(model.compute(passes)))[0:2]
            assert record(model, recorder, SIZES) is None
            tried = recorder.replayed
            for _ in range(2):  # the second finds the first's rows where its own are padded
                assert torch.allclose(next(iter(model.compute(passes)))[0:2], plain, atol=1e-4)
        assert recorder.replayed - tried == (
            0 if rows > SIZES[-1] else 2 * (model.config.layers + 1)
        )
    finally:
        engine.shutdown()


def test_graphs_that_do_not_work_are_not_used() -> None:
    def broken(work: Callable[[], None]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    def deaf(work: Callable[[], None]) -> Any:
        return lambda: None

    engine = make_engine("llada")
    try:
        model: Transformer = engine.model
        assert record(model, broken, SIZES) == "operation not permitted when stream is capturing"
        assert model.graphs is None
        assert "are off by" in str(record(model, deaf, SIZES))
        assert model.graphs is None
        assert "CUDA device, not cpu" in str(record(model))
    finally:
        engine.shutdown()


def test_a_recording_that_fails_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.cuda.graph, which ends a failed capture by an exception, does not give the stream back."""
    current: list[Any] = ["default"]
    made: list[object] = []
    modes: list[str] = []

    class Stream:
        def __init__(self) -> None:
            made.append(self)

        def wait_stream(self, other: object) -> None: ...

    @contextlib.contextmanager
    def stream(to: Any) -> Any:
        before = current[0]
        current[0] = to
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(graph: object, *, pool: object, capture_error_mode: str) -> Any:
        modes.append(capture_error_mode)
        current[0] = "capturing"
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    class Default(str):
        def wait_stream(self, other: object) -> None: ...

    current[0] = Default("default")
    for name, fake in (
        ("Stream", Stream),
        ("stream", stream),
        ("graph", graph),
        ("CUDAGraph", object),
        ("current_stream", lambda: current[0]),
        ("graph_pool_handle", tuple),
        ("device", lambda of: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = CudaRecorder(torch.device("cuda", 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            recorder(lambda: None)
        assert current[0] == "default"
    assert (len(made), modes) == (1, ["thread_local"] * 2)


def test_experts_that_wait_for_the_host_are_not_recorded() -> None:
    engine = make_engine("llada_moe")
    try:
        assert "wait for the host" in str(record(engine.model, TapeRecorder(), SIZES))
    finally:
        engine.shutdown()


def test_asked_for_by_name_they_must_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"need a CUDA device, not cpu; leave --cuda-graphs out"
    ) as wrong:
        make_engine("llada", cuda_graphs=True)
    assert wrong.value.param == "cuda_graphs"

    asked = 0

    def refused(model: Transformer) -> str:
        nonlocal asked
        asked += 1
        return "out of memory"

    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(loader, "record", refused)
    model: Any = OnCuda()
    with caplog.at_level(logging.WARNING):
        loader._record(model, loader.VDiffConfig(model="some-model"))
    assert asked == 1
    assert "no CUDA graphs of some-model (out of memory)" in caplog.text
    loader._record(model, loader.VDiffConfig(model="some-model", cuda_graphs=False))
    assert asked == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_on_a_gpu() -> None:
    """The golden cases of one family, recorded and replayed by CUDA itself."""
    engine = make_engine("dream", device="cuda", dtype="float32", cuda_graphs=True, max_num_seqs=16)
    try:
        assert engine.model.graphs is not None
        handles = [(one, submit(engine, one)) for one in ALL if one.family == "dream"]
        for one, handle in handles:
            output = handle.result(120).outputs[0]
            check(one, output.token_ids, output.forwards)
    finally:
        engine.shutdown()
