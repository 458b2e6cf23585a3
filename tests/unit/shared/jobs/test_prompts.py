"""Several prompts in one body of /v1/completions."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.jobs.bodies import parse
from shared.jobs.prompts import PromptsRequest
from shared.jobs.requests import ParsedRequest
from shared.jobs.responses import COMPLETIONS
from shared.jobs.tasks import PromptsTask, task_of
from tests.unit.shared.jobs.test_infill_and_scoring import CARD, TOKENIZER


def parsed(prompt: Any, streaming: bool = False, **body: Any) -> Any:
    return parse(COMPLETIONS, {"model": "m", "prompt": prompt, **body}, streaming=streaming)


def test_each_prompt_is_found_again() -> None:
    made = parsed(["What is", [5, 6, 7], "56"], n=2, max_tokens=4).resolve(CARD, TOKENIZER)
    assert isinstance(made.task, PromptsTask)
    wanted = [TOKENIZER.encode("What is"), [5, 6, 7], TOKENIZER.encode("56")]
    assert list(made.task.pieces(made.prompt_token_ids)) == wanted
    assert made.tokens == sum(map(len, wanted)) + 3 * 2 * 4
    assert task_of(made.params_json()) == made.task  # as the worker reads it


@pytest.mark.parametrize("prompt", ["What is", [5, 6], ["What is"], [[5, 6]]])
def test_one_prompt_is_no_list(prompt: Any) -> None:
    assert isinstance(parsed(prompt), ParsedRequest)


@pytest.mark.parametrize(
    "prompt,body,param",
    [
        (["a", ""], {}, "prompt[1]"),
        (["a", []], {}, "prompt[1]"),
        (["a", [5, -1]], {}, "prompt[1]"),
        (["a", ["b", "c"]], {}, "prompt[1]"),
        (["a", "b " * 200], {}, "prompt[1]"),
        (["a", 5], {}, "prompt"),
        (["a"] * 129, {}, "prompt"),
        (["a", "b"], {"stream": True}, "stream"),
        (["a", "b"], {"n": 0}, "n"),
        (["a"] * 100, {"n": 3}, "n"),
        (["a", "b"], {"color": 1}, "color"),
    ],
)
def test_what_is_wrong_is_named(prompt: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        parsed(prompt, streaming=True, **body).resolve(CARD, TOKENIZER)
    assert wrong.value.param == param


def test_all_but_the_prompt_is_shared() -> None:
    made = parsed(["a", "b"], metadata={"k": "v"}, temperature=0)
    assert isinstance(made, PromptsRequest)
    assert (made.endpoint, made.model, made.metadata, made.characters) == (
        COMPLETIONS,
        "m",
        {"k": "v"},
        2,
    )
    assert [one.prompt for one in made.each] == ["a", "b"]
