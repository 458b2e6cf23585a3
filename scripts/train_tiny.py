"""Train the bundled models from a seed: `vdiff-tiny` (masked diffusion) and `vdiff-tiny-ar`
(autoregressive).

    python scripts/train_tiny.py --kind diffusion --out vdiff/bundled/vdiff-tiny
    python scripts/train_tiny.py --kind ar --out vdiff/bundled/vdiff-tiny-ar

The diffusion model is LLaDA's (Nie et al. 2025, https://arxiv.org/abs/2502.09992): a bidirectional
transformer that predicts masked answer tokens given the prompt. Two departures, both measured to
matter at this size: the loss is plain cross-entropy over masked answer tokens (no 1/t weight) with
the padding after the first end token weighted 0.15, and a part of the examples mimics block
decoding (left of the block clean, right of it masked). Every batch has one total length, filled by
the answer's end padding, so that no attention mask is needed and answers see canvases of any
length.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_tasks import (
    EOS,
    KINDS,
    MASK,
    build_tokenizer,
    evaluation_set,
    render,
    sample,
    save_tokenizer,
)
from torch import Tensor, nn

CONTEXT = 512
THETA = 10_000.0
PAD_WEIGHT = 0.15

# share of a batch's examples, and for each total length (tokens, prompt and answer) its share of
# the steps
MIX = {
    "addition": 0.22,
    "sorting": 0.15,
    "reversal": 0.16,
    "json_list": 0.17,
    "template": 0.13,
    "story": 0.17,
}
LENGTHS = {24: 0.40, 48: 0.50, 80: 0.10}
TOKENS_PER_STEP = 4608
FITS_24 = {"addition": 0.62, "sorting": 0.16, "reversal": 0.22}
# The diffusion model's last steps, at a lower rate: more of what was weakest after the first (84%
# of the stories, mostly those whose result has two digits: they are rare, and do not fit into 48
# tokens).
REFINE_STEPS = 1600
REFINE_RATE = 6e-4
REFINE_MIX = {
    "addition": 0.10,
    "sorting": 0.22,
    "reversal": 0.06,
    "json_list": 0.06,
    "template": 0.06,
    "story": 0.50,
}
REFINE_LENGTHS = {24: 0.15, 56: 0.75, 80: 0.10}


@dataclass(frozen=True, slots=True)
class Shape:
    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = s.heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(s.width, eps=1e-5), nn.RMSNorm(s.width, eps=1e-5)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(s.width, s.width, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = (nn.Linear(s.width, s.mlp, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: bool) -> Tensor:
        b, length, width = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            p(h).view(b, length, self.heads, -1).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=causal
        )
        x = x + self.attn_out(attended.transpose(1, 2).reshape(b, length, width))
        h = self.ff_norm(x)
        out: Tensor = x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        return out


class Transformer(nn.Module):
    """Token ids [batch, length] -> logits of the rows wanted [rows, vocab]."""

    def __init__(self, s: Shape, *, causal: bool) -> None:
        super().__init__()
        self.shape, self.causal = s, causal
        self.wte = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.ln_f = nn.RMSNorm(s.width, eps=1e-5)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.02 if "wte" in name else 1.0 / math.sqrt(p.shape[1])
                if name.endswith(("attn_out.weight", "ff_out.weight")):
                    scale /= math.sqrt(2 * s.layers)
                nn.init.normal_(p, std=scale)
        half = s.width // s.heads // 2
        inv = 1.0 / THETA ** (torch.arange(half) / half)
        angles = torch.outer(torch.arange(CONTEXT).float(), inv)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        x = self.wte(ids)
        length = ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length], self.causal)
        x = x if rows is None else x[rows]
        out: Tensor = self.head(self.ln_f(x))
        return out


class Data:
    """Batches of one total length each, from Python's generator keyed by (seed, step)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokenizer = build_tokenizer(0)
        self.eos, self.mask = self.tokenizer.token_to_id(EOS), self.tokenizer.token_to_id(MASK)
        self.vocab = self.tokenizer.get_vocab_size()
        self._pool: dict[str, list[tuple[list[int], list[int]]]] = {}
        rng = random.Random(seed)
        for kind in KINDS:
            pairs = [
                sample(kind, rng, evaluation=False)
                for _ in range(60_000 if kind != "addition" else 40_000)
            ]
            prompts = self.tokenizer.encode_batch_fast(
                [render(q) for q, _ in pairs], add_special_tokens=False
            )
            answers = self.tokenizer.encode_batch_fast(
                [a for _, a in pairs], add_special_tokens=False
            )
            self._pool[kind] = [(p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)]
            if kind == "story":  # those whose result has two digits
                ids = zip(pairs, self._pool[kind], strict=True)
                self._hard_stories = [made for (_, text), made in ids if text[-2].isdigit()]

    def batch(self, step: int, *, refine: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids [batch, length] and the answer's start [batch]."""
        rng = random.Random(self.seed * 1_000_003 + step)
        lengths = REFINE_LENGTHS if refine else LENGTHS
        length = rng.choices(list(lengths), list(lengths.values()))[0]
        mix = FITS_24 if length == 24 else REFINE_MIX if refine else MIX
        kinds = rng.choices(list(mix), list(mix.values()), k=TOKENS_PER_STEP // length)
        rows, starts = [], []
        for kind in kinds:
            pool = self._pool[kind]
            if refine and kind == "story" and rng.random() < 0.5:
                pool = self._hard_stories
            while True:
                prompt, answer = rng.choice(pool)
                if len(prompt) + len(answer) < length:
                    break
            rows.append(prompt + answer + [self.eos] * (length - len(prompt) - len(answer)))
            starts.append(len(prompt))
        return torch.tensor(rows), torch.tensor(starts)


def choose_masked(ids: Tensor, starts: Tensor, generator: torch.Generator) -> Tensor:
    """Which positions to mask [batch, length]: at random, all, or as block decoding leaves them; at
    least one a row.
    """
    batch, length = ids.shape
    position = torch.arange(length)[None, :]
    answer = position >= starts[:, None]
    ratio = torch.rand(batch, 1, generator=generator)
    noise = torch.rand(batch, length, generator=generator)
    masked = noise < ratio
    mode = torch.rand(batch, 1, generator=generator)
    block = torch.randint(0, 4, (batch, 1), generator=generator) * 8
    begin = starts[:, None] + block
    blockwise = ((position >= begin) & (position < begin + 8) & masked) | (position >= begin + 8)
    masked = (
        torch.where(
            mode < 0.2, torch.ones_like(masked), torch.where(mode < 0.55, blockwise, masked)
        )
        & answer
    )
    first = (position == starts[:, None]) & ~masked.any(dim=1, keepdim=True)
    return masked | first


def losses(
    model: Transformer, ids: Tensor, starts: Tensor, data: Data, generator: torch.Generator
) -> Tensor:
    """Mean weighted cross-entropy of the wanted tokens."""
    is_end = ids == data.eos
    padding = is_end & (is_end.int().cumsum(dim=1) > 1)
    weight = torch.where(padding, PAD_WEIGHT, 1.0)
    if model.causal:
        logits = model(ids[:, :-1])
        answer = torch.arange(1, ids.shape[1])[None, :] >= starts[:, None]
        # the verifier also learns the prompt a little, so that it scores text that is not an answer
        weight = torch.where(answer, weight[:, 1:], torch.where(padding[:, 1:], 0.0, 0.1))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return (loss * weight.flatten()).sum() / weight.sum()
    masked = choose_masked(ids, starts, generator)
    logits = model(torch.where(masked, data.mask, ids), masked)
    loss = F.cross_entropy(logits.float(), ids[masked], reduction="none")
    return (loss * weight[masked]).sum() / weight[masked].sum()


@torch.no_grad()
def decode(
    model: Transformer,
    data: Data,
    prompts: list[list[int]],
    canvas: int,
    block: int,
    threshold: float | None,
) -> list[str]:
    """A small greedy decoder for progress reports; the engine's own numbers go into the card."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt + [data.mask] * canvas])
        for left in range(len(prompt), len(prompt) + canvas, block):
            window = slice(left, left + block)
            while bool((ids[0, window] == data.mask).any()):
                logits = model(ids)[0, window].float()
                logits[:, data.mask] = -math.inf
                confidence, token = logits.softmax(-1).max(-1)
                confidence[ids[0, window] != data.mask] = -1
                pick = confidence >= (threshold or 2.0)
                pick[confidence.argmax()] = True
                ids[0, window][pick] = token[pick]
            if bool((ids[0, window] == data.eos).any()):
                break
        out = ids[0, len(prompt) :].tolist()
        out = out[: out.index(data.eos)] if data.eos in out else out
        texts.append(data.tokenizer.decode(out))
    return texts


@torch.no_grad()
def decode_ar(model: Transformer, data: Data, prompts: list[list[int]], canvas: int) -> list[str]:
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + canvas:
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token == data.eos:
                break
            ids.append(token)
        texts.append(data.tokenizer.decode(ids[len(prompt) :]))
    return texts


def exact_match(
    model: Transformer, data: Data, per_kind: int, threshold: float | None
) -> dict[str, float]:
    scores = {}
    for kind in KINDS:
        lines: list[Any] = [e for e in evaluation_set() if e["metadata"]["kind"] == kind][:per_kind]  # type: ignore[index]
        prompts = [
            data.tokenizer.encode(render(e["messages"][0]["content"]), add_special_tokens=False).ids
            for e in lines
        ]
        texts = (
            decode_ar(model, data, prompts, 32)
            if model.causal
            else decode(model, data, prompts, 32, 8, threshold)
        )
        scores[kind] = sum(
            t == e["metadata"]["answer"] for t, e in zip(texts, lines, strict=True)
        ) / len(lines)
    return scores


def export(weights: dict[str, Tensor], model: Transformer, data: Data, out: Path) -> None:
    """Write the checkpoint: LLaDA's layout for the diffusion model, Llama's for the autoregressive
    one.
    """
    s = model.shape
    save_tokenizer(data.tokenizer, out, CONTEXT)
    tensors: dict[str, Tensor] = {}
    ours = [
        "attn_norm",
        "q_proj",
        "k_proj",
        "v_proj",
        "attn_out",
        "ff_norm",
        "ff_proj",
        "up_proj",
        "ff_out",
    ]
    llama = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    prefix = "model.layers" if model.causal else "model.transformer.blocks"
    for layer in range(s.layers):
        for mine, theirs in zip(ours, llama if model.causal else ours, strict=True):
            tensors[f"{prefix}.{layer}.{theirs}.weight"] = weights[f"blocks.{layer}.{mine}.weight"]
    names = (
        ("model.embed_tokens", "model.norm", "lm_head")
        if model.causal
        else ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
    )
    for name, mine in zip(names, ("wte", "ln_f", "head"), strict=True):
        tensors[f"{name}.weight"] = weights[f"{mine}.weight"]
    save_file(
        {k: v.float().contiguous() for k, v in tensors.items()},
        str(out / "model.safetensors"),
        {"format": "pt"},
    )
    common = {"vocab_size": s.vocab, "eos_token_id": data.eos, "pad_token_id": data.eos}
    if model.causal:
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": s.width,
            "intermediate_size": s.mlp,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.heads,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "dtype": "float32",
            **common,
        }
        generation: dict[str, Any] = {
            "do_sample": False,
            "eos_token_id": data.eos,
            "pad_token_id": data.eos,
        }
    else:
        config = {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "activation_type": "silu",
            "block_type": "llama",
            "d_model": s.width,
            "n_layers": s.layers,
            "n_heads": s.heads,
            "n_kv_heads": s.heads,
            "mlp_hidden_size": s.mlp,
            "embedding_size": s.vocab,
            "max_sequence_length": CONTEXT,
            "layer_norm_type": "rms",
            "rms_norm_eps": 1e-5,
            "rope": True,
            "rope_theta": THETA,
            "rope_full_precision": True,
            "include_bias": False,
            "include_qkv_bias": False,
            "weight_tying": False,
            "mask_token_id": data.mask,
            "alibi": False,
            "input_emb_norm": False,
            "scale_logits": False,
            **common,
        }
        generation = {
            "temperature": 0.0,
            "max_new_tokens": 64,
            "algorithm": "low_confidence",
            "block_length": 8,
            "eos_token_id": data.eos,
            "pad_token_id": data.eos,
            "mask_token_id": data.mask,
        }
        lines = "".join(json.dumps(line) + "\n" for line in evaluation_set())
        (out / "eval.jsonl").write_text(lines)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("diffusion", "ar"), default="diffusion")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps",
        type=int,
        help="before the last, refining ones; default: 4400 (diffusion), 1500 (ar)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument(
        "--resume", type=Path, help="file of training state to continue from and to save to"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    causal = args.kind == "ar"
    first = args.steps or (1500 if causal else 4400)
    steps = first if causal else first + REFINE_STEPS
    print("building the tokenizer and the question pool", flush=True)
    data = Data(args.seed)
    shape = Shape(96, 2, 4, 256, data.vocab) if causal else Shape(160, 4, 4, 432, data.vocab)
    model = Transformer(shape, causal=causal)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps, seed {args.seed}",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = 0
    if args.resume and args.resume.exists():
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        average, start = state["average"], state["step"]
    stop = False

    def on_signal(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    began, running = time.monotonic(), 0.0
    for step in range(start, steps):
        refine = step >= first
        if refine:
            rate = REFINE_RATE * min(1.0, (step - first + 1) / 50) * 0.5
            rate *= 1 + math.cos(math.pi * (step - first) / REFINE_STEPS)
        else:
            rate = 2e-3 * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / first))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, starts = data.batch(step, refine=refine)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = losses(model, ids, starts, data, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if step > start else loss.item()
        last = step + 1 == steps or stop
        if (step + 1) % 50 == 0 or last:
            speed = (step + 1 - start) / (time.monotonic() - began)
            eta = (steps - step - 1) / speed
            print(
                f"step {step + 1}/{steps}  loss {running:.4f}  {speed:.2f} steps/s  ETA {eta / 60:.1f} min",
                flush=True,
            )
        if (step + 1) % args.report_every == 0 or last:
            trained = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average)
            model.eval()
            for threshold in (None,) if causal or not last else (None, 0.9):
                scores = exact_match(model, data, 80 if last else 20, threshold)
                print(
                    "exact match",
                    threshold or "",
                    {k: round(v, 3) for k, v in scores.items()},
                    flush=True,
                )
            export(average, model, data, args.out)
            model.load_state_dict(trained)
            model.train()
            if args.resume:
                torch.save(
                    {
                        "model": trained,
                        "optimizer": optimizer.state_dict(),
                        "generator": generator.get_state(),
                        "average": average,
                        "step": step + 1,
                    },
                    args.resume,
                )
        if stop:
            print("stopped; continue with --resume", flush=True)
            return


if __name__ == "__main__":
    main()
