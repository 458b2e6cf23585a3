"""`vdiff generate` and the command line: what a person types and what comes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, eventually

pytestmark = pytest.mark.integration
MODEL = ROOT / "tests" / "golden" / "llada"


def vdiff(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    return subprocess.run(
        [sys.executable, "-m", "vdiff", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, "VDIFF_NUM_THREADS": "1", **env},
        timeout=120,
        check=False,
    )


def test_what_was_done_as_an_object(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt_token_ids": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": true}\n{}\n'
    )
    done = vdiff("generate", "--model", MODEL, "--input", source, "--output", target, "--json")
    said = json.loads(done.stdout)
    assert (
        done.returncode,
        said["lines"],
        said["errors"],
        said["tokens"],
        said["interrupted"],
    ) == (1, 2, 1, 8, False)
    assert "1 of 2 failed" in done.stderr
    assert said["tokens_per_forward"] == round(8 / said["forwards"], 3)


def test_what_is_in_the_output_stays_until_a_model_is_loaded(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt_token_ids": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": true}\n'
    )
    target.write_text("precious\n")
    assert (
        vdiff(
            "generate", "--model", tmp_path / "typo", "--input", source, "--output", target
        ).returncode
        == 2
    )
    assert target.read_text() == "precious\n"
    assert (
        vdiff("generate", "--model", MODEL, "--input", source, "--output", target).returncode == 0
    )
    assert len(json.loads(target.read_text())["token_ids"]) == 8
    piped = vdiff("generate", "--model", MODEL, "--input", source, "--output", "/dev/stdout")
    assert piped.returncode == 0 and len(json.loads(piped.stdout)["token_ids"]) == 8, piped.stderr


def generate(
    tmp_path: Path, lines: list[Any], *options: object, code: int = 0
) -> tuple[list[dict[str, Any]], str]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    )
    done = vdiff("generate", "--model", MODEL, "--input", source, "--output", target, *options)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in target.read_text().splitlines()], done.stderr


def test_bad_lines_get_error_lines_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = {"prompt_token_ids": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    rows, said = generate(
        tmp_path,
        [
            {"custom_id": "a", **good},
            b"{not json",
            {"custom_id": "b", **good, "colour": 1},
            {"custom_id": "a", **good},
            b'{"custom_id": "\xff"}',
            {"custom_id": "c", "max_tokens": 8},
            {"custom_id": "d", **good, "prompt": "x"},
            {"custom_id": "e", **good, "diffusion": {"threshold": 0, "algorithm": "threshold"}},
            {"custom_id": "f", **good, "n": 2},
            {"custom_id": "g", "prompt": "", "max_tokens": 8},
            {"custom_id": "h", "prompt_token_ids": [10**9], "max_tokens": 8},
            {"custom_id": "z", **good, "metadata": {"kind": "k"}},
        ],
        "--max-batch",
        "2",
        code=1,
    )
    assert [(r["custom_id"], r["error"] and r["error"]["line"]) for r in rows] == [
        ("a", None),
        (None, 2),
        ("b", 3),
        ("a", 4),
        (None, 5),
        ("c", 6),
        ("d", 7),
        ("e", 8),
        ("f", 9),
        ("g", 10),
        ("h", 11),
        ("z", None),
    ]
    params = [r["error"]["param"] for r in rows if r["error"]]
    assert params == [
        None,
        "colour",
        "custom_id",
        None,
        "prompt",
        "prompt_token_ids",
        "diffusion.threshold",
        "n",
        "prompt",
        "prompt_token_ids",
    ]
    first, last = rows[0], rows[-1]
    assert first["token_ids"] == last["token_ids"]
    assert last["metadata"] == {"kind": "k"}
    assert len(first["token_ids"]) <= 8
    assert first["forwards"] > 0
    assert first["tokens_per_forward"] == pytest.approx(
        len(first["token_ids"]) / first["forwards"], abs=1e-3
    )
    assert first["seconds"] > 0
    assert "12 lines, 10 with errors" in said and "10 of 12 failed" in said


def test_a_line_may_be_a_text_or_a_list(tmp_path: Path) -> None:
    """The same lines as in `vdiff submit --file`."""
    question = "What is 17 + 25?"
    message = {"role": "user", "content": question}
    rows, _ = generate(
        tmp_path, [question, [message], {"messages": [message]}, [5, 6, 7]], "--model", "vdiff-tiny"
    )
    assert [row["text"] for row in rows[:3]] == ["42"] * 3 and rows[3]["error"] is None
    (bad, odd), said = generate(tmp_path, [7, {"messages": [message], "threshold": 0.9}], code=1)
    assert "a text, a list or an object" in bad["error"]["message"] and "2 of 2 failed" in said
    assert "did you mean diffusion.threshold?" in odd["error"]["message"]


def test_a_file_is_decoded_the_same_at_any_batch_size(tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": f"{i}",
            "prompt_token_ids": [5 + i, 6, 7 + i][: 1 + i % 3],
            "max_tokens": 4 + i,
            "seed": i,
        }
        for i in range(8)
    ]
    alone, _ = generate(tmp_path, lines, "--max-batch", "1")
    together, _ = generate(tmp_path, lines, "--max-batch", "5")
    assert [r["token_ids"] for r in alone] == [r["token_ids"] for r in together]
    assert all(r["error"] is None for r in alone)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--device", "cuda:99"], "not available"),
        (["--verifier", "./nowhere"], "verifier"),
        (["--tensor-parallel-size", "2"], "tensor_parallel_size"),
        (["--dtype", "int3"], "VDIFF_DTYPE"),
        (["--input", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_is_set_wrongly_is_one_line(tmp_path: Path, options: list[str], says: str) -> None:
    (tmp_path / "in.jsonl").write_text("")
    given = {"--model": MODEL, "--input": tmp_path / "in.jsonl", "--output": tmp_path / "out.jsonl"}
    given.update(dict(zip(options[::2], options[1::2], strict=True)))
    done = vdiff("generate", *[part for pair in given.items() for part in pair])
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_setting_is_named() -> None:
    done = vdiff("version", VDIFF_PROT="1")
    assert done.returncode == 0  # asks for no setting
    done = vdiff("migrate", VDIFF_PROT="1")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "vdiff: VDIFF_PROT is not a setting of vdiff; did you mean VDIFF_PORT?",
    )


def test_an_option_out_of_its_range_is_a_usage_error(tmp_path: Path) -> None:
    done = vdiff(
        "generate", "--model", MODEL, "--input", tmp_path, "--output", tmp_path, "--max-batch", "0"
    )
    assert done.returncode == 2
    assert (
        "'--max-num-seqs' / '--max-batch': Input should be greater than or equal to 1"
        in done.stderr
    )


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps({"prompt_token_ids": [5, 6, 7], "max_tokens": 32, "temperature": 0})
    source.write_text(f"{line}\n" * 5000)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vdiff",
            "generate",
            "--model",
            str(MODEL),
            "--input",
            str(source),
            "--output",
            str(target),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(
            lambda: target.is_file() and target.read_text().count("\n") > 2,
            seconds=60,
            what="some lines",
        )
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    written = target.read_text().splitlines()
    assert 2 < len(written) < 5000
    assert all(json.loads(x)["error"] is None for x in written)
    assert "interrupted after" in said
