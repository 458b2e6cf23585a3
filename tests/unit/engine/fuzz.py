"""Random valid requests that join, are aborted and set aside, while every step's invariants are
watched.

After every step the canvases, the slots and the memory are looked at (watch.py). The unit tests run
a round for each family; `make fuzz ARGS="--minutes 10"` goes on for as long as one likes. A failure
names the family and the seed of its round, which repeat it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.algorithms import own_parameters
from shared.sampling_params import SamplingParams, resolve_params
from tests.unit.engine.watch import Watch
from worker.engine import VDiffEngine

FAMILIES = ("llada", "llada_gqa", "llada_moe", "dream", "llada2_moe", "sdar")
ABORTED = "abort"


def random_fields(engine: VDiffEngine, rng: random.Random) -> dict[str, Any]:
    """A valid request of any rule, cache and temperature that the model has."""
    card = engine.card
    algorithm = rng.choice(card.capabilities["algorithms"])
    own = own_parameters(algorithm, card.regime)
    max_tokens = rng.choice([4, 8, 12, 16, 24])
    diffusion: dict[str, Any] = {"algorithm": algorithm}
    windowed = algorithm == "apd" or (
        algorithm == "sequential" and card.regime == "full" and rng.random() < 0.5
    )
    if windowed:
        diffusion["max_lookahead"] = rng.choice([3, 8])
        if rng.random() < 0.5:
            diffusion["kv_window"] = rng.choice([1, 4])
    else:
        diffusion["block_length"] = rng.choice([4, max_tokens])
        caches = [c for c in card.capabilities["caches"] if c != "window"]
        diffusion["cache"] = rng.choice(caches)
    if "threshold" in own:
        diffusion["threshold"] = rng.choice([0.3, 0.6, 0.9])
        diffusion |= {"low_threshold": 0.2} if "low_threshold" in own else {}
    if "steps" in own and rng.random() < 0.5 and not windowed:
        diffusion["steps"] = (
            max_tokens // 4 * rng.choice([1, 2])
            if diffusion["block_length"] == 4
            else rng.choice([2, 4])
        )
    if algorithm != "apd" and rng.random() < 0.2:
        diffusion["cfg_scale"] = 0.8
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "diffusion": diffusion,
        "seed": rng.randrange(1000),
    }
    fields["temperature"] = rng.choice([0.0, 0.0, 0.7, 1.0])
    if fields["temperature"] and rng.random() < 0.5:
        fields |= {"top_p": 0.8, "top_k": 20}
    fields["ignore_eos"] = rng.random() < 0.5
    if rng.random() < 0.3:
        fields["stop_token_ids"] = [rng.randrange(card.mask_token_id) for _ in range(20)]
    if rng.random() < 0.15:
        fields["n"] = 2
    if rng.random() < 0.15:
        fields["stop"] = rng.sample(["e", "th", " a", "?", "\n"], 2)
    return fields


def random_requests(
    engine: VDiffEngine, count: int, seed: int
) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(400) for _ in range(rng.choice([1, 3, 7, 16, 33]))]
        fields = random_fields(engine, rng)
        made.append((prompt, resolve_params(fields, card=engine.card, prompt_tokens=len(prompt))))
    return made


def _submitted(
    engine: VDiffEngine, requests: list[tuple[list[int], SamplingParams]], watch: Watch, seed: int
) -> list[tuple[int, list[list[int]]]]:
    """Run all, abort some; the tokens of those that were not aborted, with their number."""
    rng = random.Random(seed)
    handles = []
    for i, (prompt, params) in enumerate(requests):
        name = f"fuzz-{seed}-{i}"
        handles.append(
            engine.submit(name, prompt, params, priority=rng.randrange(3), listener=watch.listen)
        )
        if rng.random() < 0.2:
            rng.choice(handles).abort()
        if rng.random() < 0.5:
            time.sleep(0.002)
    whole = []
    for i, (handle, (_, params)) in enumerate(zip(handles, requests, strict=True)):
        outputs = handle.result(120).outputs
        for output in outputs:
            what, tokens = f"request {i}, answer {output.index}", output.token_ids
            assert engine.card.mask_token_id not in tokens, f"{what}: a mask in the output"
            assert len(tokens) <= params.max_tokens, f"{what}: too long"
            assert output.finish_reason in ("stop", "length", ABORTED), (
                f"{what}: {output.finish_reason}"
            )
            if output.finish_reason == "length":
                assert len(tokens) == params.max_tokens, f"{what}: length, but shorter"
            assert not set(tokens) & set(params.stop_token_ids), (
                f"{what}: a stop token in the output"
            )
            assert watch.said((handle.request_id, output.index), len(tokens)) == tokens, (
                f"{what}: events said otherwise"
            )
        if all(output.finish_reason != ABORTED for output in outputs):
            whole.append((i, [output.token_ids for output in outputs]))
    return whole


def fuzz_round(engine: VDiffEngine, seed: int, count: int, *, compared: int = 4) -> None:
    """Submit `count` random requests with joins, aborts and preemptions, and check what comes out.

    Args:
        compared: requests that are made again, alone, and must say the same.

    Raises:
        AssertionError: saying what was broken.
    """
    watch = Watch(engine)
    requests = random_requests(engine, count, seed)
    failed = engine.get_stats()["requests_failed"]
    try:
        with watch.installed():
            whole = _submitted(engine, requests, watch, seed)
    finally:
        assert not watch.broken, "; ".join(watch.broken)  # tells more than what came of it
    assert watch.steps > 0, "nothing was watched"
    for i, tokens in random.Random(seed).sample(whole, min(compared, len(whole))):
        outputs = engine.submit(f"alone-{seed}-{i}", *requests[i]).result(60).outputs
        assert [o.token_ids for o in outputs] == tokens, f"request {i}: other tokens alone"
    stats = engine.get_stats()
    held = (stats["running"], stats["waiting"], stats["cache_tokens_in_use"])
    assert held == (0, 0, 0), f"slots or memory were not returned: {held}"
    assert stats["requests_failed"] == failed, "a valid request failed"


def main() -> int:
    from tests.unit.engine.conftest import make_engine

    parser = argparse.ArgumentParser(description="fuzz the engine on the golden checkpoints")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=60, help="of a round")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; each round has the next"
    )
    args = parser.parse_args()
    engines = {family: make_engine(family, max_num_seqs=4, cache_tokens=400) for family in FAMILIES}
    began, rounds, seed = time.monotonic(), 0, args.seed
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("fuzz", total=args.minutes * 60)
            while (spent := time.monotonic() - began) < args.minutes * 60:
                family = FAMILIES[rounds % len(FAMILIES)]
                progress.update(
                    task, completed=spent, description=f"round {rounds} {family} seed {seed}"
                )
                try:
                    fuzz_round(engines[family], seed, args.requests)
                except AssertionError as exc:
                    print(f"FAILED {family} --seed {seed}: {exc}", file=sys.stderr)
                    return 1
                rounds, seed = rounds + 1, seed + 1
    except KeyboardInterrupt:
        print("stopped")
    finally:
        preempted = sum(e.get_stats()["preemptions"] for e in engines.values())
        steps = sum(e.steps_total for e in engines.values())
        for engine in engines.values():
            engine.shutdown()
    spent = time.monotonic() - began
    print(
        f"{rounds} rounds of {args.requests} requests, {steps} steps, {preempted} set aside in {spent:.0f} s: all held"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
