"""Weights on their way into memory: the progress bar, tied embeddings, and no second copy of a
checkpoint.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.unit.engine.golden_cases import GOLDEN
from tests.unit.engine.test_loading import copied
from worker.engine import VDiffConfig
from worker.engine.batch import Pass
from worker.engine.loader import load


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_tensors_counted_and_a_file_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with safe_open(GOLDEN / "llada" / "model.safetensors", framework="pt") as file:
        count = len(list(file.keys()))
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        load(VDiffConfig(model=str(GOLDEN / "llada"), device="cpu"))
        shown[stream.isatty()] = stream.getvalue()
    assert "loading weights" in shown[True] and f"{count}/{count}" in shown[True]
    assert "loading weights" not in shown[False]


@pytest.mark.parametrize(
    ("family", "embedding", "head", "key"),
    [
        (
            "llada",
            "model.transformer.wte.weight",
            "model.transformer.ff_out.weight",
            "weight_tying",
        ),
        ("dream", "model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"),
        ("sdar", "model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"),
        ("llada2_moe", "model.word_embeddings.weight", "lm_head.weight", "tie_word_embeddings"),
    ],
)
def test_tied_embeddings_say_what_a_head_of_the_same_weights_says(
    tmp_path: Path, family: str, embedding: str, head: str, key: str
) -> None:
    folders = [
        copied(
            tmp_path / "untied",
            family,
            lambda t: t.update({head: t[embedding].clone()}),
            **{key: False},
        ),
        copied(tmp_path / "tied", family, lambda t: t.pop(head, None), **{key: True}),
        copied(
            tmp_path / "repeated",
            family,
            lambda t: t.update({head: torch.zeros_like(t[embedding])}),
            **{key: True},
        ),
        GOLDEN / family,
    ]
    logits = []
    for folder in folders:
        model = load(VDiffConfig(model=str(folder), device="cpu", dtype="float32")).model
        with torch.inference_mode():
            logits.append(next(model.compute([Pass([5, 6, 7, 8], [0, 3])])))
    untied, tied, repeated, own = logits
    assert torch.equal(tied, untied) and torch.equal(
        repeated, untied
    )  # what some files repeat is not read
    assert not torch.allclose(
        own, untied
    )  # the golden head is another one, so the three above could have differed


# Reads how much memory that is not a file's (RssAnon) the process holds, every millisecond while a
# checkpoint is loaded: a mapped file's pages can be dropped at any time, a second copy of its
# weights cannot.
MEASURE = """
import gc, json, sys, threading, time
from worker.engine import VDiffConfig
from worker.engine.loader import load

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

load(VDiffConfig(model=sys.argv[1], device="cpu", dtype="bfloat16"))  # everything imported, allocators warm
found = []
for folder in sys.argv[2:]:
    gc.collect()
    peak, stop, before = [0], threading.Event(), held()
    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], held())
    thread = threading.Thread(target=watch)
    thread.start()
    model = load(VDiffConfig(model=folder, device="cpu", dtype="bfloat16")).model
    stop.set()
    thread.join()
    weights = sum(p.nbytes for p in model.parameters())
    found.append({"weights": weights, "after": held() - before, "peak": max(peak[0], held()) - before})
    del model
print(json.dumps(found))
"""


def big(folder: Path, dtype: torch.dtype) -> Path:
    """The golden Dream, wider and deeper: 55 million weights in tensors of at most 8 million."""
    made = copied(
        folder,
        "dream",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        vocab_size=2048,
    )
    raw = json.loads((made / "config.json").read_text())
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    kv = 1024 * kv_heads // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (2048, 1024),
        "lm_head.weight": (2048, 1024),
    }
    shapes["model.norm.weight"] = (1024,)
    for i in range(4):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{n}_layernorm.weight": (1024,) for n in ("input", "post_attention")}
        for name, rows in (("q", 1024), ("k", kv), ("v", kv)):
            shapes |= {
                f"{at}self_attn.{name}_proj.weight": (rows, 1024),
                f"{at}self_attn.{name}_proj.bias": (rows,),
            }
        shapes[f"{at}self_attn.o_proj.weight"] = (1024, 1024)
        shapes |= {f"{at}mlp.{name}_proj.weight": (4096, 1024) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (1024, 4096)
    from safetensors.torch import save_file

    save_file(
        {n: torch.full(s, 0.01, dtype=dtype) for n, s in shapes.items()}, made / "model.safetensors"
    )
    return made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_holds_no_second_copy(tmp_path: Path) -> None:
    same, wider = big(tmp_path / "same", torch.bfloat16), big(tmp_path / "wider", torch.float32)
    command = [sys.executable, "-c", MEASURE, *map(str, (GOLDEN / "dream", same, wider))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found["weights"] > 100e6
        assert (
            found["after"] > 0.9 * found["weights"]
        )  # the weights themselves are seen by this measure
        assert found["peak"] < 1.4 * found["weights"], (
            found
        )  # the largest tensor is 8% of them, 16% in float32
