"""Benchmarks of the engine alone: each a ratio, or a curve, in one run on one machine.

    python benchmarks/engine.py loop      against a loop as published programs have it, with a
                                          126,464-token vocabulary
    python benchmarks/engine.py caches    none, prefix and dual at equal steps, with a long prompt
    python benchmarks/engine.py apd       APD against one token per step, on vdiff-tiny and its
                                          verifier
    python benchmarks/engine.py batch     tokens per second at 1, 4, 16 and 64 concurrent requests
    python benchmarks/engine.py cost      a step's time and memory as prompts and batches grow
    python benchmarks/engine.py fused     layers fused by torch.compile against layers as they are,
                                          on vdiff-tiny
    python benchmarks/engine.py padding   attention of mixed lengths: a call for each shape against
                                          similar ones padded into one
    python benchmarks/engine.py flips     how often a token differs between batch shapes, float32
                                          and bfloat16
    python benchmarks/engine.py floor     a step of LLaDA-8B's shape against the memory's bandwidth
                                          (a GPU, or --tiny)

--device cuda runs them on a GPU. Tables go to stdout, progress to stderr, JSON into --output.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a checkout wins over an installed vdiff

import checkpoints
import engine_reference
import torch
from report import machine, progress, publish, say
from servers import public_folder

from shared.diffusion_params import DiffusionParams
from shared.sampling_params import SamplingParams
from vdiff import bundled
from worker.engine import VDiffConfig, VDiffEngine
from worker.engine.config import ModelConfig
from worker.engine.loader import LoadedModel, load
from worker.engine.models.attention import varlen_of
from worker.engine.models.graphs import record
from worker.engine.models.transformer import Transformer

Rows = list[dict[str, Any]]
QUESTION = [
    {
        "role": "user",
        "content": "Tom has 5 apples, gets 3 more and loses 2. How many apples are left?",
    }
]


def greedy(max_tokens: int, **diffusion: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        diffusion=DiffusionParams(**diffusion),
    )


def prompts_of(count: int, length: int) -> list[list[int]]:
    return [[(7 * i + j) % 256 for j in range(length)] for i in range(count)]


def timed(
    engine: VDiffEngine, prompts: list[list[int]], params: SamplingParams
) -> tuple[float, list[Any]]:
    """Seconds until all are done, and their answers."""
    began = time.perf_counter()
    handles = [engine.submit(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
    outputs = [handle.result().outputs[0] for handle in handles]
    return time.perf_counter() - began, outputs


def engine_of(model: Path, args: argparse.Namespace, **options: Any) -> VDiffEngine:
    return VDiffEngine(VDiffConfig(model=str(model), device=args.device, **options))


def loop(args: argparse.Namespace) -> Rows:
    return engine_reference.run(
        width=64,
        layers=4,
        vocab=126_464,
        prompt_tokens=args.prompt_tokens or 128,
        max_tokens=args.max_tokens or 64,
        batches=[1, 16],
    )


def caches(args: argparse.Namespace) -> Rows:
    length, tokens = args.prompt_tokens or 768, args.max_tokens or 64
    shape = checkpoints.Shape(width=256, layers=6, vocab=8_192, context=length + tokens)
    rows: Rows = []
    with (
        public_folder() as folder,
        engine_of(checkpoints.make(folder / "model", shape), args) as engine,
    ):
        timed(engine, prompts_of(1, length), greedy(4, block_length=4))
        for count in (1, 4):
            base = 0.0
            for cache in progress(("none", "prefix", "dual"), 3, f"{count} at once"):
                seconds, _ = timed(
                    engine, prompts_of(count, length), greedy(tokens, block_length=32, cache=cache)
                )
                base = base or seconds
                speed = count * tokens / seconds
                rows.append(
                    {
                        "concurrent": count,
                        "prompt": length,
                        "cache": cache,
                        "tokens_per_s": speed,
                        "ratio_to_none": base / seconds,
                    }
                )
    return rows


def apd(args: argparse.Namespace) -> Rows:
    tiny, verifier = (
        bundled.folder(name) for name in (bundled.DEFAULT_MODEL, bundled.DEFAULT_VERIFIER)
    )
    settings: list[tuple[str, dict[str, Any]]] = [
        ("one token per step", {"algorithm": "sequential"})
    ]
    settings += [
        (f"apd R={r} M={m}", {"algorithm": "apd", "mixture_weight": r, "max_lookahead": m})
        for r, m in ((0.3, 32), (0.7, 32), (0.7, 8), (0.9, 32))
    ]
    rows: Rows = []
    with engine_of(tiny, args, verifier=str(verifier)) as engine:
        ids = engine.tokenizer.encode_chat(QUESTION)
        timed(engine, [ids] * 4, greedy(32, algorithm="sequential"))
        base = 0.0
        for name, diffusion in progress(settings, len(settings), "apd"):
            params = SamplingParams(
                max_tokens=32, temperature=0.0, diffusion=DiffusionParams(**diffusion)
            )
            seconds, outputs = timed(engine, [ids] * 32, params)
            base = base or seconds
            tokens, forwards = (
                sum(len(o.token_ids) for o in outputs),
                sum(o.forwards for o in outputs),
            )
            rate = outputs[0].acceptance_rate
            rows.append(
                {
                    "decoder": name,
                    "tokens_per_s": tokens / seconds,
                    "ratio": base / seconds,
                    "tokens_per_forward": tokens / forwards,
                    "acceptance_rate": "" if rate is None else rate,
                }
            )
    return rows


def batch(args: argparse.Namespace) -> Rows:
    length, tokens = args.prompt_tokens or 64, args.max_tokens or 32
    shape = checkpoints.Shape(width=256, layers=4, vocab=8_192, context=length + tokens)
    rows: Rows = []
    with public_folder() as folder:
        model = checkpoints.make(folder / "model", shape)
        with engine_of(model, args, max_num_seqs=64) as engine:
            timed(engine, prompts_of(2, length), greedy(4))
            for count in progress((1, 4, 16, 64), 4, "batch"):
                seconds, _ = timed(engine, prompts_of(count, length), greedy(tokens))
                speed = count * tokens / seconds
                rows.append(
                    {
                        "concurrent": count,
                        "tokens_per_s": speed,
                        "ratio_to_1": speed / rows[0]["tokens_per_s"] if rows else 1.0,
                    }
                )
    return rows


def cost(args: argparse.Namespace) -> Rows:
    """Each cell in a process of its own, as an allocator keeps what it once had."""
    shape = checkpoints.Shape(width=256, layers=4, vocab=8_192, context=1_100)
    cells = list(itertools.product((1, 8), (32, 256, 1_024), ("none", "dual")))
    with (
        public_folder() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        model = checkpoints.make(folder / "model", shape)
        work = pool.imap(_cost_of, [(model, args, *cell) for cell in cells], chunksize=1)
        return list(progress(work, len(cells), "cost"))


def _cost_of(cell: tuple[Path, argparse.Namespace, int, int, str]) -> dict[str, Any]:
    """A step's time, and what memory its sequences take at most beyond what the loaded and warm
    engine has.
    """
    model, args, count, length, cache = cell
    with engine_of(model, args) as engine:
        timed(engine, prompts_of(1, 32), greedy(4))
        on_gpu = engine.model.device.type == "cuda"
        held, steps = _memory(on_gpu, reset=True), engine.stats.steps
        seconds, _ = timed(
            engine, prompts_of(count, length), greedy(32, block_length=32, cache=cache)
        )
        more = (_memory(on_gpu, peak=True) - held) / count
        return {
            "concurrent": count,
            "prompt": length,
            "cache": cache,
            "step_ms": 1000 * seconds / (engine.stats.steps - steps),
            "peak_mib_per_slot": more,
            "kv_mib_per_slot": engine.model.cache_bytes_per_token * (length + 32) / 2**20
            if cache != "none"
            else 0.0,
            "engine_mib": held,
        }


def _memory(on_gpu: bool, *, reset: bool = False, peak: bool = False) -> float:
    """MiB in use, or the most since the last reset; of the process (Linux), or of the GPU."""
    if on_gpu:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return (
            torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        ) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def fused(args: argparse.Namespace) -> Rows:
    """The same requests with and without --compile, in turns; the best of three each."""
    tiny, tokens = bundled.folder(bundled.DEFAULT_MODEL), args.max_tokens or 48
    rows: Rows = []
    with engine_of(tiny, args) as plain, engine_of(tiny, args, compile=True) as compiled:
        for count in progress((1, 8), 2, "fused"):
            best = {False: float("inf"), True: float("inf")}
            for _ in range(3):
                for which, engine in ((False, plain), (True, compiled)):
                    seconds, _ = timed(engine, prompts_of(count, 16), greedy(tokens))
                    best[which] = min(best[which], seconds)
            rows.append(
                {
                    "concurrent": count,
                    "plain_tokens_per_s": count * tokens / best[False],
                    "fused_tokens_per_s": count * tokens / best[True],
                    "ratio": best[False] / best[True],
                }
            )
    return rows


def padding(args: argparse.Namespace) -> Rows:
    """The same requests with and without padding, in turns; the best of three each."""
    count, tokens = 16, args.max_tokens or 16
    prompts_by = {
        "equal": [64] * count,
        "near": [49 + i for i in range(count)],
        "far": [8 + 16 * i for i in range(count)],
    }
    rows: Rows = []
    with public_folder() as folder:
        for width in (64, 256):
            shape = checkpoints.Shape(width=width, mlp=3 * width, context=300)
            with engine_of(
                checkpoints.make(folder / f"model-{width}", shape), args, max_num_seqs=count
            ) as engine:
                cells = list(itertools.product(prompts_by, ("none", "dual")))
                for lengths, cache in progress(cells, len(cells), f"{width} wide"):
                    prompts = [
                        p[:n]
                        for p, n in zip(prompts_of(count, 256), prompts_by[lengths], strict=True)
                    ]
                    best = {False: float("inf"), True: float("inf")}
                    for _, pads in itertools.product(range(3), best):
                        engine.model.pads = pads
                        seconds, _ = timed(
                            engine, prompts, greedy(tokens, block_length=tokens, cache=cache)
                        )
                        best[pads] = min(best[pads], seconds)
                    speeds = {pads: count * tokens / seconds for pads, seconds in best.items()}
                    rows.append(
                        {
                            "width": width,
                            "lengths": lengths,
                            "cache": cache,
                            "by_shape_tokens_per_s": speeds[False],
                            "padded_tokens_per_s": speeds[True],
                            "ratio": speeds[False] / speeds[True],
                        }
                    )
    return rows


def flips(args: argparse.Namespace) -> Rows:
    """The same requests alone and all together: positions whose token differs."""
    tokens, count = args.max_tokens or 32, 24
    shape = checkpoints.Shape(width=256, layers=4, vocab=8_192, context=300)
    rows: Rows = []
    with public_folder() as folder:
        model = checkpoints.make(folder / "model", shape)
        for dtype in ("float32", "bfloat16"):
            with engine_of(model, args, dtype=dtype, max_num_seqs=count) as engine:
                prompts = [p[: 20 + 9 * i] for i, p in enumerate(prompts_of(count, 256))]
                say(f"{dtype}: alone, then together")
                alone = [
                    timed(engine, [p], greedy(tokens, block_length=8))[1][0].token_ids
                    for p in prompts
                ]
                _, together = timed(engine, prompts, greedy(tokens, block_length=8))
                pairs = [
                    (a, b)
                    for x, y in zip(alone, together, strict=True)
                    for a, b in zip(x, y.token_ids, strict=True)
                ]
                firsts = sum(x != y.token_ids for x, y in zip(alone, together, strict=True))
                rows.append(
                    {
                        "dtype": dtype,
                        "tokens": len(pairs),
                        "differ": sum(a != b for a, b in pairs),
                        "answers": count,
                        "answers_that_differ": firsts,
                    }
                )
    return rows


TINY = ModelConfig(
    architecture="LLaDAModelLM",
    family="llada",
    width=64,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp_width=128,
    vocab_size=512,
    context_length=256,
    rope_theta=5e5,
    norm_eps=1e-5,
    tied=False,
    mask_token_id=510,
    eos_token_ids=(509,),
)
LLADA_8B = ModelConfig(
    architecture="LLaDAModelLM",
    family="llada",
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp_width=12288,
    vocab_size=126464,
    context_length=4096,
    rope_theta=5e5,
    norm_eps=1e-5,
    tied=False,
    mask_token_id=126336,
    eos_token_ids=(126081,),
)


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of the best of five copies of `size` bytes."""
    big = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    copied = []
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        big.clone()
        _wait(device)
        copied.append(2 * big.nbytes / (time.perf_counter() - began))
    return max(copied)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_model(shape: ModelConfig, device: torch.device) -> Transformer:
    with torch.device(device):
        model = Transformer(shape).to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.varlen = varlen_of(device, torch.bfloat16, shape.heads, shape.kv_heads, shape.head_dim)
    return model


def floor(args: argparse.Namespace) -> Rows:
    """Random weights in LLaDA-8B's shape, bfloat16: a step against reading all weights once.

    Plain, with CUDA graphs, with layers fused by torch.compile, and with both.
    """
    if not args.tiny and (args.device != "cuda" or not torch.cuda.is_available()):
        raise SystemExit(
            "floor needs a GPU: --device cuda; or --tiny, which only shows that the benchmark runs"
        )
    device, shape = torch.device(args.device), TINY if args.tiny else LLADA_8B
    tiny = load(VDiffConfig(model=str(bundled.folder(bundled.DEFAULT_MODEL)), device="cpu"))
    model = random_model(shape, device)
    weights = sum(p.nbytes for p in model.parameters())
    ideal = weights / bandwidth(device, (1 << 24) if args.tiny else (1 << 31))
    card = replace(
        tiny.card,
        mask_token_id=shape.mask_token_id,
        end_token_ids=shape.eos_token_ids,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        device=args.device,
        dtype="bfloat16",
    )
    loaded = LoadedModel(model, shape, tiny.tokenizer, card)
    tokens, rows = args.max_tokens or 32, []
    cells = list(itertools.product((1, 4, 16, 64), ("none", "dual")))
    config = VDiffConfig(model="llada-8b-shape", device=args.device, max_num_seqs=64)
    with VDiffEngine(config, loaded=loaded) as engine:
        for fused, graphed in itertools.product((False, True), (False, True)):
            way = (
                " and ".join([*(["fused"] if fused else []), *(["graphs"] if graphed else [])])
                or "plain"
            )
            if fused and not graphed:
                model.graphs = None
                model.fuse()
            if graphed and (reason := record(model)) is not None:
                say(f"{way}: left out ({reason})")
                continue
            for count, cache in progress(cells, len(cells), way):
                params = greedy(tokens, block_length=32, cache=cache)
                timed(engine, prompts_of(count, 128), params)
                before = engine.stats.steps
                seconds, _ = timed(engine, prompts_of(count, 128), params)
                step = seconds / (engine.stats.steps - before)
                rows.append(
                    {
                        "way": way,
                        "concurrent": count,
                        "cache": cache,
                        "step_ms": 1000 * step,
                        "floor_ms": 1000 * ideal,
                        "ratio_to_floor": step / ideal,
                        "tokens_per_s": count * tokens / seconds,
                    }
                )
    return rows


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "loop": loop,
    "caches": caches,
    "apd": apd,
    "batch": batch,
    "cost": cost,
    "fused": fused,
    "padding": padding,
    "flips": flips,
    "floor": floor,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompt-tokens", type=int, help="instead of the benchmark's own")
    parser.add_argument("--max-tokens", type=int, help="instead of the benchmark's own")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="floor: a tiny model, to see that it runs; its numbers say nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        help="folder of the JSON [bench-results]",
    )
    args = parser.parse_args()
    names = (
        [n for n in BENCHMARKS if n != "floor" or args.device == "cuda"]
        if args.which == "all"
        else [args.which]
    )
    try:
        for name in names:
            facts = machine()
            rows = BENCHMARKS[name](args)
            publish(f"engine-{name}", rows, [rows], facts, args.output)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
