"""The questions that vdiff-tiny learns, the split that holds some of them out, and its tokenizer.

Six kinds with checkable answers. A question is held out for evaluation when a hash of its text says
so (one in ten), so training never sees an evaluation question; for additions that is one in ten of
the pairs (A, B).

    python scripts/tiny_tasks.py --per-kind 400 --seed 1 --threshold 0.9 > questions.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
USER, ASSISTANT, SYSTEM, EOT = "<|user|>", "<|assistant|>", "<|system|>", "<|eot_id|>"
SPECIALS = (EOS, MASK, USER, ASSISTANT, SYSTEM, EOT)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "tiger",
    "lemon",
    "chair",
    "piano",
    "bread",
    "ocean",
    "horse",
    "green",
    "table",
    "light",
    "music",
    "paper",
    "train",
    "house",
    "garden",
    "window",
    "silver",
    "forest",
    "summer",
    "winter",
    "coffee",
    "bridge",
    "candle",
    "castle",
    "dragon",
    "engine",
    "flower",
    "guitar",
    "island",
    "jacket",
    "kitten",
    "ladder",
    "market",
    "needle",
    "orange",
    "pencil",
    "rabbit",
    "school",
    "ticket",
    "valley",
    "wagon",
    "yellow",
    "zebra",
    "mountain",
    "basket",
    "camera",
    "desert",
    "feather",
    "hammer",
    "jungle",
    "lantern",
    "mirror",
]
NAMES = [
    "Tom",
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Noah",
    "Olga",
]
THINGS = ["apples", "books", "coins", "pens", "cards", "shells", "stamps", "eggs"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
CITIES = [
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Oslo",
    "Vienna",
    "Prague",
    "Lisbon",
    "Dublin",
]
TEMPLATES = (
    "Dear NAME, see you on DAY in CITY.",
    "NAME flies to CITY on DAY.",
    "On DAY, NAME stays in CITY.",
    "The train to CITY leaves on DAY, NAME.",
)


def addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return f"What is {a} + {b}?", f"{a + b}"


def sorting(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
    return f"Sort the numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def reversal(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Reverse the words: {' '.join(words)}", " ".join(reversed(words))


def json_list(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Write a JSON list of the words: {' '.join(words)}", json.dumps(words)


def template(rng: random.Random) -> tuple[str, str]:
    text = rng.choice(TEMPLATES)
    name, day, city = rng.choice(NAMES), rng.choice(DAYS), rng.choice(CITIES)
    answer = text.replace("NAME", name).replace("DAY", day).replace("CITY", city)
    return f"Fill in NAME = {name}, DAY = {day}, CITY = {city}: {text}", answer


def story(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    c = rng.randint(1, min(9, a + b - 1))
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    question = f"{name} has {a} {thing}, gets {b} more and loses {c}. How many {thing} are left?"
    return question, f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}. Answer: {a + b - c}"


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "addition": addition,
    "sorting": sorting,
    "reversal": reversal,
    "json_list": json_list,
    "template": template,
    "story": story,
}


def held_out(question: str) -> bool:
    """Return whether the question belongs to the evaluation side of the split (one in ten)."""
    return hashlib.sha256(question.encode()).digest()[0] % 10 == 0


def sample(kind: str, rng: random.Random, *, evaluation: bool) -> tuple[str, str]:
    """One question and its answer, from the wanted side of the split."""
    while True:
        question, answer = KINDS[kind](rng)
        if held_out(question) == evaluation:
            return question, answer


def evaluation_set(per_kind: int = 80, seed: int = 2026) -> list[dict[str, object]]:
    """Distinct held-out questions as lines that `vdiff generate --input` takes."""
    rng = random.Random(seed)
    lines: list[dict[str, object]] = []
    for kind in KINDS:
        seen: set[str] = set()
        while len(seen) < per_kind:
            question, answer = sample(kind, rng, evaluation=True)
            if question in seen:
                continue
            seen.add(question)
            lines.append(
                {
                    "custom_id": f"{kind}-{len(seen):03d}",
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": 32,
                    "metadata": {"kind": kind, "answer": answer},
                }
            )
    return lines


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Byte-level BPE over the questions' words: each word one token, each digit one token, any
    UTF-8 text encodable.
    """
    rng = random.Random(seed)
    corpus = [" ".join(sample(kind, rng, evaluation=False)) for _ in range(3000) for kind in KINDS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=5,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write the Hugging Face tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "padding_side": "left",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(s)): {
                "content": s,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for s in SPECIALS
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    specials = {"eos_token": EOS, "pad_token": EOS, "mask_token": MASK}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=1) + "\n")


def render(question: str) -> str:
    """The chat template, applied to one user message."""
    return f"{USER}{question}{EOT}{ASSISTANT}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write held-out questions, a line each, for `vdiff generate --input`."
    )
    parser.add_argument(
        "--per-kind", type=int, default=80, help="questions of each kind [80: the shipped set]"
    )
    parser.add_argument(
        "--seed", type=int, default=2026, help="of the draw [2026: the shipped set]"
    )
    parser.add_argument(
        "--threshold", type=float, help="decode with algorithm threshold [one token per step]"
    )
    args = parser.parse_args()
    if not 1 <= args.per_kind <= 400:
        parser.error(
            "--per-kind must be from 1 to 400: there are not many more held-out questions of some kinds"
        )
    for line in evaluation_set(args.per_kind, args.seed):
        if args.threshold is not None:
            line["diffusion"] = {"algorithm": "threshold", "threshold": args.threshold}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
