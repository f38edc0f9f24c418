"""The command `koala` without its seconds of imports: each call is forked from a process that has imported everything.

    with preloaded(folder) as commands:    # a folder with a program `koala`, to be first in PATH

A call has the arguments, environment, working directory and standard streams of whoever made it, and is a process of its own.
How the command starts by itself is tested where the command is.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CALLER = """#!{python} -SE
import array, json, os, signal, socket, sys
call = socket.socket(socket.AF_UNIX)
call.connect({address!r})
told = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
call.sendmsg([len(told).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
call.sendall(told)
pid = int.from_bytes(call.recv(8), "big")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(pid, number))
sys.exit(int((call.recv(8) or b"1").decode()))
"""

_IMPORTED = (
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "koala.data.download",
    "koala.data.encode",
    "koala.data.filter",
    "koala.data.source",
    "koala.distill.distill",
    "koala.evaluate.evaluate",
    "koala.evaluate.reference",
    "koala.publish.publish",
    "koala.runner",
    "koala.teacher.tiny",
    "koala.unet.student",
    "matplotlib.figure",
    "mlflow.store.tracking.sqlalchemy_store",
)


@contextmanager
def preloaded(folder: Path) -> Iterator[Path]:
    """Give a folder with the program `koala` inside the block. Calls that still run at its end are killed."""
    place = Path(tempfile.mkdtemp(prefix="koala-"))  # a socket's path is short
    address = place / "calls"
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        program = folder / "koala"
        program.write_text(_CALLER.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        yield folder
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(place)


def _serve(address: str) -> None:
    from koala.cli import QUIET

    os.environ |= QUIET
    for module in _IMPORTED:
        __import__(module)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a call but its caller
        while True:
            call, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(call)
            call.close()


def _answer(call: socket.socket) -> None:
    """Run one call in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(call, 8, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += call.recv(1 << 20)
    arguments, environment, folder = json.loads(told)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "rw"[number > 0]) for number in range(3))
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.argv = ["koala", *arguments]
    call.sendall(os.getpid().to_bytes(8, "big"))
    status = 0
    try:
        from koala.cli import main

        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    call.sendall(str(status).encode())
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
