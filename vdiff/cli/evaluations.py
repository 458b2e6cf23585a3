"""`vdiff eval`: evaluations of a server from the command line. What they are: docs/evaluations.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.checks import EXACT, MOST
from shared.errors import ConfigurationError
from shared.text_files import decode_text
from vdiff.cli.connect import BaseUrl, Key, Timeout, connected
from vdiff.cli.exits import FAILED, INTERRUPTED
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing, console, visible, write

if TYPE_CHECKING:
    from vdiff.client import Client, Evaluation

app = typer.Typer(
    no_args_is_help=True, help="Evaluate configurations of model and decoder on a dataset."
)
TASK_FIELDS = ("template", "graders", "endpoint")
EvaluationId = Annotated[str, typer.Argument(help="its id, eval_...", show_default=False)]


@app.callback()
def group() -> None:
    """Evaluate configurations of model and decoder on a dataset."""


def read_yaml(path: Path) -> Any:
    """A file of YAML (JSON is YAML too). Raises ConfigurationError, NotUTF8: with file and line."""
    import yaml

    try:
        return yaml.safe_load(decode_text(path.read_bytes(), str(path), param="config"))
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}", param="config") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(
            f"{path}{where}: {getattr(exc, 'problem', None) or 'no YAML'}", param="config"
        ) from exc


def configurations_of(paths: Sequence[Path], model: str | None) -> list[dict[str, Any]]:
    """Read the configurations of files with one or a list each; a missing name is the file's.
    Raises ConfigurationError.
    """
    made: list[dict[str, Any]] = []
    for path in paths:
        found = read_yaml(path)
        several = found if isinstance(found, list) else [found]
        for i, one in enumerate(several):
            if not isinstance(one, dict):
                raise ConfigurationError(
                    f"{path}: a configuration is a mapping of fields", param="config"
                )
            name = path.stem if len(several) == 1 else f"{path.stem}-{i + 1}"
            made.append({"name": name, **({} if model is None else {"model": model}), **one})
    return made or [{"name": "default", **({} if model is None else {"model": model})}]


def task_of(path: Path | None, template: str | None, graders: Sequence[str]) -> dict[str, Any]:
    """Template, graders and endpoint; options win over the file. Raises ConfigurationError."""
    found = {} if path is None else read_yaml(path)
    if not isinstance(found, dict) or set(found) - set(TASK_FIELDS):
        raise ConfigurationError(f"{path}: a task has {', '.join(TASK_FIELDS)} alone", param="task")
    task: dict[str, Any] = {"template": "{{input}}", "graders": [{"type": "exact"}], **found}
    if template is not None:
        task["template"] = template
    if graders:
        task["graders"] = [{"type": kind} for kind in graders]
    return task


def show(evaluation: Evaluation) -> None:
    """The table of results, and what went wrong."""
    from rich.table import Table
    from rich.text import Text

    from shared.evaluations.report import table

    shown = Table()
    for i, name in enumerate(table.SUMMARY):
        shown.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for configuration in evaluation.configurations:
        shown.add_row(*(Text(visible(cell)) for cell in table.summary_row(configuration)))
    console().print(shown)
    for c in evaluation.configurations:
        if c["error"] is not None:
            write(f"{c['name']} failed: {c['error']['message']}")
        if c["waiting_for"] is not None:
            write(f"{c['name']}: {c['waiting_for']}")
        for e in c["top_errors"]:
            write(f"{c['name']}: {e['count']} times {e['code']}: {e['message']}")


def finish(evaluation: Evaluation, as_json: bool) -> None:
    """Print it and exit."""
    if as_json:
        typer.echo(json.dumps(evaluation.raw))
    else:
        show(evaluation)
        answered = (
            f", {evaluation.progress['graded']} of {evaluation.progress['total']} answered"
            * (not evaluation.ok)
        )
        typer.echo(
            f"{evaluation.id} {evaluation.status}{answered}; vdiff eval report {evaluation.id} --open",
            err=True,
        )
    raise typer.Exit(0 if evaluation.ok else FAILED)


def follow(client: Client, evaluation: Evaluation, timeout: float | None, as_json: bool) -> None:
    """Wait with a bar; Ctrl-C lets it go on."""
    try:
        done = client.wait_evaluation(evaluation, timeout=timeout, progress=True)
    except KeyboardInterrupt:
        message = f"{evaluation.id} goes on. Come back with `vdiff eval wait {evaluation.id}`, or with the same command."
        typer.echo(f"\n{message} End it with `vdiff eval cancel {evaluation.id}`.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finish(done, as_json)


@app.command(
    epilog=examples(
        "vdiff eval run vdiff-tiny --config fast.yaml --config careful.yaml",
        "vdiff eval run questions.jsonl --template 'Q: {{question}}\\nA:' --grader number",
        "vdiff eval run vdiff-tiny --limit 50 --json | jq '.configurations[].results.accuracy'",
    )
)
def run(
    dataset: Annotated[
        str,
        typer.Argument(
            help="a JSONL file, or the name of a bundled dataset (vdiff-tiny)", show_default=False
        ),
    ],
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="YAML of a configuration (model, max_tokens, diffusion, seeds, ...) or a list; may be repeated"
        ),
    ] = None,
    task: Annotated[Path | None, typer.Option(help="YAML with template, graders, endpoint")] = None,
    template: Annotated[
        str | None, typer.Option(help="prompt with {{column}}s [default: {{input}}]")
    ] = None,
    grader: Annotated[
        list[str] | None,
        typer.Option(help="type of a grader without options; may be repeated [default: exact]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="of configurations that name none [default: the server's only one]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the evaluation [default: the dataset's]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="lines of the dataset [default: all]")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="print the id and do not wait")] = False,
    timeout: Timeout = None,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Run a dataset through configurations, grade the answers, and show accuracy with error bars.
    The same again comes back to what is there: only what is missing runs. Exit code 1 when an
    answer could not be had or graded.
    """
    from vdiff.client.calls import only_model

    if detach and timeout is not None:
        raise ConfigurationError(
            "--timeout is for waiting, which --detach does not", param="--timeout"
        )
    path = Path(dataset)
    configurations = configurations_of(config or [], model)
    spec = task_of(task, template, grader or [])
    with connected(base_url, api_key) as client:
        if any("model" not in c for c in configurations):
            only = only_model(client.models())
            configurations = [{"model": only, **c} for c in configurations]
        source: Any = client.upload(path, purpose="evals") if path.is_file() else dataset
        if not path.is_file() and ("/" in dataset or path.suffix):
            raise ConfigurationError(f"{path}: there is no such file", param="dataset")
        made = client.create_evaluation(
            source, configurations=configurations, limit=limit, name=name or path.stem[:64], **spec
        )
        if made.reused:
            new = sum(a["new_samples"] for a in made.added or ())
            typer.echo(f"{made.id} was there; {new} answers are new", err=True)
        if detach:
            typer.echo(json.dumps(made.raw) if as_json else made.id)
            return
        follow(client, made, timeout, as_json)


@app.command(epilog=examples("vdiff eval wait eval_01k..."))
def wait(
    evaluation: EvaluationId,
    timeout: Timeout = None,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Come back to an evaluation: wait until it is over, and show its results."""
    with connected(base_url, api_key) as client:
        follow(client, client.get_evaluation(evaluation), timeout, as_json)


@app.command(
    "show", epilog=examples("vdiff eval show eval_01k...", "vdiff eval show eval_01k... --json")
)
def show_results(
    evaluation: EvaluationId,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The results as they are by now."""
    with connected(base_url, api_key) as client:
        found = client.get_evaluation(evaluation)
    if as_json:
        typer.echo(json.dumps(found.raw))
    else:
        show(found)
        answered, total = found.progress["graded"], found.progress["total"]
        typer.echo(f"{found.id} {found.status}, {answered} of {total} answered", err=True)


@app.command("list", epilog=examples("vdiff eval list", "vdiff eval list --json | jq '.[].id'"))
def list_evaluations(
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="the newest so many")] = 20,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The newest evaluations."""
    with connected(base_url, api_key) as client:
        found = list(client.list_evaluations(limit=limit))
    if as_json:
        typer.echo(json.dumps([e.raw for e in found]))
        return
    listing = Listing(
        "id", "name", "status", "graded", "configurations", shrink=("name", "configurations")
    )
    for e in found:
        names = ", ".join(c["name"] for c in e.configurations)
        listing.add(
            e.id, e.name, e.status, f"{e.progress['graded']}/{e.progress['total']}", names, status=2
        )
    listing.print("no evaluations")


@app.command(epilog=examples("vdiff eval compare eval_01k.../careful eval_01k.../fast"))
def compare(
    first: Annotated[str, typer.Argument(help="EVALUATION/CONFIGURATION", show_default=False)],
    second: Annotated[str, typer.Argument(help="EVALUATION/CONFIGURATION", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, max=EXACT, help="of the bootstrap")] = 0,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Compare two configurations on the items that both answered: difference with interval,
    McNemar's test, and the difference that so many items could have found.
    """
    sides = []
    for text in (first, second):
        evaluation, _, name = text.partition("/")
        if not name:
            raise ConfigurationError(f"{text!r}: write EVALUATION/CONFIGURATION", param="first")
        sides.append((evaluation, name))
    with connected(base_url, api_key) as client:
        made = client.compare_configurations(sides[0], sides[1], seed=seed)
    if as_json:
        typer.echo(json.dumps(made))
        return
    mcnemar = made["mcnemar"]
    for line in (
        f"{made['items']} items ({made['clusters']} different prompts)",
        f"{sides[0][1]}: {made['first']['score']:.1%}",
        f"{sides[1][1]}: {made['second']['score']:.1%}",
        f"difference: {100 * made['difference']:+.1f} points, 95% {100 * made['low']:+.1f} to {100 * made['high']:+.1f}",
        f"McNemar ({mcnemar['method']}): {mcnemar['only_first']} and {mcnemar['only_second']}, p = {mcnemar['p_value']:.3g}",
        f"detectable with so many items: {100 * made['minimum_detectable_effect']:.1f} points",
    ):
        typer.echo(line)


@app.command(
    epilog=examples(
        "vdiff eval report eval_01k... --open",
        "vdiff eval report eval_01k... --format markdown --output report.md",
    )
)
def report(
    evaluation: EvaluationId,
    format: Annotated[str, typer.Option(help="html, markdown or json")] = "html",
    output: Annotated[
        Path | None,
        typer.Option(help="file to write, - for stdout [default: the id with .html, .md or .json]"),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="show it in a browser")] = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Write the report: one HTML page with plots that needs nothing else, Markdown, or JSON."""
    import webbrowser

    suffixes = {"html": ".html", "markdown": ".md", "json": ".json"}
    if format not in suffixes:
        raise ConfigurationError(f"--format must be one of {', '.join(suffixes)}", param="format")
    to_stdout = output is not None and str(output) == "-"
    if to_stdout and open_it:
        raise ConfigurationError("--open shows a file; --output - writes none", param="--open")
    with connected(base_url, api_key) as client:
        text = client.evaluation_report(evaluation, format)
    if to_stdout:
        typer.echo(text, nl=False)
        return
    path = output or Path(evaluation + suffixes[format])
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}", param="output") from exc
    typer.echo(str(path))
    if open_it and not webbrowser.open(path.resolve().as_uri()):
        typer.echo("no browser to show it in; open the file in one", err=True)


@app.command(epilog=examples("vdiff eval cancel eval_01k..."))
def cancel(
    evaluation: EvaluationId,
    base_url: BaseUrl = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Cancel the unfinished answers; graded ones remain, and `eval run` continues from there."""
    with connected(base_url, api_key) as client:
        found = client.cancel_evaluation(evaluation)
    typer.echo(json.dumps(found.raw) if as_json else f"{found.id} {found.status}")
