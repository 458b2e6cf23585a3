"""The golden cases as requests: how a call of a reference program is asked for in vdiff's terms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "golden"
SDAR_LIKE = (
    "sdar",
    "sdar_moe",
    "trado",
    "sdar_fp8",
    "sdar_fp8_block",
    "sdar_fp8_tensor",
    "sdar_fp8_scale_inv",
    "sdar_nvfp4",
)
# The program writes a second token where the quota is 2 and one mask is left: over the prompt's
# last token.
OVERWRITES_THE_PROMPT = frozenset({"sdar_fp8/greedy/07_static_2steps"})
FAMILIES = (
    "llada",
    "llada_gqa",
    "dream",
    "llada_moe",
    "llada2_moe",
    *SDAR_LIKE,
    "stable_diffcoder",
    "fast_dllm_v2",
)
REFERENCES: dict[str, dict[str, Any]] = {
    f: json.loads((GOLDEN / f / "reference.json").read_text()) for f in FAMILIES
}


@dataclass(frozen=True)
class Asked:
    """One row of a case as one request, and what must come out."""

    id: str
    family: str
    prompt: list[int]
    fields: dict[str, Any]
    wanted: list[int]
    forwards: int | None  # None: the program runs surplus forwards
    prefix_only: bool = False  # the program goes on in the block behind the end token
    accepted: list[int] | None = None  # APD: tokens accepted in each step


def _rule(args: dict[str, Any]) -> dict[str, Any]:
    for rule in ("threshold", "factor"):
        if args.get(rule) is not None:
            return {"algorithm": rule, rule: args[rule]}
    return {"algorithm": "low_confidence", "steps": args["steps"]}


def _llada(group: str, case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args = case["args"]
    if group == "dinfer":
        decoder, made = args["decoder_args"], args["generate_args"]
        rule = {"T": "threshold", "H": "hierarchical", "C": "credit"}[args["decoder"][0]]
        diffusion = {
            "algorithm": rule,
            "threshold": decoder["threshold"],
            "block_length": made["block_length"],
        }
        if rule == "hierarchical":
            diffusion["low_threshold"] = decoder["low_threshold"]
        return {
            "max_tokens": made["gen_length"],
            "stop_token_ids": [decoder["eos_id"]],
            "diffusion": diffusion,
        }, None
    diffusion = {**_rule(args), "block_length": args["block_length"]}
    fields: dict[str, Any] = {"max_tokens": args["gen_length"], "diffusion": diffusion}
    if group == "generate":
        diffusion["cfg_scale"] = args["cfg_scale"]
        replaced = [int(v) for v in case.get("reference_constants_replaced", {}).values()]
        if args.get("logits_eos_inf"):
            diffusion |= {"suppress_end": "logits", "suppress_token_ids": replaced[:1]}
        if args.get("confidence_eos_eot_inf"):
            diffusion |= {"suppress_end": "confidence", "suppress_token_ids": replaced}
        fields["diffusion"] = diffusion
        return fields, min(case["forward_calls"], args["gen_length"])  # surplus steps are not run
    if group == "dinfer_fastdllm":
        diffusion["cache"] = {"01": "none", "03": "dual"}.get(
            case["id"].rsplit("/", 1)[1][:2], "prefix"
        )
        fields["stop_token_ids"] = [args["eos_id"]]
        return fields, None
    diffusion["cache"] = {"plain": "none"}.get(group.split("/")[1], group.split("/")[1])
    return fields, case["nfe"] if len(case["prompt_ids"]) == 1 else None


def _dream(group: str, case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args = case["args"]
    fields: dict[str, Any] = {"max_tokens": args["max_new_tokens"]}
    window = {k: args[k] for k in ("kv_window", "max_lookahead") if k in args}
    if group == "generate":
        fields["diffusion"] = {"algorithm": args["alg"], "steps": args["steps"]}
        if "eps" in args:
            fields["diffusion"]["eps"] = args["eps"]
        if "top_k" in args:
            fields["top_k"] = args["top_k"]
        return fields, None  # steps that transfer nothing are not run
    if group == "apd":
        apd = {"mixture_weight": args["apd_mixture_weight"], **window}
        fields["diffusion"] = {"algorithm": "apd", "apd": apd}
        if "eos_token_id" in args:
            fields["stop_token_ids"] = [args["eos_token_id"]]
    else:
        fields["diffusion"] = {
            "algorithm": "sequential",
            "tokens_per_step": args["tokens_per_step"],
            **window,
        }
    return fields, case["num_forward_evals"]


def _llada2(group: str, case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args = case["args"]
    if group == "dinfer_bd":
        decoder, made = args["decoder_args"], args["generate_args"]
        diffusion = {
            "algorithm": "threshold",
            "threshold": decoder["threshold"],
            "block_length": made["block_length"],
        }
        return {
            "max_tokens": made["gen_length"],
            "stop_token_ids": [decoder["eos_id"]],
            "diffusion": diffusion,
        }, None
    diffusion = {"algorithm": "low_confidence_dynamic", "threshold": args["threshold"]}
    fields = {"stop_token_ids": [args["eos_id"]], "diffusion": diffusion}
    if group == "dllm_sampler":
        diffusion |= {
            "block_length": args["block_size"],
            "denoising_steps": args["steps_per_block"],
        }
        return fields | {"max_tokens": args["max_new_tokens"], "diffusion": diffusion}, None
    diffusion["block_length"] = args["block_length"]
    fields["max_tokens"] = args["gen_length"]
    if group == "llada21":
        diffusion |= {
            "algorithm": "joint_threshold",
            "edit_threshold": args["editing_threshold"],
            "max_post_edit_steps": args["max_post_steps"],
            "tokens_per_step": args.get("num_to_transfer", 1),
        }
    else:
        diffusion["denoising_steps"] = min(
            args["steps"], args["gen_length"] // args.get("minimal_topk", 1)
        )
    fields["diffusion"] = diffusion
    return fields, case["forward_calls"]


def _sdar(case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args = case["args"]
    threshold = args.get("confidence_threshold", args.get("threshold"))
    # SDAR's evaluation program (bd3) names no strategy: a threshold below 1 is the dynamic one.
    algorithm = args.get(
        "remasking_strategy", "low_confidence_" + ("dynamic" if threshold < 1 else "static")
    )
    diffusion = {
        "algorithm": algorithm,
        "denoising_steps": args["denoising_steps"],
        "block_length": args["block_length"],
    }
    if algorithm == "low_confidence_dynamic":
        diffusion["threshold"] = threshold
    fields: dict[str, Any] = {"max_tokens": args["gen_length"], "diffusion": diffusion}
    if args["top_k"]:
        fields["top_k"] = args["top_k"]
    if args["stopping_criteria_idx"]:
        fields["stop_token_ids"] = args["stopping_criteria_idx"]
        return fields, None
    # The program stores a finished block's K/V by a forward of its own, and the whole prompt blocks
    # by another.
    prompt, length = len(case["prompt_ids"][0]), args["block_length"]
    blocks = -(-(prompt + args["gen_length"]) // length) - prompt // length
    return fields, case["forward_calls"] - blocks - (prompt >= length)


def _stable_diffcoder(case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args = case["args"]
    length, whole = args["block_length"], case["generated_in_whole_blocks"]
    diffusion: dict[str, Any] = {"block_length": length}
    if args["threshold"] is None:
        steps = args["steps"] * length // args["gen_length"]
        diffusion |= {"algorithm": "low_confidence", "denoising_steps": steps}
    else:
        diffusion |= {"algorithm": "threshold", "threshold": args["threshold"]}
    # The program's last block is short when the prompt does not fill its last one: only whole
    # blocks can be compared.
    fields: dict[str, Any] = {"max_tokens": min(args["gen_length"], whole), "diffusion": diffusion}
    if args["eos_id"] is not None:
        return fields | {"stop_token_ids": [args["eos_id"]]}, None
    blocks = -(-(len(case["prompt_ids"][0]) % length + whole) // length)
    return fields, sum(case["calls_per_decoded_block"][:blocks]) - blocks


def _fast_dllm_v2(case: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    args, kinds = case["args"], case.get("forward_kinds")
    diffusion = {
        "algorithm": "threshold",
        "threshold": args["threshold"],
        "block_length": args["block_size"],
        "sub_block_length": args["small_block_size"],
        "cache": "dual" if args["use_block_cache"] else "exact",
    }
    # The result's last token is the next block's first, which the last commit forward gives.
    most = max(len(row) for row in case["generated"]) - 1
    fields = {"max_tokens": most, "stop_token_ids": [args["stop_token"]], "diffusion": diffusion}
    if kinds is None or "/stop" in case["id"] or "stop" in case["id"].rsplit("/", 1)[1]:
        return fields | {"max_tokens": most + 1}, None if kinds is None else kinds[
            "denoise"
        ] + kinds.get("denoise_sub_block", 0)
    return fields, kinds["denoise"] + kinds.get("denoise_sub_block", 0)


def asked(family: str) -> Iterator[Asked]:
    """Every row of every generation case of a family."""
    for case in REFERENCES[family]["cases"]:
        group = case["id"].split("/", 1)[1].rsplit("/", 1)[0]
        if group == "loglik" or case["id"] in OVERWRITES_THE_PROMPT:
            continue
        by_family = {"dream": _dream, "llada2_moe": _llada2}
        by_case = {
            "stable_diffcoder": _stable_diffcoder,
            "fast_dllm_v2": _fast_dllm_v2,
            **dict.fromkeys(SDAR_LIKE, _sdar),
        }
        made = (
            by_case[family](case)
            if family in by_case
            else by_family.get(family, _llada)(group, case)
        )
        fields, forwards = made
        stops = fields.get("stop_token_ids", [])
        masks = case.get("attention_mask") or [[1] * len(row) for row in case["prompt_ids"]]
        for i, (row, mask) in enumerate(zip(case["prompt_ids"], masks, strict=True)):
            prompt = [t for t, m in zip(row, mask, strict=True) if m]
            if "generated" in case:
                wanted = case["generated"][i]
                if family == "fast_dllm_v2" and len(case["generated"]) > 1:
                    fields = fields | {
                        "max_tokens": len(wanted) - 1
                    }  # rows of a batch differ in length
                end = next((k for k, t in enumerate(wanted) if t in stops), len(wanted))
                wanted = wanted[:end]
            else:  # what dInfer returns: prompt and text without any end token
                wanted = case["returned"][i][len([t for t in prompt if t not in stops]) :]
            yield Asked(
                f"{case['id']}#{i}",
                family,
                prompt,
                {"temperature": 0, "ignore_eos": True, **fields},
                wanted[: fields["max_tokens"]],
                forwards,
                group == "dinfer_bd",
                case.get("acceptance_counts"),
            )


ALL = [one for family in FAMILIES for one in asked(family)]
