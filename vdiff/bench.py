"""`vdiff bench decoders`: one evaluation set through every decoder that a model has, accuracy
against tokens per forward.

The set's lines are those of `vdiff generate` with the right answer under `metadata.answer` (exact
match). The result is a table with Wilson's 95% intervals, a JSON file and a plot (SVG, no library
needed to look at it).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.algorithms import BLOCK, FULL
from shared.errors import ConfigurationError
from shared.plots import Point, scatter
from shared.sampling_params import resolve_params
from shared.statistics import wilson
from shared.text_files import decode_text
from worker.engine import VDiffEngine


@dataclass(frozen=True, slots=True)
class Measured:
    """One decoder on the whole set."""

    name: str
    right: int
    total: int
    low: float  # Wilson's 95% interval of right / total
    high: float
    forwards: int
    tokens: int
    seconds: float
    acceptance_rate: float | None = None

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0


def settings_of(algorithms: Sequence[str], regime: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `diffusion` of every decoder to compare: each algorithm at one or several settings."""
    share = "steps" if regime == FULL else "denoising_steps"
    for name in algorithms:
        if name in (
            "threshold",
            "low_confidence_dynamic",
            "credit",
            "klass",
            "hierarchical",
            "joint_threshold",
        ):
            for value in (0.5, 0.7, 0.9):
                yield f"{name} {value:g}", {"algorithm": name, "threshold": value}
        elif name == "factor":
            for value in (0.5, 1.0, 2.0):
                yield f"factor {value:g}", {"algorithm": name, "factor": value}
        elif name == "entropy_bound":
            for value in (0.01, 0.1, 1.0):
                yield f"entropy_bound {value:g}", {"algorithm": name, "gamma": value}
        elif name == "sequential":
            for count in (1, 2):
                yield f"sequential {count}", {"algorithm": name, "tokens_per_step": count}
        elif name == "apd":
            for weight in (0.1, 0.3, 0.5, 0.7, 0.9):
                yield f"apd R={weight:g}", {"algorithm": name, "mixture_weight": weight}
            for window, ahead in (
                (None, 4),
                (None, 8),
                (None, 16),
                (1, None),
                (4, None),
                (16, None),
                (16, 16),
            ):
                apd = {"mixture_weight": 0.7, "kv_window": window, "max_lookahead": ahead}
                yield (
                    f"apd R=0.7 W={window or '-'} M={ahead or '-'}",
                    {"algorithm": name, "apd": apd},
                )
        elif name == "renoise":
            for steps in (12, 48):
                yield f"renoise {steps}", {"algorithm": name, "max_denoising_steps": steps}
        else:
            yield f"{name}, one token per step", {"algorithm": name}
            if regime in (FULL, BLOCK):
                yield f"{name}, half the steps", {"algorithm": name, share: -2}


def read_set(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The lines of an evaluation set, spread over the file when limited. Raises ConfigurationError
    naming the line.
    """
    try:
        lines = decode_text(path.read_bytes(), str(path), param="input").split("\n")
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}", param="input") from exc
    made = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            assert isinstance(data["metadata"]["answer"], str) and isinstance(
                data["messages"], list
            )
        except (ValueError, KeyError, TypeError, AssertionError) as exc:
            message = f"{path}, line {number}: a line needs messages and metadata.answer"
            raise ConfigurationError(message, param="input") from exc
        made.append(data)
    if not made:
        raise ConfigurationError(f"{path} is empty", param="input")
    if limit is None or limit >= len(made):
        return made
    return [made[i * len(made) // limit] for i in range(limit)]


def measure(
    engine: VDiffEngine,
    name: str,
    diffusion: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    temperature: float = 0.0,
    max_tokens: int | None = None,
) -> Measured:
    """Run the set with one decoder; requests share the engine's batches.

    Args:
        max_tokens: instead of each line's own.
    """
    began, handles = time.perf_counter(), []
    for i, line in enumerate(lines):
        ids = engine.tokenizer.encode_chat(line["messages"])
        length = max_tokens or int(line.get("max_tokens", 32))
        asked = {k: (length // 2 if v == -2 else v) for k, v in diffusion.items()}
        if asked.get("denoising_steps") is not None:
            asked["denoising_steps"] = max((engine.card.block_length or length) // 2, 1)
        fields = {"max_tokens": length, "temperature": temperature, "seed": i, "diffusion": asked}
        params = resolve_params(fields, card=engine.card, prompt_tokens=len(ids), chat=True)
        handles.append(engine.submit(f"{name}-{i}", ids, params))
    outputs = [handle.result() for handle in handles]
    right = sum(
        o.outputs[0].text == line["metadata"]["answer"]
        for o, line in zip(outputs, lines, strict=True)
    )
    low, high = wilson(right, len(lines))
    drafted = [o.metrics.acceptance_rate for o in outputs if o.metrics.acceptance_rate is not None]
    return Measured(
        name,
        right,
        len(lines),
        low,
        high,
        sum(o.metrics.forwards for o in outputs),
        sum(o.metrics.generated_tokens for o in outputs),
        time.perf_counter() - began,
        sum(drafted) / len(drafted) if drafted else None,
    )


def decoders(
    engine: VDiffEngine,
    lines: Sequence[Mapping[str, Any]],
    on_done: Callable[[Measured], object],
    *,
    algorithms: Sequence[str] | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = None,
) -> list[Measured]:
    """Every decoder of the model, or of these algorithms, one after another."""
    made = []
    for name, diffusion in settings_of(
        algorithms or engine.card.capabilities["algorithms"], engine.card.regime
    ):
        made.append(measure(engine, name, diffusion, lines, temperature, max_tokens))
        on_done(made[-1])
    return made


def write(
    measured: Sequence[Measured], folder: Path, facts: Mapping[str, Any]
) -> tuple[Path, Path]:
    """decoders.json and decoders.svg; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        **facts,
        "decoders": [
            {**asdict(m), "accuracy": m.accuracy, "tokens_per_forward": m.tokens_per_forward}
            for m in measured
        ],
    }
    (folder / "decoders.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "decoders.svg").write_text(plot(measured), encoding="utf-8")
    return folder / "decoders.json", folder / "decoders.svg"


def plot(measured: Sequence[Measured]) -> str:
    """Accuracy with its interval against tokens per forward, as SVG; one colour for each algorithm."""
    points = [
        Point(
            m.name,
            m.name.split()[0].rstrip(","),
            m.tokens_per_forward,
            m.accuracy,
            m.low,
            m.high,
            f"{m.name}: {m.accuracy:.1%}, {m.tokens_per_forward:.2f} tokens per forward",
        )
        for m in measured
    ]
    return scatter(
        points, x_label="tokens per forward", y_label="exact match, with 95% interval", alone=True
    )
