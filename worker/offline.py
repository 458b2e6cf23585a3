"""`vdiff generate`: a JSONL of prompts through the engine, without queue, database or server.

A line in is what `vdiff submit --file` takes: a text, a list of messages (or of token ids), or an
object {custom_id, prompt | prompt_token_ids | messages (and chat_template_kwargs), metadata, and
the generation fields of the API}. A line out: {custom_id, token_ids, text, finish_reason, forwards,
tokens_per_forward, seconds, error}, in the input's order. Lines are read as the engine takes them,
so a file may be larger than memory.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from shared.errors import ConfigurationError, InvalidParameter, MissingParameter, VDiffError
from shared.jobs.fields import LABELS, labels_of, meant, template_variables_of
from shared.jobs.messages import messages_of
from shared.jobs.no_ops import with_effect
from shared.jobs.requests import prompt_of, refuse_without_text
from shared.prompt_ids import PARSE_SPECIAL, message_ids, parse_special_of, prompt_ids
from shared.sampling_params import GENERATION_FIELDS, SamplingParams, resolve_params
from shared.stop_strings import check_stops
from shared.text_files import HEAD_BYTES, require_utf8
from worker.engine import RequestHandle, VDiffConfig, VDiffEngine
from worker.work import check_answers

PROMPTS = ("prompt", "prompt_token_ids", "messages")
VARIABLES, COMPLETION_TOKENS = "chat_template_kwargs", "max_completion_tokens"
AHEAD = 4  # requests per slot that wait in the engine, so that no slot is ever empty
REPORT_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(slots=True)
class Summary:
    """The totals of a run."""

    lines: int = 0
    errors: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0

    def to_json(self) -> dict[str, Any]:
        """Its numbers, `seconds` without loading."""
        rates = {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_forward": self.tokens_per_forward,
        }
        return {**asdict(self), **{name: round(value, 3) for name, value in rates.items()}}

    def text(self) -> str:
        how = "interrupted after" if self.interrupted else "done:"
        return (
            f"{how} {self.lines} lines, {self.errors} with errors, {self.tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_second:.1f} tokens/s, {self.tokens_per_forward:.2f} tokens per forward)"
        )


@dataclass(slots=True)
class _Line:
    number: int
    custom_id: str | None
    metadata: Any = None
    handle: RequestHandle | None = None
    params: SamplingParams | None = None
    error: VDiffError | None = None


def fields_of(value: Any) -> dict[str, Any]:
    """A line's value as the object it is short for. Raises InvalidParameter."""
    if isinstance(value, str):
        return {"messages": [{"role": "user", "content": value}]}
    if isinstance(value, list):
        return {"prompt_token_ids" if value and isinstance(value[0], int) else "messages": value}
    if not isinstance(value, dict):
        raise InvalidParameter("a line must be a text, a list or an object")
    return value


def parse_line(text: str, number: int, seen: dict[str, int]) -> tuple[_Line, dict[str, Any]]:
    """One line of input: what identifies it, and its fields. An error is noted in the line, not
    raised.
    """
    line = _Line(number, None)
    try:
        data = fields_of(json.loads(text))
        custom_id = data.pop("custom_id", None)
        if custom_id is not None and (not isinstance(custom_id, str) or not custom_id):
            raise InvalidParameter("custom_id must be a non-empty string", param="custom_id")
        line.custom_id = custom_id
        if custom_id is not None:
            if custom_id in seen:
                message = f"custom_id {custom_id[:80]!r} was used on line {seen[custom_id]}"
                raise InvalidParameter(message, param="custom_id")
            seen[custom_id] = number
        line.metadata = data.pop("metadata", None)
        if data.get("max_tokens") is None and data.get("messages") is not None:
            data["max_tokens"] = data.get(COMPLETION_TOKENS)
        known = (*PROMPTS, *GENERATION_FIELDS)
        data = with_effect(
            data,
            (*known, "model", VARIABLES, PARSE_SPECIAL, *LABELS),
            lambda name: f"{name[:80]} is not a field of a line{meant(name, known)}",
        )
        labels_of(data)
        return line, data
    except VDiffError as exc:
        line.error = exc
    except (ValueError, RecursionError) as exc:
        line.error = InvalidParameter(f"not JSON: {exc}", code="invalid_json")
    return line, {}


def submit(engine: VDiffEngine, line: _Line, data: dict[str, Any]) -> None:
    """Check a line against the model and hand it to the engine; an error is noted in the line."""
    try:
        if data.get("model") not in (None, engine.card.name):
            message = f"model must be {engine.card.name}, the model of this run; leave it out"
            raise InvalidParameter(message, param="model")
        given = [name for name in PROMPTS if data.get(name) is not None]
        if len(given) != 1:
            wanted = ", ".join(PROMPTS)
            kind = InvalidParameter if given else MissingParameter
            raise kind(
                f"a line needs exactly one of {wanted}", param=given[1] if given else "prompt"
            )
        where = given[0]
        text: str | None = None
        parse_special = parse_special_of(data)
        if where == "messages":
            variables, messages = (
                template_variables_of(data.get(VARIABLES) or {}),
                messages_of(data[where]),
            )
            text = engine.tokenizer.apply_chat_template(messages, variables=variables)
            ids = message_ids(
                messages,
                where,
                engine.card,
                engine.tokenizer,
                variables=variables,
                parse_special=parse_special,
            )
        else:
            text, token_ids = prompt_of(data[where], where)
            if where == "prompt_token_ids" and token_ids is None:
                raise InvalidParameter("prompt_token_ids must be a list of token ids", param=where)
            if text is None and parse_special is False:
                refuse_without_text()
            prompt = token_ids or [] if text is None else text
            ids = prompt_ids(
                prompt, where, engine.card, engine.tokenizer, parse_special=parse_special
            )
        if where != "messages" and data.get(VARIABLES):
            raise InvalidParameter(f"{VARIABLES} has no effect without messages", param=VARIABLES)
        if not ids:
            raise InvalidParameter(f"{where} is empty", param=where)
        fields = {k: v for k, v in data.items() if k in GENERATION_FIELDS}
        if fields.get("n") not in (None, 1):
            raise InvalidParameter("a line gives one answer; repeat it for more", param="n")
        params = resolve_params(
            fields, card=engine.card, prompt_tokens=len(ids), chat=where == "messages"
        )
        line.params = params
        check_stops(params.stop, engine.card, engine.tokenizer)
        line.handle = engine.submit(f"line-{line.number}", ids, params, prompt=text)
    except VDiffError as exc:
        line.error = exc


def answer_of(line: _Line, summary: Summary) -> dict[str, Any]:
    """The line out; waits for the request."""
    answer: dict[str, Any] = dict.fromkeys(
        (
            "custom_id",
            "token_ids",
            "text",
            "finish_reason",
            "forwards",
            "tokens_per_forward",
            "seconds",
            "error",
        )
    )
    answer["custom_id"] = line.custom_id
    if line.metadata is not None:
        answer["metadata"] = line.metadata
    error = line.error
    if line.handle is not None:
        try:
            output = line.handle.result()
            assert line.params is not None
            check_answers(line.params, output)
            first = output.outputs[0]
            answer.update(
                token_ids=first.token_ids,
                text=first.text,
                finish_reason=first.finish_reason,
                forwards=first.forwards,
                tokens_per_forward=round(output.metrics.tokens_per_forward, 4),
                seconds=round(output.metrics.denoise_ms / 1000, 6),
            )
            if first.closed_early:
                answer["closed_early"] = True
            if first.logprobs is not None:
                answer["logprobs"] = [
                    {
                        "token_id": t.token_id,
                        "logprob": round(t.logprob, 6),
                        "top": [list(pair) for pair in t.top],
                    }
                    for t in first.logprobs
                ]
            summary.tokens += len(first.token_ids)
            summary.forwards += first.forwards
        except VDiffError as exc:
            error = exc
    if error is not None:
        summary.errors += 1
        answer["error"] = {
            "code": error.code,
            "message": f"line {line.number}: {error.message}",
            "param": error.param,
            "line": line.number,
        }
    summary.lines += 1
    return answer


class _Reporter:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._total, self._done, self._began, self._told = (
            total,
            0,
            time.monotonic(),
            time.monotonic(),
        )
        self._terminal = sys.stderr.isatty()
        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = stack.enter_context(
            Progress(*columns, console=Console(stderr=True), disable=not self._terminal)
        )
        self._task = self._bar.add_task("generate", total=total, rate="")

    def advance(self, tokens: int) -> None:
        self._done += 1
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = f"{self._done / elapsed:.1f} lines/s, {tokens / elapsed:.0f} tokens/s"
        self._bar.update(self._task, advance=1, rate=rate)
        if not self._terminal and time.monotonic() - self._told > REPORT_SECONDS:
            self._told = time.monotonic()
            left = (self._total - self._done) * elapsed / self._done
            print(
                f"{self._done}/{self._total} lines, {rate}, ETA {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def _interrupts(summary: Summary) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `summary.interrupted`; what is running is finished and written."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if summary.interrupted:
            raise KeyboardInterrupt
        summary.interrupted = True
        print(
            "stopping; the lines in work are finished first (again: stop at once)",
            file=sys.stderr,
            flush=True,
        )

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(source: TextIO) -> Iterator[tuple[int, str]]:
    for number, text in enumerate(source, 1):
        if text.strip():
            yield number, text


def _count(path: Path) -> int:
    """Count the lines that are not empty. Raises NotUTF8: the file is UTF-16 or UTF-32."""
    with path.open("rb") as file:
        require_utf8(file.read(HEAD_BYTES), str(path), param="input")
        file.seek(0)
        return sum(1 for text in file if text.strip())


def generate_file(config: VDiffConfig, source: Path, target: Path) -> Summary:
    """Decode every line of `source` into `target`.

    Raises:
        ConfigurationError: a file cannot be read or written; the model's errors.
        NotUTF8: the input is UTF-16 or UTF-32.
    """
    summary = Summary()
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigurationError("--output must be another file than --input", param="output")
    with ExitStack() as stack:
        try:
            total = _count(source)
            # Bytes that are not UTF-8 become lone surrogates, and an error of their line alone.
            lines = _lines(
                stack.enter_context(source.open(encoding="utf-8-sig", errors="surrogateescape"))
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            # Whether it can be written is known before a model is loaded; what is in it stays until
            # one is.
            out = stack.enter_context(target.open("a", encoding="utf-8"))
        except OSError as exc:
            raise ConfigurationError(f"{exc.filename}: {exc.strerror}") from exc
        engine = stack.enter_context(VDiffEngine(config))
        if out.seekable():  # a pipe has nothing in it
            out.truncate(0)
        reporter = _Reporter(total, stack)
        stack.enter_context(_interrupts(summary))
        began = time.monotonic()
        seen: dict[str, int] = {}
        waiting: deque[_Line] = deque()

        def write() -> None:
            out.write(json.dumps(answer_of(waiting.popleft(), summary), ensure_ascii=False) + "\n")
            out.flush()
            summary.seconds = time.monotonic() - began
            reporter.advance(summary.tokens)

        for number, text in lines:
            if summary.interrupted:
                break
            waiting.append(_made(engine, number, text, seen))
            while waiting and (len(waiting) >= AHEAD * engine.slots or _is_ready(waiting[0])):
                write()
        while waiting:
            write()
    return summary


def _made(engine: VDiffEngine, number: int, text: str, seen: dict[str, int]) -> _Line:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Line(number, None, error=InvalidParameter("not UTF-8", code="invalid_utf8"))
    line, data = parse_line(text, number, seen)
    if line.error is None:
        submit(engine, line, data)
    return line


def _is_ready(line: _Line) -> bool:
    return line.handle is None or line.handle.done()


__all__ = ["Summary", "generate_file"]
