"""`resolve_params`: every field, where its default comes from, and that nothing is accepted and
ignored.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.algorithms import CACHES, PARAMETERS, algorithms_of, own_parameters
from shared.diffusion_params import DIFFUSION_FIELDS, DiffusionParams, shown_diffusion
from shared.errors import InvalidParameter, PromptTooLong, UnknownParameter, VDiffError
from shared.model_card import ModelCard
from shared.sampling_params import GENERATION_FIELDS, SamplingParams, resolve_params
from worker.engine.request import block_starts

CARD = ModelCard(
    name="m",
    family="llada",
    context_length=512,
    vocab_size=100,
    mask_token_id=99,
    end_token_ids=(97, 98),
    suppress_token_ids={"logits": (97,), "confidence": (97, 98)},
    capabilities={
        "algorithms": ["low_confidence", "random", "threshold", "factor"],
        "caches": ["none"],
    },
)


def resolve(
    card: ModelCard = CARD, prompt_tokens: int = 10, chat: bool = False, **given: Any
) -> SamplingParams:
    return resolve_params(given, card=card, prompt_tokens=prompt_tokens, chat=chat)


def lengths(params: SamplingParams) -> list[int]:
    starts = block_starts(params, "full", 10)
    return [b - a for a, b in pairwise(starts)]


def refused(param: str, error: type[VDiffError] = InvalidParameter, **given: Any) -> str:
    with pytest.raises(error) as wrong:
        resolve(**given)
    assert wrong.value.param == param
    assert wrong.value.http_status == 400
    return wrong.value.message


def test_without_fields_and_defaults_the_names_of_vllm_hold() -> None:
    params = resolve()
    assert (params.n, params.max_tokens, params.temperature, params.top_p, params.top_k) == (
        1,
        16,
        1.0,
        1.0,
        -1,
    )
    assert (params.stop, params.seed, params.ignore_eos, params.stop_token_ids) == (
        (),
        None,
        False,
        (),
    )
    assert (params.diffusion.algorithm, params.diffusion.steps, params.diffusion.block_length) == (
        "low_confidence",
        None,
        16,
    )


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("n", 16, 16),
        ("max_tokens", 502, 502),
        ("temperature", 0, 0.0),
        ("temperature", 2, 2.0),
        ("top_p", 0.5, 0.5),
        ("top_p", 1, 1.0),
        ("top_k", -1, -1),
        ("top_k", 7, 7),
        ("top_k", 0, -1),
        ("logprobs", 0, 0),
        ("logprobs", 20, 20),
        ("logprobs", False, None),
        ("stop", "a", ("a",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("stop", "", ()),
        ("stop", ["", "a"], ("a",)),
        ("seed", -(2**63), -(2**63)),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("ignore_eos", True, True),
        ("stop_token_ids", [0, 98], (0, 98)),
    ],
)
def test_a_good_value_arrives(name: str, value: Any, kept: Any) -> None:
    assert getattr(resolve(**{name: value}), name) == kept


@pytest.mark.parametrize("name", GENERATION_FIELDS)
def test_null_is_absent(name: str) -> None:
    assert resolve(**{name: None}) == resolve()


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("n", 0, "n"),
        ("n", 17, "n"),
        ("n", True, "n"),
        ("n", "2", "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 503, "max_tokens"),
        ("max_tokens", 16.0, "max_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 2.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", 10**400, "temperature"),
        ("temperature", True, "temperature"),
        ("top_p", -0.1, "top_p"),
        ("top_p", 1.01, "top_p"),
        ("top_k", -2, "top_k"),
        ("top_k", 1.5, "top_k"),
        ("stop", 5, "stop"),
        ("stop", [5], "stop"),
        ("stop", list("abcdefghijklmnopq"), "stop"),
        ("stop", ["x" * 257], "stop"),
        ("seed", 2**63, "seed"),
        ("seed", 1.0, "seed"),
        ("ignore_eos", 1, "ignore_eos"),
        ("stop_token_ids", [100], "stop_token_ids[0]"),
        ("stop_token_ids", [1, -1], "stop_token_ids[1]"),
        ("stop_token_ids", 5, "stop_token_ids"),
        ("stop_token_ids", [99], "stop_token_ids"),
        ("stop_token_ids", [1] * 257, "stop_token_ids"),
        ("logprobs", 21, "logprobs"),
        ("logprobs", -1, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("top_logprobs", 1, "top_logprobs"),
        ("diffusion", [], "diffusion"),
        ("diffusion", "fast", "diffusion"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any, param: str) -> None:
    assert refused(param, **{name: value}).startswith((param, "each stop"))


@pytest.mark.parametrize(
    ("diffusion", "param"),
    [
        ({"algorithm": "magic"}, "algorithm"),
        ({"algorithm": 5}, "algorithm"),
        ({"algorithm": "apd"}, "algorithm"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": 10**7}, "steps"),
        ({"block_length": 0}, "block_length"),
        ({"block_length": 5}, "block_length"),
        ({"block_length": 32}, "block_length"),
        ({"block_length": 8, "steps": 3}, "steps"),
        ({"algorithm": "threshold", "threshold": 0}, "threshold"),
        ({"algorithm": "threshold", "threshold": 1.01}, "threshold"),
        ({"algorithm": "threshold", "steps": 4}, "steps"),
        ({"threshold": 0.9}, "threshold"),
        ({"factor": 1.0}, "factor"),
        ({"algorithm": "factor", "factor": 0}, "factor"),
        ({"algorithm": "factor", "factor": 65}, "factor"),
        ({"algorithm": "random", "factor": 1}, "factor"),
        ({"cache": "dual"}, "cache"),
        ({"cache": True}, "cache"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"cfg_scale": 101}, "cfg_scale"),
        ({"suppress_end": "never"}, "suppress_end"),
        ({"suppress_token_ids": [1]}, "suppress_token_ids"),
        ({"suppress_end": "logits", "suppress_token_ids": [100]}, "suppress_token_ids[0]"),
        ({"visualize": "yes"}, "visualize"),
    ],
)
def test_a_bad_diffusion_value_is_refused_by_its_full_name(
    diffusion: dict[str, Any], param: str
) -> None:
    refused(f"diffusion.{param}", diffusion=diffusion)


def test_unknown_fields_are_refused_by_name() -> None:
    assert "known here" in refused("colour", UnknownParameter, colour=1)
    refused("diffusion.colour", UnknownParameter, diffusion={"colour": None})


def test_every_field_has_a_place() -> None:
    assert {f.name for f in fields(SamplingParams)} == {*GENERATION_FIELDS} - {"top_logprobs"}
    assert {f.name for f in fields(DiffusionParams)} == {*DIFFUSION_FIELDS} - {"apd"}


def test_a_field_that_the_algorithm_does_not_read_says_whose_it_is() -> None:
    message = refused("diffusion.threshold", diffusion={"algorithm": "factor", "threshold": 0.5})
    assert message.startswith(
        "diffusion.threshold has no effect with factor; it belongs to threshold"
    )


def test_a_prompt_that_leaves_no_room() -> None:
    with pytest.raises(PromptTooLong) as wrong:
        resolve(prompt_tokens=512)
    assert (wrong.value.param, wrong.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(PromptTooLong) as wrong:
        resolve(prompt_tokens=600, chat=True)
    assert wrong.value.param == "messages"
    assert resolve(prompt_tokens=511).max_tokens == 1  # the default shrinks
    assert resolve(prompt_tokens=511, max_tokens=1).max_tokens == 1


def with_defaults(**defaults: Any) -> ModelCard:
    return replace(CARD, defaults=defaults)


def test_the_models_generation_config_is_between_request_and_default() -> None:
    card = with_defaults(
        temperature=0.0,
        top_p=0.8,
        top_k=5,
        max_tokens=40,
        diffusion={"algorithm": "threshold", "threshold": 0.7, "block_length": 8},
    )
    params = resolve(card)
    # The model's filters are part of its sampling; at temperature 0 nothing is sampled.
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.0, 1.0, -1, 40)
    warm = resolve(card, temperature=0.5)
    assert (warm.temperature, warm.top_p, warm.top_k) == (0.5, 0.8, 5)
    assert (
        params.diffusion.algorithm,
        params.diffusion.threshold,
        params.diffusion.block_length,
    ) == (
        "threshold",
        0.7,
        8,
    )
    asked = resolve(
        card, temperature=0.5, top_p=1.0, top_k=-1, max_tokens=9, diffusion={"threshold": 0.5}
    )
    assert (
        asked.temperature,
        asked.top_p,
        asked.top_k,
        asked.max_tokens,
        asked.diffusion.threshold,
    ) == (
        0.5,
        1.0,
        -1,
        9,
        0.5,
    )
    # A rule that the request chose does not inherit another rule's parameters.
    assert resolve(card, diffusion={"algorithm": "factor"}).diffusion.factor == 1.0


def test_chat_gets_the_models_default_else_256_within_the_context() -> None:
    assert resolve(chat=True).max_tokens == 256
    assert resolve(with_defaults(max_tokens=64), chat=True).max_tokens == 64
    assert resolve(chat=True, prompt_tokens=500).max_tokens == 12


@given(
    max_tokens=st.integers(1, 500),
    block=st.integers(1, 5000),
    steps=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_defaults_adapt_to_max_tokens_and_never_fail(
    max_tokens: int, block: int, steps: int | None
) -> None:
    diffusion = {"block_length": block} | ({} if steps is None else {"steps": steps})
    params = resolve(with_defaults(diffusion=diffusion), max_tokens=max_tokens)
    blocks = lengths(params)
    assert sum(blocks) == max_tokens
    assert all(b == blocks[0] for b in blocks[:-1])
    assert 1 <= blocks[-1] <= blocks[0] <= block
    if params.diffusion.steps is not None:
        assert params.diffusion.steps % len(blocks) == 0


@given(length=st.integers(1, 64), blocks=st.integers(1, 8), per_block=st.integers(1, 8))
def test_what_divides_is_accepted(length: int, blocks: int, per_block: int) -> None:
    params = resolve(
        max_tokens=length * blocks, diffusion={"block_length": length, "steps": per_block * blocks}
    )
    assert lengths(params) == [length] * blocks


def card_of(regime: str, *, verifier: bool = False, **more: Any) -> ModelCard:
    capabilities = {
        "algorithms": list(algorithms_of(regime, verifier=verifier)),
        "caches": list(CACHES[regime]),
    }
    return replace(CARD, regime=regime, capabilities=capabilities, **more)


def refused_by(card: ModelCard, param: str, **given: Any) -> str:
    with pytest.raises(InvalidParameter) as wrong:
        resolve(card, **given)
    assert wrong.value.param == param
    return wrong.value.message


@pytest.mark.parametrize("regime", ["full", "block_causal", "uniform"])
def test_every_algorithm_resolves_with_every_own_parameter_at_its_default(regime: str) -> None:
    card = card_of(regime, verifier=True)
    for name in card.capabilities["algorithms"]:
        own = {k: v for k, v in own_parameters(name, regime).items() if v is not None}
        if name == "sequential":
            own = {"tokens_per_step": 2}
        params = resolve(card, diffusion={"algorithm": name, **own})
        assert {k: getattr(params.diffusion, k) for k in own} == own
        assert resolve(card, diffusion={"algorithm": name}).diffusion.algorithm == name
        assert params.completed(card) == params  # what is decided once stays as it is


@pytest.mark.parametrize("regime", ["full", "block_causal", "uniform"])
def test_a_parameter_of_another_algorithm_is_refused(regime: str) -> None:
    card = card_of(regime, verifier=True)
    for name in card.capabilities["algorithms"]:
        for parameter in set(PARAMETERS) - set(own_parameters(name, regime)):
            with pytest.raises(InvalidParameter) as wrong:
                resolve(card, diffusion={"algorithm": name, parameter: 1})
            assert wrong.value.param == f"diffusion.{parameter}"


def test_what_does_not_fit_the_model_says_what_does() -> None:
    block = card_of("block_causal")
    assert "exact, none" in refused_by(block, "diffusion.cache", diffusion={"cache": "dual"})
    assert "low_confidence_dynamic" in refused_by(
        block, "diffusion.algorithm", diffusion={"algorithm": "entropy"}
    )
    assert "--verifier" in refused_by(
        card_of("full"), "diffusion.algorithm", diffusion={"algorithm": "apd"}
    )
    assert "no algorithm" in refused_by(block, "diffusion.steps", diffusion={"steps": 4})
    uniform = card_of("uniform", block_length=16)
    refused_by(uniform, "top_k", top_k=5)
    refused_by(uniform, "logprobs", logprobs=1)
    refused_by(uniform, "diffusion.block_length", diffusion={"block_length": 8})
    refused_by(uniform, "diffusion.cfg_scale", diffusion={"cfg_scale": 1})


def test_apd_in_both_spellings() -> None:
    card = card_of("full", verifier=True)
    nested = resolve(
        card, diffusion={"algorithm": "apd", "apd": {"mixture_weight": 0.5, "kv_window": 4}}
    ).diffusion
    flat = resolve(
        card, diffusion={"algorithm": "apd", "mixture_weight": 0.5, "kv_window": 4}
    ).diffusion
    assert nested == flat
    assert (nested.cache, nested.block_length) == ("window", 16)
    assert resolve(card, diffusion={"algorithm": "apd"}).diffusion.mixture_weight == 0.7
    param = "diffusion.apd.kv_window"
    refused_by(card, param, diffusion={"algorithm": "apd", "kv_window": 4, "apd": {"kv_window": 5}})
    refused_by(card, param, diffusion={"algorithm": "apd", "apd": {"kv_window": 0}})
    refused_by(card, "diffusion.apd", diffusion={"algorithm": "apd", "apd": 5})
    refused_by(card, "diffusion.block_length", diffusion={"algorithm": "apd", "block_length": 8})
    refused_by(card, "diffusion.cache", diffusion={"algorithm": "apd", "cache": "dual"})

    refused_by(card, "diffusion.cache", diffusion={"algorithm": "threshold", "cache": "window"})
    with pytest.raises(UnknownParameter) as wrong:
        resolve(card, diffusion={"algorithm": "apd", "apd": {"speed": 1}})
    assert wrong.value.param == "diffusion.apd.speed"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_of_blocks_does_not_go_with_a_lookahead(cache: str) -> None:
    asked = {"algorithm": "sequential", "max_lookahead": 4}
    refused_by(card_of("full"), "diffusion.cache", diffusion={**asked, "cache": cache})
    assert resolve(card_of("full"), diffusion=asked).diffusion.cache == "none"


def test_block_causal_models_take_any_length() -> None:
    params = resolve(
        card_of("block_causal", block_length=4), max_tokens=13, diffusion={"block_length": 8}
    )
    assert params.diffusion.block_length == 8
    assert block_starts(params, "block_causal", 10) == [0, 6, 14]
    assert block_starts(params, "block_causal", 16) == [0, 8, 16]


def test_logprobs_of_chat() -> None:
    assert resolve(chat=True, logprobs=True).logprobs == 0
    assert resolve(chat=True, logprobs=True, top_logprobs=5).logprobs == 5
    assert resolve(chat=True, logprobs=False).logprobs is None
    for asked, param in (({"top_logprobs": 5}, "top_logprobs"), ({"logprobs": 3}, "logprobs")):
        with pytest.raises(InvalidParameter) as wrong:
            resolve(chat=True, **asked)
        assert wrong.value.param == param


def test_a_draft() -> None:
    params = resolve(diffusion={"draft_token_ids": [1, 2], "draft_noise": 0.25})
    assert (params.diffusion.draft_token_ids, params.diffusion.draft_noise) == ((1, 2), 0.25)
    refused("diffusion.draft_noise", diffusion={"draft_noise": 0.5})
    refused("diffusion.draft_token_ids", diffusion={"draft_token_ids": [1] * 17})
    refused("diffusion.draft_token_ids", diffusion={"draft_token_ids": [99]})
    refused("diffusion.max_forwards", diffusion={"max_forwards": 0})


def test_suppressed_tokens_are_the_models_unless_named() -> None:
    assert resolve(diffusion={"suppress_end": "logits"}).diffusion.suppress_token_ids == (97,)
    assert resolve(diffusion={"suppress_end": "confidence"}).diffusion.suppress_token_ids == (
        97,
        98,
    )
    named = resolve(diffusion={"suppress_end": "logits", "suppress_token_ids": [5]})
    assert named.diffusion.suppress_token_ids == (5,)
    assert resolve().diffusion.suppress_token_ids is None


def test_json_there_and_back() -> None:
    params = resolve(
        n=2,
        stop=["a", "b"],
        seed=5,
        stop_token_ids=[1],
        diffusion={"suppress_end": "confidence", "visualize": True, "steps": 4},
    )
    assert SamplingParams.from_json(params.to_json()) == params
    assert params.with_seed(9).seed == 9


def test_shown_are_the_parameters_that_had_a_meaning() -> None:
    assert "threshold" not in shown_diffusion(resolve().to_json())
    assert (
        shown_diffusion(resolve(diffusion={"algorithm": "threshold"}).to_json())["threshold"] == 0.9
    )
    assert "steps" not in shown_diffusion(resolve().to_json())
    assert shown_diffusion(resolve(diffusion={"steps": 4}).to_json())["steps"] == 4
