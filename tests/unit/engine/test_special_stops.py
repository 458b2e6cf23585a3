"""A stop string that is a special token ends an answer where that token is committed, although its
text never shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from shared.errors import InvalidParameter
from shared.jobs.bodies import parse
from shared.jobs.responses import CHAT, COMPLETIONS, RESPONSES
from shared.sampling_params import SamplingParams, resolve_params
from shared.stop_strings import check_stops, stop_ids
from shared.tokenizer import TokenizerWrapper
from tests.unit.engine.conftest import GetEngine, make_engine
from tests.unit.shared.test_prompt_ids import CARD, TOKENIZER
from worker.engine import VDiffEngine
from worker.engine.outputs import StepEvent

PROMPT, TOKENS = [5, 6, 7, 11], 12


@pytest.fixture(scope="module")
def gemma() -> Iterator[VDiffEngine]:
    made = make_engine("diffusion_gemma")
    yield made
    made.shutdown()


def check(engine: VDiffEngine, algorithm: str) -> None:
    """Make the model want one special token from the first position on: without a stop the answer
    is made of it.
    """
    diffusion: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == "renoise":
        diffusion |= {"max_denoising_steps": 4, "entropy_bound": 1.0}
    taken = {*engine.card.end_token_ids, engine.card.mask_token_id}
    text, token = next(
        pair for pair in engine.tokenizer.control.hidden.items() if pair[1] not in taken
    )
    fields = {
        "max_tokens": TOKENS,
        "seed": 3,
        "temperature": 0,
        "logit_bias": {str(token): 100},
        "diffusion": diffusion,
    }
    for stop, end in (([], None), (text, token), (["zzz", text], token), (["zzz"], None)):
        heard: list[StepEvent] = []
        params = resolve_params(
            {**fields, "stop": stop}, card=engine.card, prompt_tokens=len(PROMPT)
        )
        handle = engine.submit(f"{algorithm}-{stop}", PROMPT, params, listener=heard.append)
        answer = handle.result(60).outputs[0]
        if end is None:
            assert (answer.token_ids, answer.finish_reason) == ([token] * TOKENS, "length"), (
                algorithm
            )
        else:
            assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "stop"), (
                algorithm
            )
        assert "".join(event.text_delta for event in heard) == answer.text == ""


@pytest.mark.parametrize("family", ["llada", "dream", "llada2_moe", "sdar"])
def test_every_algorithm_of_a_masked_family(engine_of: GetEngine, family: str) -> None:
    engine = engine_of(family)
    for algorithm in engine.card.capabilities["algorithms"]:
        check(engine, algorithm)


def test_a_uniform_family(gemma: VDiffEngine) -> None:
    check(gemma, "renoise")


def test_the_models_own_end_token_stops_under_ignore_eos(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    end = engine.card.end_token_ids[0]
    text = next(text for text, token in engine.tokenizer.control.hidden.items() if token == end)
    fields = {
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "logit_bias": {str(end): 100},
    }
    for stop, finish in ((None, "length"), (text, "stop")):
        params = resolve_params(
            {**fields, "stop": stop}, card=engine.card, prompt_tokens=len(PROMPT)
        )
        assert (
            engine.submit(f"own-{finish}", PROMPT, params).result(60).outputs[0].finish_reason
            == finish
        )


@pytest.mark.parametrize(
    "stop", ["\n<|eot_id|>", "<|eot_id|> ", "<|user|><|system|>", "a<|user|>", "<|mdm_mask|>"]
)
@pytest.mark.parametrize(
    ("endpoint", "prompt"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        (COMPLETIONS, {"prompt": "x"}),
        (COMPLETIONS, {"prompt": ["x", "y"]}),
        (RESPONSES, {"input": "x"}),
    ],
)
def test_what_no_answer_can_match_is_refused_by_name(
    endpoint: str, prompt: dict[str, Any], stop: str
) -> None:
    request = parse(endpoint, {"model": "m", **prompt, "stop": ["b", stop]}, streaming=False)
    with pytest.raises(InvalidParameter, match=r"^stop: ") as wrong:
        request.resolve(CARD, TOKENIZER)
    assert wrong.value.param == "stop"


def test_text_without_special_tokens_is_found_as_text(engine_of: GetEngine) -> None:
    tokenizer = TOKENIZER
    for stop in ("eot_id", "<|", "|>", "<|eot_i"):
        check_stops([stop], CARD, tokenizer)
        assert stop_ids([stop], tokenizer) == frozenset()
    assert stop_ids(["<|eot_id|>", "a"], tokenizer) == {756}
    with pytest.raises(InvalidParameter, match="stop"):
        engine_of("llada").submit_prompt("x", SamplingParams(stop=("a<|eot_id|>",)))


def unflagged() -> TokenizerWrapper:
    """A tokenizer that flags no token as special, as some checkpoints' do; its config still names
    end and mask.
    """
    files = TOKENIZER.files()
    shown = (
        files["tokenizer.json"]
        .replace('"special": true', '"special": false')
        .replace('"special":true', '"special":false')
    )
    return TokenizerWrapper({**files, "tokenizer.json": shown})


def test_tokens_that_answers_show_are_text() -> None:
    tokenizer = unflagged()
    assert stop_ids(["<|eot_id|>"], tokenizer) == frozenset()
    check_stops(["a<|eot_id|>"], CARD, tokenizer)


def test_a_token_that_only_the_config_names_is_a_control_token() -> None:
    tokenizer = unflagged()
    assert not tokenizer.control.hidden
    assert stop_ids(["<|endoftext|>", "a"], tokenizer) == {751}
    check_stops(["<|endoftext|>", "a<|endoftext|>"], CARD, tokenizer)  # an answer's text shows it
    for stop, message in (
        ("<|mdm_mask|>", "is the mask token"),
        ("a<|mdm_mask|>", "has the special token"),
    ):
        with pytest.raises(InvalidParameter, match=message) as wrong:
            check_stops([stop], CARD, tokenizer)
        assert wrong.value.param == "stop"


def test_the_mask_is_known_by_the_models_own_number() -> None:
    """Neither the flag nor the tokenizer's config says that it is one."""
    tokenizer, card = unflagged(), dataclasses.replace(CARD, mask_token_id=753)
    with pytest.raises(InvalidParameter, match="is the mask token"):
        check_stops(["<|user|>"], card, tokenizer)
    check_stops(["<|user|>"], dataclasses.replace(CARD, mask_token_id=-1), tokenizer)
