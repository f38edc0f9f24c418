"""SeaweedFS as an S3 server on loopback. Unlike moto it verifies signatures, and keeps what it holds on disk."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranks import free_port

KEY, SECRET = "test", "a-secret"  # as of the other servers


@contextmanager
def seaweed(folder: Path) -> Iterator[tuple[str, int]]:
    """Give host and port of a server that keeps its data in `folder` and knows one key."""
    credentials = {"accessKey": KEY, "secretKey": SECRET}
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    known = {"identities": [{"name": "test", "credentials": [credentials], "actions": everything}]}
    (folder / "s3.json").write_text(json.dumps(known))
    port = free_port()
    # Unlike other parts of SeaweedFS, S3 listens on every interface unless told otherwise.
    command = [Path(sys.executable).with_name("weed"), "-logdir", folder, "server", "-s3", "-dir", folder]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false", "-s3.iam=false"]
    command += [f"-s3.port={port}", f"-s3.port.grpc={free_port()}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    for part in ("master", "volume", "filer"):
        command += [f"-{part}.port={free_port()}", f"-{part}.port.grpc={free_port()}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield "127.0.0.1", port
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
    except urllib.error.HTTPError:
        return True  # it asks for a signature
    except OSError:
        return False
    return True
