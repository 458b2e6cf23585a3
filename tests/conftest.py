"""Servers that tests need: started here on free ports in temporary folders, stopped by process id,
also on failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest

from vdiff.embedded import EmbeddedPostgres, EmbeddedRedis

# No deadline: the machine may be busy. Derandomized: the same examples each time, so that a failure
# is a change's.
hypothesis.settings.register_profile("vdiff", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vdiff")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A fresh cluster with an empty database `vdiff`.

    Not in pytest's own folder: another pytest of the same user makes that one private again when it
    starts, and under root the server is another user.
    """
    with TemporaryDirectory(prefix="vdiff-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = EmbeddedPostgres(Path(folder))
        try:
            yield server.start()
        finally:
            server.stop()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedRedis(Path(tmp_path_factory.mktemp("redis")))
    try:
        yield server.start()
    finally:
        server.stop()
