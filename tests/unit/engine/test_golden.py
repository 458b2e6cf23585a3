"""The engine against numbers that the published programs computed: token for token, forward for forward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.engine import DiffusionParams, SamplingParams, VDiffConfig, VDiffEngine

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = ("llada", "llada_gqa")
REFERENCES: dict[str, dict[str, Any]] = {f: json.loads((GOLDEN / f / "reference.json").read_text()) for f in FAMILIES}
CASES = [(family, case) for family in FAMILIES for case in REFERENCES[family]["cases"]]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, VDiffEngine]]:
    made = {f: VDiffEngine(VDiffConfig(model=str(GOLDEN / f), dtype="float32", device="cpu")) for f in FAMILIES}
    yield made
    for engine in made.values():
        engine.shutdown()


def params_of(case: dict[str, Any]) -> SamplingParams:
    args = case["args"]
    asked: dict[str, Any] = {
        "algorithm": "low_confidence",
        "steps": args["steps"],
        "block_length": args["block_length"],
        "cfg_scale": args.get("cfg_scale", 0.0),
    }
    for rule in ("threshold", "factor"):
        if args.get(rule) is not None:
            asked |= {"algorithm": rule, "steps": None, rule: args[rule]}
    replaced = case["reference_constants_replaced"]
    if args.get("logits_eos_inf"):
        asked |= {"suppress_end": "logits", "suppress_token_ids": (int(replaced["126081"]),)}
    if args.get("confidence_eos_eot_inf"):
        asked |= {"suppress_end": "confidence", "suppress_token_ids": tuple(int(v) for v in replaced.values())}
    return SamplingParams(
        max_tokens=args["gen_length"], temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(**asked)
    )


@pytest.mark.parametrize(("family", "case"), CASES, ids=[case["id"] for _, case in CASES])
def test_tokens_and_forwards(engines: dict[str, VDiffEngine], family: str, case: dict[str, Any]) -> None:
    engine, params = engines[family], params_of(case)
    masks = case["attention_mask"] or [[1] * len(row) for row in case["prompt_ids"]]
    prompts = [
        [t for t, m in zip(row, mask, strict=True) if m] for row, mask in zip(case["prompt_ids"], masks, strict=True)
    ]
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], params)
    assert [o.outputs[0].token_ids for o in outputs] == case["generated"]
    forwards = max(o.outputs[0].forwards for o in outputs)
    if case["args"]["steps"] > case["args"]["gen_length"]:
        assert forwards == case["args"]["gen_length"]  # surplus steps are not run
    elif len(prompts) > 1 and params.diffusion.algorithm == "threshold":
        assert forwards <= case["nfe"]  # the reference goes on until its slowest row is done, block by block
    else:
        assert forwards == (case["nfe"] or case["forward_calls"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(engines: dict[str, VDiffEngine], family: str) -> None:
    model = engines[family].model
    for entry in REFERENCES[family]["logits"]:
        ids = torch.tensor(entry["input_ids"]).reshape(-1, len(torch.tensor(entry["input_ids"]).flatten()))
        with torch.inference_mode():
            logits = model.logits(model.hidden(ids)[0])
        wanted = torch.tensor(entry["top5_logits"]).reshape(-1, 5)
        top = torch.tensor(entry["top5_ids"]).reshape(-1, 5)
        assert torch.allclose(logits.gather(-1, top), wanted, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(engines: dict[str, VDiffEngine], family: str) -> None:
    tokenizer = engines[family].tokenizer
    for check in REFERENCES[family]["tokenizer_checks"]:
        assert tokenizer.encode(check["text"]) == check["ids"]
    for prompt in REFERENCES[family]["prompts"]:
        assert tokenizer.apply_chat_template(prompt["messages"]) == prompt["rendered"]
        assert tokenizer.encode_chat(prompt["messages"]) == prompt["ids"]
