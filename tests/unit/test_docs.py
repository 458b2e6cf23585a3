"""The documentation is true where a program can tell: links, generated pages, and that everything
public has words.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

from shared import errors
from shared.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
_CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FOLDERS = (
    "api",
    "worker",
    "shared",
    "migrations",
    "vdiff",
    "tests",
    "deploy",
    "docs",
    "benchmarks",
    "scripts",
    "examples",
    ".ci",
)


@cache
def pages() -> list[Path]:
    """Every Markdown file of the repository; not of what is installed or built in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    hidden = {".venv", "node_modules"}  # a checkout without git
    return [p for p in ROOT.rglob("*.md") if not hidden & set(p.relative_to(ROOT).parts)]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    found = re.findall(
        r"^#+ (.+)$", _CODE_BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_there_are_pages() -> None:
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= {p.name for p in pages()}


def test_links_resolve() -> None:
    broken = []
    for page in pages():
        for target in _LINK.findall(_CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (
                anchor and file.suffix == ".md" and anchor not in headings(file)
            ):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_mentioned_files_exist() -> None:
    missing = []
    for page in pages():
        if page.name == "CHANGELOG.md":  # it may speak of what is gone
            continue
        for name in _CODE.findall(page.read_text(encoding="utf-8")):
            is_path = (
                re.fullmatch(r"[\w.\-/]+", name) and name.split("/")[0] in _FOLDERS and "/" in name
            )
            if is_path and not (ROOT / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert missing == []


def test_mentioned_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    mentioned = {
        (page.name, name)
        for page in pages()
        for name in re.findall(
            r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert mentioned and {(page, name) for page, name in mentioned if name not in targets} == set()


def test_mentioned_settings_exist() -> None:
    known = {f"VDIFF_{name.upper()}" for name in Settings.model_fields}
    unknown = {
        (page.name, name)
        for page in pages()
        for name in re.findall(r"\bVDIFF_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8"))
        if name not in known
    }
    assert unknown == set()


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_route_has_words() -> None:
    from api.app import create_app

    app = create_app(
        load_settings({}, database_url="postgresql://nowhere/x", redis_url="redis://nowhere/0")
    )
    page = text("docs/api.md")
    paths = app.openapi()["paths"]
    assert "/v1/jobs" in paths
    missing = [
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if f"`{method.upper()} {path}`" not in page
    ]
    assert missing == []


def test_every_error_code_has_words() -> None:
    def below(kind: type[errors.VDiffError]) -> list[type[errors.VDiffError]]:
        return [kind, *(k for child in kind.__subclasses__() for k in below(child))]

    kinds = below(errors.VDiffError)
    assert [kind.code for kind in kinds if f"`{kind.code}`" not in text("docs/api.md")] == []
    common = [kind.code for kind in kinds if kind.__module__ == errors.__name__]
    assert common and [code for code in common if f"`{code}`" not in text("docs/errors.md")] == []


def test_commands_of_the_pages_exist() -> None:
    """Every `vdiff` line of a block of commands: a command that there is, with options that it has."""
    from tests.unit.test_compose import check_command

    lines = []
    for page in pages():
        for block in re.findall(
            r"^ *```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            joined = block.replace("\\\n", " ")
            lines += [line.split("#")[0].strip() for line in joined.splitlines()]
    commands = [line.removeprefix(".venv/bin/") for line in lines]
    ours = [shlex.split(line) for line in commands if line.startswith("vdiff ")]
    assert len(ours) > 5
    for words in ours:
        check_command([word.partition("=")[0] for word in words])


@pytest.mark.parametrize("where", ["GENERATION_FIELDS", "DIFFUSION_FIELDS", "ALGORITHMS"])
def test_every_request_field_has_words(where: str) -> None:
    from shared import algorithms, diffusion_params, sampling_params

    page = text("docs/api.md")
    names: Collection[str] = {
        "GENERATION_FIELDS": sampling_params.GENERATION_FIELDS,
        "DIFFUSION_FIELDS": diffusion_params.DIFFUSION_FIELDS,
        "ALGORITHMS": algorithms.ALGORITHMS,
    }[where]
    if where == "ALGORITHMS":
        assert [name for name in names if f"`{name}`" not in text("docs/decoding.md")] == []
    assert names and [name for name in names if f"`{name}`" not in page] == []


def test_every_field_of_a_job_has_words() -> None:
    from api.routes.jobs import FIELDS

    page = text("docs/api.md")
    assert [name for name in FIELDS if f"`{name}`" not in page] == []


def test_every_metric_has_words() -> None:
    sources = "".join(text(name) for name in ("shared/metrics.py", "api/routes/metrics.py"))
    names = set(re.findall(r'"(vdiff_\w+)"', sources))
    page = text("docs/api.md")
    assert names and [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_every_package_is_in_the_architecture() -> None:
    page = text("docs/architecture.md")
    tops = ("api", "shared", "worker", "vdiff", "migrations")
    packages = [
        p.parent.relative_to(ROOT) for top in tops for p in (ROOT / top).rglob("__init__.py")
    ]
    names = [
        ".".join(p.parts) for p in packages if "versions" not in p.parts and p.parts[-1] != "tables"
    ]
    assert [name for name in names if f"`{name}`" not in page] == []
