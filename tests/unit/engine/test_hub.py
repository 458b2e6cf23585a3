"""A hub id with a revision, through the real huggingface_hub, against a hub on loopback that speaks
what it asks for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from shared.errors import ConfigurationError
from tests.unit.engine.golden_cases import GOLDEN
from tests.unit.shared.test_bpe_files import parts
from worker.engine import VDiffConfig
from worker.engine.loader import load, resolve_folder

REPOSITORY = "someone/dream"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
LEFT_OUT = {
    "README.md": b"# read",
    "pytorch_model.bin": b"pickle",
    "notes.txt": b"x",
    "modeling_dream.py": b"raise SystemExit",
}


@dataclass
class Hub:
    files: dict[str, dict[str, bytes]]  # of each commit
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body: https://huggingface.co/docs/hub/api, as far as a download goes."""
        api = f"/api/models/{REPOSITORY}/"
        if path.startswith(f"{api}revision/"):
            commit = COMMITS.get(path.removeprefix(f"{api}revision/"))
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "no such revision"}'
            return 200, {}, json.dumps({"id": REPOSITORY, "sha": commit, "siblings": []}).encode()
        if path.startswith(f"{api}tree/"):
            files = self.files[path.removeprefix(f"{api}tree/")]
            listing = [
                {"type": "file", "path": n, "size": len(b), "oid": f"{len(b):040x}"}
                for n, b in files.items()
            ]
            return 200, {}, json.dumps(listing).encode()
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            commit, name = path.removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)
            body = self.files[commit][name]
            return 200, {"ETag": f'"{commit[0]}-{name}"', "X-Repo-Commit": commit}, body
        return 401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "no such repository"}'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    folder = parts(tmp_path / "published")  # Dream's own form: no tokenizer.json
    newer = {p.name: p.read_bytes() for p in folder.iterdir()} | LEFT_OUT
    newer |= {
        n: (GOLDEN / "dream" / n).read_bytes()
        for n in ("config.json", "generation_config.json", "model.safetensors")
    }
    hub = Hub(
        {COMMITS["main"]: {"config.json": b'{"architectures": ["Old"]}'}, COMMITS["v2"]: newer}
    )

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = hub.answer(path)
            if self.command == "GET" and "/resolve/" in path:
                hub.fetched.append(path.rsplit("/", 1)[1])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = respond

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        constants, "ENDPOINT", hub.url
    )  # HF_ENDPOINT and HF_HOME are read when it is first imported
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_loads_at_its_revision_and_only_what_is_needed(hub: Hub) -> None:
    config = VDiffConfig(model=REPOSITORY, revision="v2", device="cpu")
    loaded = load(config)
    assert (loaded.card.name, loaded.card.revision, loaded.card.family) == (
        REPOSITORY,
        "v2",
        "dream",
    )
    assert loaded.tokenizer.encode("Hello, world!") == [39, 322, 75, 78, 11, 264, 283, 75, 67, 0]
    assert sorted(hub.fetched) == sorted(set(hub.files[COMMITS["v2"]]) - set(LEFT_OUT))
    before = list(hub.fetched)
    load(config)
    assert hub.fetched == before  # the second time from the cache
    assert (resolve_folder(REPOSITORY, "v2", code=True) / "modeling_dream.py").is_file()
    assert hub.fetched == [*before, "modeling_dream.py"]


def test_without_a_revision_it_is_main_and_what_is_not_there_is_named(hub: Hub) -> None:
    assert json.loads((resolve_folder(REPOSITORY) / "config.json").read_text()) == {
        "architectures": ["Old"]
    }
    with pytest.raises(ConfigurationError, match=r"someone/dream.*hub says.*404") as wrong:
        resolve_folder(REPOSITORY, "v3")
    assert wrong.value.param == "model"
    with pytest.raises(ConfigurationError, match=r"tokenizer 'someone/else'.*hub says") as wrong:
        resolve_folder("someone/else", param="tokenizer")
    assert wrong.value.param == "tokenizer"
