"""DiffusionGemma: the recorded runs of transformers' own loop, the sampling step, batches,
stopping, events, loading.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import InvalidParameter, ModelLoadError, NotFinite
from tests.unit.engine.conftest import make_engine
from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import (
    DiffusionParams,
    RequestOutput,
    SamplingParams,
    StepEvent,
    VDiffConfig,
    VDiffEngine,
)
from worker.engine.loader import load
from worker.engine.renoise import CounterDraws, RenoiseDecoder, accepted, pick, temperature_of
from worker.engine.request import Answer
from worker.offline import generate_file

FOLDER = GOLDEN / "diffusion_gemma"
REFERENCE: dict[str, Any] = json.loads((FOLDER / "reference.json").read_text())
CASES = {case["id"].rsplit("/", 1)[1]: case for case in REFERENCE["cases"]}
PROMPTS = [prompt["ids"] for prompt in REFERENCE["prompts"]]
CANVAS = 16
Draw = tuple[str, list[int]]


@pytest.fixture(scope="module")
def engine() -> Iterator[VDiffEngine]:
    made = make_engine("diffusion_gemma")
    yield made
    made.shutdown()


def quick(**diffusion: Any) -> DiffusionParams:
    return DiffusionParams(**{"max_denoising_steps": 6, "entropy_bound": 1.0, **diffusion})


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [one.token_ids for one in output.outputs]


# The recorded runs


class RecordedDraws:
    """The random numbers that the published loop drew: a canvas, then in each step tokens and
    noise, for all rows at once.
    """

    def __init__(self, case: dict[str, Any], rows: int) -> None:
        self.rows, self.row_of = rows, dict[str, int]()
        self.canvases: list[list[Draw]] = []
        before = "randint"
        for kind, values in case["rng_draws_in_order"]:
            if kind == before == "randint":
                self.canvases.append([])
            self.canvases[-1].append((kind, values))
            before = kind
        self.given = case["args"].get("decoder_input_ids")

    def _row(self, answer: Answer, index: int, kind: str) -> Tensor:
        drawn, values = self.canvases[answer.block][index]
        assert drawn == kind
        return torch.tensor(values).view(self.rows, CANVAS)[self.row_of[answer.request.request_id]]

    def canvas(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        row = self._row(answer, 0, "randint")
        return row if self.given is None else torch.tensor(self.given[0])  # drawn all the same

    def tokens(self, answer: Answer, positions: Tensor, probabilities: Tensor) -> Tensor:
        return self._row(answer, 1 + 2 * answer.block_step, "multinomial")[
            positions - answer.window.start
        ]

    def noise(self, answer: Answer, positions: Tensor, vocab_size: int) -> Tensor:
        return self._row(answer, 2 + 2 * answer.block_step, "randint")


def params_of(args: dict[str, Any]) -> SamplingParams:
    names = ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
    diffusion = {name: args[name] for name in names if name in args}
    if "sampler_config" in args:
        diffusion["entropy_bound"] = args["sampler_config"]["entropy_bound"]
    stops = tuple(args.get("eos_token_id", ()))
    return SamplingParams(
        max_tokens=args["max_new_tokens"],
        stop_token_ids=stops,
        ignore_eos=bool(stops),
        diffusion=DiffusionParams(**diffusion),
    )


@pytest.mark.parametrize("name", CASES)
def test_recorded_runs(engine: VDiffEngine, name: str) -> None:
    """Token for token and decoder call for decoder call; rows of a batch are requests of their own,
    without padding.
    """
    case = CASES[name]
    masks = case.get("attention_mask") or [[1] * len(row) for row in case["prompt_ids"]]
    draws = RecordedDraws(case, len(masks))
    params = params_of(case["args"])
    ends = params.stop_token_ids or engine.card.end_token_ids
    engine.renoise.draws = draws
    try:
        handles = []
        for i, (row, mask) in enumerate(zip(case["prompt_ids"], masks, strict=True)):
            draws.row_of[f"{name}#{i}"] = i
            prompt = [t for t, m in zip(row, mask, strict=True) if m]
            handles.append(engine.submit(f"{name}#{i}", prompt, params))
        outputs = [handle.result(60).outputs[0] for handle in handles]
    finally:
        engine.renoise.draws = CounterDraws()
    for output, generated, forwards in zip(
        outputs, case["generated"], case["forwards_of_rows"], strict=True
    ):
        wanted = generated[: params.max_tokens]
        end = next((i for i, token in enumerate(wanted) if token in ends), len(wanted))
        assert output.token_ids == wanted[:end]
        assert output.finish_reason == ("stop" if end < len(wanted) else "length")
        assert output.forwards == forwards
    assert max(output.forwards for output in outputs) == case["forward_calls"]
    assert max(output.prefill_forwards for output in outputs) == case["encoder_calls"]


def test_its_card(engine: VDiffEngine) -> None:
    card = engine.card
    assert (card.family, card.regime, card.block_length, card.mask_token_id) == (
        "diffusion_gemma",
        "uniform",
        CANVAS,
        -1,
    )
    assert card.capabilities["algorithms"] == ["renoise"]
    assert card.capabilities["logprobs"] is False


# The sampling step


def test_a_draw_follows_its_distribution() -> None:
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    numbers = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pick(p.expand(20_000, -1), numbers), minlength=4) / 20_000
    assert counts[1] == 0
    assert torch.allclose(counts, p[0], atol=0.015)


def test_acceptance_is_by_ascending_entropy_within_the_bound() -> None:
    entropy = torch.tensor([0.3, 0.05, 0.2, 0.04])
    assert accepted(entropy, 0.1).tolist() == [
        False,
        True,
        True,
        True,
    ]  # .04, .05 (.04 before), .2 (.09 before)
    assert accepted(entropy, 0.0).tolist() == [False, False, False, True]


def test_the_temperature_falls_over_a_canvas() -> None:
    params = SamplingParams(diffusion=quick(t_min=0.4, t_max=0.8, max_denoising_steps=4))
    assert [round(temperature_of(params, s), 3) for s in range(4)] == [0.8, 0.7, 0.6, 0.5]
    assert temperature_of(replace(params, temperature=0.5), 0) == pytest.approx(0.4)


# Requests


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(6, 500) for _ in range(rng.choice([1, 5, 20, 30, 41]))]
        diffusion = quick(
            max_denoising_steps=rng.choice([3, 5, 8]), entropy_bound=rng.choice([0.2, 1.0, 3.0])
        )
        params = SamplingParams(
            max_tokens=rng.choice([7, 16, 24]),
            temperature=rng.choice([1.0, 0.0, 0.7]),
            seed=rng.randrange(1000),
            ignore_eos=rng.random() < 0.5,
            diffusion=diffusion,
        )
        made.append((prompt, params))
    return made


def test_batch_equals_alone(engine: VDiffEngine) -> None:
    asked = requests(3, 12)
    alone = [tokens_of(engine.submit(f"alone-{i}", *r).result(60)) for i, r in enumerate(asked)]
    handles = [engine.submit(f"together-{i}", *r) for i, r in enumerate(asked)]
    assert [tokens_of(h.result(60)) for h in handles] == alone


def test_sequences_that_share_calls_say_the_same_up_to_rounding(engine: VDiffEngine) -> None:
    """Accelerators make one call for all, whatever each has cached; first a step without a signal,
    then with one.
    """
    model = engine.model
    prompts = [[6, 7, 8], list(range(20, 40)), [9]]
    canvases = torch.randint(6, 500, (3, 16), generator=torch.Generator().manual_seed(1))
    made = []
    try:
        for model.together in (False, True):
            caches = [model.new_cache(64) for _ in prompts]
            with torch.inference_mode():
                model.encode(
                    caches[::2], [prompts[0][:1], prompts[2]]
                )  # equally long pieces share a call
                model.encode(caches[:1], [prompts[0][1:]])
                model.encode(caches[1:2], [prompts[1]])
                first = model.decode(caches, canvases, None)
                signal = torch.stack(
                    [model.embed(model.logits(rows).softmax(-1)) for rows in first]
                )
                made.append((first, model.decode(caches, canvases, signal)))
    finally:
        model.together = False
    for apart, together in zip(*made, strict=True):
        assert torch.allclose(apart, together, atol=1e-4)
    assert not torch.allclose(made[0][0], made[0][1], atol=1e-2)  # the signal does something


def test_a_file_is_decoded_the_same_at_any_batch_size(tmp_path: Path) -> None:
    """`vdiff generate`: messages, text and token ids, seeds and stops."""
    lines: list[dict[str, Any]] = [
        {
            "custom_id": "ids",
            "prompt_token_ids": [6, 7, 8],
            "max_tokens": 20,
            "seed": 1,
            "ignore_eos": True,
        },
        {"custom_id": "text", "prompt": "The cat", "max_tokens": 16, "seed": 2, "temperature": 0},
        {
            "custom_id": "chat",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 16,
            "seed": 3,
        },
        {
            "custom_id": "wrong",
            "prompt": "x",
            "max_tokens": 16,
            "diffusion": {"algorithm": "threshold"},
        },
    ]
    for line in lines[:3]:
        line["diffusion"] = {"max_denoising_steps": 6, "entropy_bound": 2.0}
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = []
    for slots in (1, 4):
        target = tmp_path / f"out-{slots}.jsonl"
        config = VDiffConfig(model=str(FOLDER), device="cpu", num_threads=1, max_num_seqs=slots)
        generate_file(config, source, target)
        made.append([json.loads(line) for line in target.read_text().splitlines()])
    for rows in made:
        assert [row["custom_id"] for row in rows] == ["ids", "text", "chat", "wrong"]
        assert [bool(row["error"]) for row in rows] == [False, False, False, True]
        assert "diffusion.algorithm" in json.dumps(rows[3]["error"])
        assert len(rows[0]["token_ids"]) == 20 and rows[0]["finish_reason"] == "length"
    assert [row["token_ids"] for row in made[0]] == [row["token_ids"] for row in made[1]]


def test_being_set_aside_changes_nothing() -> None:
    engine = make_engine("diffusion_gemma", max_num_seqs=1, cache_tokens=120)
    try:
        asked = requests(5, 6)
        alone = [tokens_of(engine.submit(f"alone-{i}", *r).result(60)) for i, r in enumerate(asked)]
        bulk = [engine.submit(f"bulk-{i}", *r, priority=2) for i, r in enumerate(asked)]
        urgent = [engine.submit(f"urgent-{i}", *r) for i, r in enumerate(asked)]
        assert [tokens_of(h.result(60)) for h in bulk] == alone
        assert [tokens_of(h.result(60)) for h in urgent] == alone
        stats = engine.get_stats()
        assert (stats["running"], stats["waiting"], stats["cache_tokens_in_use"]) == (0, 0, 0)
    finally:
        engine.shutdown()


def test_an_answer_is_cut_and_events_tell_what_is_provisional(engine: VDiffEngine) -> None:
    events: list[StepEvent] = []
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, diffusion=quick())
    output = engine.submit("cut", PROMPTS[0], params, listener=events.append).result(60).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (20, "length")
    committed = [e for e in events if e.positions]
    assert [list(e.positions) for e in committed] == [list(range(16)), list(range(16, 20))]
    assert [t for e in committed for t in e.token_ids] == output.token_ids
    shown = [e for e in events if e.provisional is not None]
    assert shown and all(not e.positions for e in shown)
    assert shown[0].provisional is not None and shown[0].provisional["positions"] == list(range(16))


def test_an_end_token_inside_a_canvas_ends_the_answer(engine: VDiffEngine) -> None:
    params = SamplingParams(max_tokens=32, ignore_eos=True, seed=1, diffusion=quick())
    whole = engine.submit("whole", PROMPTS[0], params).result(60).outputs[0].token_ids
    end = whole[5]
    stopped = (
        engine.submit("stopped", PROMPTS[0], replace(params, stop_token_ids=(end,)))
        .result(60)
        .outputs[0]
    )
    assert stopped.token_ids == whole[: whole.index(end)]
    assert stopped.finish_reason == "stop"


def test_abort_and_nan_are_their_own(engine: VDiffEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SamplingParams(
        max_tokens=400, ignore_eos=True, seed=1, diffusion=quick(max_denoising_steps=40)
    )
    started = threading.Event()
    handle = engine.submit("slow", PROMPTS[0], slow, listener=lambda e: started.set())
    assert started.wait(30)
    handle.abort()
    assert handle.result(60).outputs[0].finish_reason == "abort"
    good = SamplingParams(max_tokens=16, seed=2, ignore_eos=True, diffusion=quick())
    wanted = tokens_of(engine.submit("before", PROMPTS[1], good).result(60))
    read = RenoiseDecoder._read

    def poisoned(
        self: RenoiseDecoder, answer: Answer, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        bad = answer.request.request_id == "bad"
        return read(self, answer, torch.full_like(states, torch.nan) if bad else states, positions)

    monkeypatch.setattr(RenoiseDecoder, "_read", poisoned)
    bad, fine = engine.submit("bad", PROMPTS[1], good), engine.submit("fine", PROMPTS[1], good)
    assert tokens_of(fine.result(60)) == wanted
    with pytest.raises(NotFinite):
        bad.result(60)


def test_what_does_not_fit_is_refused(engine: VDiffEngine) -> None:
    for diffusion in (
        DiffusionParams(algorithm="threshold"),
        DiffusionParams(cache="dual"),
        DiffusionParams(cfg_scale=1.0),
    ):
        with pytest.raises(InvalidParameter):
            engine.submit("wrong", PROMPTS[0], SamplingParams(diffusion=diffusion))


# Loading


def changed(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError) as wrong:
        load(VDiffConfig(model=str(tmp_path), device="cpu"))
    return str(wrong.value)


def test_a_wrong_checkpoint_names_its_tensor(tmp_path: Path) -> None:
    name = "model.decoder.layers.1.mlp.down_proj.weight"
    assert f"{name} is missing" in changed(tmp_path / "a", lambda t: t.pop(name))
    assert f"{name} has shape" in changed(
        tmp_path / "b", lambda t: t.update({name: t[name][:-1].contiguous()})
    )
    assert "model.stray does not belong" in changed(
        tmp_path / "c", lambda t: t.update({"model.stray": torch.zeros(2)})
    )
