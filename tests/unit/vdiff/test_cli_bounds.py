"""Every number that the command line or a setting takes has a lower and an upper bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer.main
from typer.testing import CliRunner

from shared.errors import ConfigurationError
from shared.settings import Settings, load_settings
from vdiff.cli import app

HUGE = (str(10**30), "1e400")


def numbers(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every option and argument that is a number, with the names of its command."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from numbers(inner, (*path, name))
    for parameter in () if hasattr(command, "commands") else command.params:
        if parameter.type_descriptor.annotation in (int, float):
            yield path, parameter


FOUND = list(numbers(typer.main.get_command(app)))


@pytest.mark.parametrize(
    ("path", "option"), FOUND, ids=[" ".join((*p, str(o.name))) for p, o in FOUND]
)
def test_every_option_that_is_a_number_has_bounds(path: tuple[str, ...], option: Any) -> None:
    assert option.min is not None and option.max is not None, path
    for huge in HUGE[:1]:
        if option.min <= float(huge) <= option.max:
            continue
        answer = CliRunner().invoke(app, [*path, option.opts[0], huge])
        assert answer.exit_code == 2, (huge, answer.output)
        assert option.opts[0] in answer.output


def test_there_are_options_to_look_at() -> None:
    assert len(FOUND) > 30


def bounded(name: str) -> bool:
    kinds = {type(part).__name__ for part in Settings.model_fields[name].metadata}
    return bool(kinds & {"Le", "Lt"}) and bool(kinds & {"Ge", "Gt"})


def test_every_setting_that_is_a_number_has_bounds() -> None:
    kinds = {
        name: {f.annotation, *get_args(f.annotation)} for name, f in Settings.model_fields.items()
    }
    names = [name for name, kind in kinds.items() if kind & {int, float} and not kind & {bool, ...}]
    assert len(names) > 30
    assert [name for name in names if not bounded(name)] == []


@pytest.mark.parametrize("value", [*HUGE, "-1", "nan", "inf"])
def test_a_setting_beyond_its_bounds_is_named(value: str) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        load_settings({"VDIFF_LEASE_SECONDS": value})
    assert "VDIFF_LEASE_SECONDS" in wrong.value.message
