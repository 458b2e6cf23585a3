"""Build the documentation as a site, strictly: `make docs-site`, or python scripts/docs_site.py
[FOLDER]

    stage   docs/ as it is, README as the front page, references made from the program, and what
            pages link to beside docs/ (source files, as text), into FOLDER/pages; FOLDER is
            build/docs unless given
    build   zensical, with its checks of pages and anchors
    check   every link, picture and script of the HTML leads to a file that is there; nothing is
            loaded from another host

The pages in the repository stay readable without this: their links are those of files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout wins over an installed vdiff
FRONT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
REST = "*"  # in the navigation: what it does not name
_CODE_BLOCK = re.compile(r"(```.*?```)", re.DOTALL)
_LINK = re.compile(r"(\[[^\]]*\]\()([^)\s]+)(\))")

_FOLDER_IN_NAV = re.compile(r'"([\w-]+)/\*"')


class SiteError(Exception):
    """The site is not as it should be; the text has one line for each fault."""


class Stage:
    """Markdown files with their links turned from the repository's layout to the site's."""

    def __init__(self, root: Path, pages: Path) -> None:
        self._root = root
        self._pages = pages

    def fill(self) -> None:
        shutil.copytree(self._root / "docs", self._pages)
        for page in self._pages.rglob("*.md"):
            name = page.relative_to(self._pages)
            self._write(
                name.as_posix(),
                (self._root / "docs" / name).read_text("utf-8"),
                Path("docs") / name,
            )
        for source, target in FRONT.items():
            self._write(target, (self._root / source).read_text("utf-8"), Path(source))

    def _write(self, name: str, text: str, source: Path) -> None:
        def turned(match: re.Match[str]) -> str:
            return match.group(1) + self._link(match.group(2), name, source) + match.group(3)

        parts = _CODE_BLOCK.split(text)  # code blocks stand at the odd places
        parts[::2] = [_LINK.sub(turned, part) for part in parts[::2]]
        (self._pages / name).write_text("".join(parts), encoding="utf-8")

    def _link(self, link: str, page: str, source: Path) -> str:
        """The link of a page of the repository as the page of the site must have it."""
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return link
        found = Path(os.path.normpath(source.parent / path)).as_posix()
        if (self._root / found / "README.md").is_file():
            found = f"{found}/README.md".removeprefix("./")
        if found in FRONT:
            target = FRONT[found]
        elif found.startswith("docs/") and not (self._root / found).is_dir():
            target = found.removeprefix(
                "docs/"
            )  # a page that is not there is zensical's to name, with its line
        else:
            target = self._source_file(found)
        relative = os.path.relpath(target, os.path.dirname(page) or ".")
        return f"{relative}#{anchor}" if anchor else relative

    def _source_file(self, name: str) -> str:
        """A file of the repository as text of the site, a folder as the list of its files."""
        path = self._root / name
        target = f"source/{name}.txt"
        if path.is_file():
            text = path.read_bytes()
        elif path.is_dir():
            files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if _is_source(p))
            text = "\n".join([f"{name}/", *(f"  {file}" for file in files), ""]).encode()
        else:
            raise SiteError(f"a page links to {name}, which is not there")
        (self._pages / target).parent.mkdir(parents=True, exist_ok=True)
        (self._pages / target).write_bytes(text)
        return target


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


class _Links(HTMLParser):
    """(what loads or leads, where to) of a page, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        for name in ("href", "src"):
            if value := given.get(name):
                loads = tag in ("script", "img", "iframe", "source") or (
                    tag == "link" and given.get("rel") != "canonical"
                )
                self.links.append(("loads" if loads else "leads", value))


def faults(site: Path) -> Iterator[str]:
    """One line for each link that leads nowhere, and each file that would come from another host."""
    pages: dict[Path, _Links] = {}
    for file in site.rglob("*.html"):
        pages[file] = _Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    for file, page in pages.items():
        if file.name == "404.html":  # its links are absolute, as it answers at any path
            continue
        for how, link in page.links:
            parts = urlsplit(link)
            where = file.relative_to(site)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.netloc:
                if how == "loads":
                    yield f"{where} loads {link}"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file():
                yield f"{where}: no such file: {link}"
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield f"{where}: no such anchor: {link}"
        if 'class="mermaid"' in file.read_text(encoding="utf-8"):
            yield f"{file.relative_to(site)}: a mermaid diagram would be drawn by a script from another host"


def navigation(node: object) -> Iterator[str]:
    """The pages that the navigation names."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from navigation(inner)


def _listed(pages: Path, name: str) -> str:
    """The pages of a folder, as TOML: its README first."""
    found = sorted(
        (pages / name).glob("*.md"), key=lambda page: (page.name != "README.md", page.name)
    )
    return ", ".join(json.dumps(page.relative_to(pages).as_posix()) for page in found)


def build(folder: Path, *, root: Path = ROOT) -> Path:
    """Make the site of `root` in `folder`; where it is.

    Raises:
        SiteError: a link leads nowhere, a page is not in the navigation or the other way round,
            zensical has a complaint.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    folder.mkdir(parents=True)
    Stage(root, pages).fill()
    from scripts import docs_reference

    (pages / "reference").mkdir()
    (pages / "reference/http.md").write_text(docs_reference.http_page(), encoding="utf-8")
    (pages / "reference/openapi.json").write_text(
        json.dumps(docs_reference.openapi(), indent=1), encoding="utf-8"
    )
    (pages / "reference/metrics.md").write_text(docs_reference.metrics_page(), encoding="utf-8")
    text = (root / "zensical.toml").read_text("utf-8")
    config = _FOLDER_IN_NAV.sub(lambda match: _listed(pages, match.group(1)), text)
    named = set(navigation(tomllib.loads(config)["project"]["nav"]))
    there = {page.relative_to(pages).as_posix() for page in pages.rglob("*.md")}
    if REST in named:  # the pages that nobody gave a place
        named.remove(REST)
        rest = "".join(f"{json.dumps(name)}, " for name in sorted(there - named))
        config = re.sub(rf"{re.escape(json.dumps(REST))},?", rest, config)
        named |= there
    (folder / "zensical.toml").write_text(config, encoding="utf-8")
    if named != there:
        raise SiteError(
            f"not in zensical.toml's nav: {sorted(there - named)}; there, but no page: {sorted(named - there)}"
        )
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SiteError(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr))
    if found := list(faults((folder / "site").resolve())):
        raise SiteError("\n".join(found))
    return folder / "site"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    try:
        site = build(folder)
    except SiteError as exc:
        print(exc, file=sys.stderr)
        return 1
    print(
        f"{site / 'index.html'}: {sum(1 for _ in site.rglob('*.html'))} pages, every link leads somewhere"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
