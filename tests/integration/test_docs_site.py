"""The documentation as a site: each link, anchor and picture leads somewhere, nothing comes from
another host.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from api.app import create_app
from scripts.docs_site import SiteError, build, faults
from shared.settings import load_settings

pytestmark = pytest.mark.integration


def test_the_site_is_whole(tmp_path: Path) -> None:
    site = build(tmp_path / "docs")
    assert list(faults(site)) == []
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "The life of a job" in front
    routes = (site / "reference/http.html").read_text(encoding="utf-8")
    app = create_app(
        load_settings({}, database_url="postgresql://nowhere/x", redis_url="redis://nowhere/0")
    )
    assert [path for path in app.openapi()["paths"] if path not in routes] == []
    assert "vdiff_requests_total" in (site / "reference/metrics.html").read_text(encoding="utf-8")
    assert "def create_app" in (site / "source/api/app.py.txt").read_text(
        encoding="utf-8"
    )  # a link out of docs/


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[a](nowhere.md)", ["page does not exist"]),
        ("[b](api.md#no-such-heading)", ["anchor does not exist"]),
        ("[a](../shared/nothing.py)", ["shared/nothing.py, which is not there"]),
        (
            '<img alt="a" src="https://example.com/a.png"> <img alt="a" src="images/b.png">',
            ["loads https://example.com/a.png", "no such file: images/b.png"],
        ),
    ],
)
def test_a_broken_link_fails_it(tmp_path: Path, broken: str, said: list[str]) -> None:
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "examples").mkdir()
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"):
        (root / name).write_text("# A page\n", encoding="utf-8")
    (root / "docs/api.md").write_text("# API\n\n## Errors\n", encoding="utf-8")
    (root / "docs/operations.md").write_text(
        f"# Operations\n\n## Watch\n\nSee {broken}.\n", encoding="utf-8"
    )
    pages = [
        "index.md",
        "changelog.md",
        "contributing.md",
        "examples.md",
        "api.md",
        "operations.md",
    ]
    named = [*pages, "reference/http.md", "reference/metrics.md"]
    config = f'site_name = "x"\ndocs_dir = "pages"\nuse_directory_urls = false\nnav = {named}\n'
    (root / "zensical.toml").write_text(
        f"[project]\n{config}[project.theme]\nfont = false\n", encoding="utf-8"
    )
    with pytest.raises(SiteError) as caught:
        build(tmp_path / "docs", root=root)
    assert [words for words in said if words not in str(caught.value)] == []


def test_a_page_that_nobody_can_find_fails_it(tmp_path: Path) -> None:
    for name in ("docs", "examples"):
        (tmp_path / "root" / name).mkdir(parents=True)
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "examples/README.md",
        "docs/lost.md",
    ):
        (tmp_path / "root" / name).write_text("# A page\n", encoding="utf-8")
    (tmp_path / "root/zensical.toml").write_text("[project]\nnav = []\n", encoding="utf-8")
    with pytest.raises(SiteError, match=r"lost\.md"):
        build(tmp_path / "docs", root=tmp_path / "root")
