"""Events to chunks: repeated, missing, of a second attempt; each chunk is one that the `openai` SDK
reads.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from api.openai.sse import ChunkStream, Diverged
from shared.canvas import STEP_BYTES, CanvasWriter
from shared.jobs.responses import CHAT, COMPLETIONS, build_result


def stream(
    endpoint: str = CHAT, *, n: int = 1, include_usage: bool = False, visualize: bool = False
) -> ChunkStream:
    return ChunkStream(
        endpoint, "job_1", "m", 7, n=n, include_usage=include_usage, visualize=visualize
    )


def progress(text: str, offset: int, *, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "step": 1, "text": text, "offset": offset, **more}


def finished(*texts: str, endpoint: str = CHAT) -> dict[str, Any]:
    choices = [
        {"index": i, "text": t, "token_ids": [1, 2], "finish_reason": "stop"}
        for i, t in enumerate(texts)
    ]
    result = build_result(
        endpoint=endpoint,
        job_id="job_1",
        model="m",
        created=7,
        choices=choices,
        prompt_tokens=3,
        extras={"job_id": "job_1"},
    )
    return {"status": "succeeded", "result": result}


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    text = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                text += (
                    (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                )
    return text


def test_a_chat_stream_from_role_to_usage() -> None:
    s = stream(include_usage=True)
    chunks = [
        *s.start(),
        *s.progress(progress("ab", 0)),
        *s.progress(progress("c", 2)),
        *s.finish(finished("abcd")),
    ]
    parsed = [ChatCompletionChunk.model_validate(c) for c in chunks]
    assert parsed[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in parsed[1:4]] == ["ab", "c", "d"]
    assert [c.choices[0].finish_reason for c in parsed if c.choices] == [
        None,
        None,
        None,
        None,
        "stop",
    ]
    assert parsed[-1].choices == []
    assert parsed[-1].usage is not None
    assert parsed[-1].usage.total_tokens == 5
    assert all(c["usage"] is None for c in chunks[:-1])
    assert {c.id for c in parsed} == {"chatcmpl-1"}


def test_a_completion_stream_has_no_role_and_no_usage_unasked() -> None:
    s = stream(COMPLETIONS)
    chunks = [
        *s.start(),
        *s.progress(progress("ab", 0)),
        *s.finish(finished("ab", endpoint=COMPLETIONS)),
    ]
    parsed = [
        Completion.construct(**c) for c in chunks
    ]  # as the SDK does; its type knows no null finish_reason
    assert [c.choices[0].text for c in parsed] == ["ab", ""]
    assert [c.choices[0].finish_reason for c in parsed] == [None, "stop"]
    assert not any("usage" in c for c in chunks)


def test_what_comes_twice_is_said_once() -> None:
    s = stream()
    assert text_of(s.progress(progress("ab", 0))) == "ab"
    assert s.progress(progress("ab", 0)) == []
    assert text_of(s.progress(progress("abc", 0))) == "c"  # merged with what came before
    assert s.progress(progress("b", 1)) == []
    assert s.progress(progress("", 3)) == []


def test_after_a_hole_the_rest_comes_at_the_end() -> None:
    s = stream()
    assert text_of(s.progress(progress("ab", 0))) == "ab"
    assert s.progress(progress("d", 3)) == []
    assert s.progress(progress("e", 4)) == []
    assert text_of(s.finish(finished("abcde"))) == "cde"


def test_a_second_attempt_that_says_the_same_goes_on() -> None:
    s = stream()
    said = text_of(s.progress(progress("abc", 0)))
    for piece in (progress("a", 0), progress("b", 1), progress("cd", 2)):  # from the start again
        said += text_of(s.progress(piece))
    assert said == "abcd"
    assert text_of(s.finish(finished("abcd"))) == ""


@pytest.mark.parametrize("whole", ["axc", "", "ab"])
def test_one_that_says_something_else_is_an_error_not_a_mixture(whole: str) -> None:
    s = stream()
    s.progress(progress("abc", 0))
    with pytest.raises(Diverged):
        s.finish(finished(whole))


@given(
    text=st.text(max_size=30),
    events=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30),
)
def test_whatever_is_lost_or_repeated_the_text_is_whole(
    text: str, events: list[tuple[int, int]]
) -> None:
    s = stream()
    chunks = s.start()
    for a, b in events:  # any pieces, in any order
        start, end = sorted((min(a, len(text)), min(b, len(text))))
        chunks += s.progress(progress(text[start:end], start))
        assert text.startswith(text_of(chunks))
    assert text_of([*chunks, *s.finish(finished(text))]) == text


def test_choices_do_not_mix() -> None:
    s = stream(n=2)
    chunks = [*s.start(), *s.progress(progress("b", 0, index=1)), *s.progress(progress("a", 0))]
    chunks += s.finish(finished("aa", "bb"))
    assert [text_of(chunks, 0), text_of(chunks, 1)] == ["aa", "bb"]
    assert len(s.start()) == 2


def test_visualize_sends_the_whole_text_each_time() -> None:
    s = stream(visualize=True)
    assert s.progress(progress("a", 0)) == []  # no canvas, nothing to draw
    (chunk,) = s.progress(progress("a", 0, canvas="a░░"))
    assert chunk["choices"][0]["delta"]["content"] == "a░░"
    assert chunk["vdiff"] == {"diffusing": True, "replace": True, "committed": "a", "step": 1}
    last = s.finish(finished("abc"))
    assert last[0]["choices"][0]["delta"]["content"] == "abc"
    assert last[0]["vdiff"] == {"diffusing": False, "replace": True, "committed": "abc"}
    assert last[1]["choices"][0]["finish_reason"] == "stop"


def test_a_long_visualized_text_costs_bytes_by_its_steps() -> None:
    s, total, steps = stream(visualize=True), 0, 1_000
    writer = CanvasWriter()
    for step in range(steps):
        canvas = "w " * step + "\u2591" * (steps - step)
        for chunk in s.progress(progress("w ", 2 * step, attempt=1, **writer.fields(canvas))):
            assert chunk["choices"][0]["delta"]["content"] == canvas  # what is told is whole
            total += len(json.dumps(chunk))
    assert 0 < total <= (STEP_BYTES + 500) * steps
    assert text_of(s.finish(finished("w " * steps))) == "w " * steps
