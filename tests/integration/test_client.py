"""The Python client against a real server: what docs/client.md shows, and lost connections."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import vdiff
from tests.integration.conftest import ROOT, Served
from vdiff.client import Client

pytestmark = pytest.mark.integration
BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "client.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_the_page_does_what_it_says(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block, in order, as one program; `print(...)  # text` prints that text."""
    monkeypatch.setenv("VDIFF_BASE_URL", served.url)
    names: dict[str, Any] = {"__name__": "docs"}
    checked = 0
    for block in BLOCKS:
        exec(compile(block, "docs/client.md", "exec"), names)
        wanted = re.findall(r"print\(.*\)  # (.+)$", block, re.MULTILINE)
        said = capsys.readouterr().out.splitlines()
        assert said[: len(wanted)] == wanted, block
        checked += len(wanted)
    assert checked >= 10
    names["client"].close()


class Proxy:
    """A TCP proxy that breaks its connections: the n-th, after so many bytes of the answer; all
    others are whole.
    """

    def __init__(self, port: int, cuts: dict[int, int]) -> None:
        self._target = ("127.0.0.1", port)
        self._cuts = cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._open = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            number = self.connections
            self.connections += 1
            far = socket.create_connection(self._target)
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(
                target=self._pump, args=(far, near, self._cuts.get(number)), daemon=True
            ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        try:
            while piece := source.recv(65536):
                if left is not None and len(piece) >= left:
                    sink.sendall(piece[:left])
                    break
                left = None if left is None else left - len(piece)
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in self._open:
            one.close()


@pytest.fixture
def broken(served: Served) -> Iterator[Proxy]:
    """Answers are lost of the first connection (before a byte), the third and the fourth (in the
    middle).
    """
    proxy = Proxy(served.api.port, {0: 0, 2: 300, 3: 700})
    yield proxy
    proxy.close()


def test_lost_connections_cost_nothing_twice(served: Served, broken: Proxy) -> None:
    with Client(broken.url, model=served.model) as client:
        label = {"test": "lost"}
        job = client.submit(
            "What is 17 + 25?", temperature=0, metadata=label
        )  # its first answer is lost
        assert client.wait(job).text == "42"
    with Client(broken.url) as another:
        events = list(another.stream(job))  # cut, cut, then whole
    assert broken.connections >= 5
    assert [events[0].type, events[-1].type] == ["queued", "done"]
    assert len({(e.id, e.type) for e in events}) == len(events)
    with Client(served.url) as client:
        assert [found.id for found in client.list_jobs(metadata=label)] == [job.id]


async def test_the_async_client_streams(served: Served) -> None:
    async with vdiff.AsyncClient(served.url) as client:
        job = await client.submit("Reverse the words: apple river stone", temperature=0)
        events = [event async for event in client.stream(job)]
        assert events[-1].type == "done" and (await client.get(job)).text == "stone river apple"
        outcomes = await client.map(
            ["What is 1 + 2?", {"prompt": ""}], progress=False, max_tokens=16, temperature=0
        )
        assert (
            outcomes[0].text == "3"
            and outcomes[1].error is not None
            and outcomes[1].error.param == "prompt"
        )
        file = await client.upload(b"{}\n", name="x.jsonl")
        assert b"".join([piece async for piece in client.download(file)]) == b"{}\n"


def test_a_cancelled_job_says_so(served: Served) -> None:
    with Client(served.url) as client:
        job = client.submit(
            "Tell a story", max_tokens=400, diffusion={"algorithm": "random"}, ignore_eos=True
        )
        client.cancel(job)
        over = client.wait(job)
        assert over.status in ("cancelled", "succeeded")
        if over.status == "cancelled":
            with pytest.raises(vdiff.client.JobFailed, match="cancelled"):
                over.require()
            again = client.retry(over)
            assert (again.id, again.life) == (job.id, 2)
            client.cancel(again)
            assert client.wait(again).done
        client.purge(job)
        with pytest.raises(vdiff.client.Gone):
            client.get(job)
