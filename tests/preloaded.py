"""Python without its seconds of imports: each process is forked from one that has imported what koala's processes import.

    with preloaded(folder) as programs:    # a folder with `koala`, `python` and others, and what lies beside this Python

A call has the arguments, environment, working directory, open files and limit on files' sizes of whoever made it, and is a
process of its own. What the caller holds is a small program that passes SIGTERM and SIGINT on, ends as the call ends, and takes
the call with it when it is killed. Whoever looks for processes by their environment finds that program.
How Python, and the command `koala`, start by themselves is tested where the command is.
"""

import ast
import atexit
import contextlib
import multiprocessing
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_CALLER = """#!{python} -SE
import os, sys
name = os.path.basename(sys.argv[0])
if name == "python":
    while sys.argv[1:2] in (["-B"], ["-u"]):
        if sys.argv.pop(1) == "-u":
            os.environ["PYTHONUNBUFFERED"] = "1"
    first, second = [*sys.argv[1:3], "", ""][:2]
    # They look for processes among their own descendants, which a forked process is not.
    own = second == "flows.processes" or second == "dvc" and "repro" in sys.argv
    if own if first == "-m" else first[:1] in ("", "-") and first != "-c":
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import _signal, _socket, array, resource  # without what `signal` and `socket` import, in half the time
files = []
for file in map(int, os.listdir("/proc/self/fd")):
    try:
        os.fstat(file)
    except OSError:
        continue  # the one that listed them
    if file < 3 or os.get_inheritable(file):
        files.append(file)
call = _socket.socket(_socket.AF_UNIX)
call.connect({address!r})
most = resource.getrlimit(resource.RLIMIT_FSIZE)
told = ascii((name, sys.argv[1:], dict(os.environ), os.getcwd(), most, files)).encode()
call.sendmsg([len(told).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", files))])
call.sendall(told)
for file in files:
    if file > 2:
        os.close(file)
pid = int.from_bytes(call.recv(8), "big")
for number in (_signal.SIGTERM, _signal.SIGINT):
    _signal.signal(number, lambda number, _: os.kill(pid, number))
status = int((call.recv(8) or b"-9").decode())
if status < 0:
    if status != -_signal.SIGKILL:
        _signal.signal(-status, _signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""

_BESIDE = Path(sys.executable).parent
_MOST_FILES = 250  # that a message can carry
_PROGRAMS = ("koala", "mlflow", "prefect", "python")


@contextmanager
def preloaded(folder: Path) -> Iterator[Path]:
    """Make `folder` one of programs inside the block. Calls that still run at its end are killed."""
    place = Path(tempfile.mkdtemp(prefix="koala-"))  # a socket's path is short
    address = place / "calls"
    server = subprocess.Popen(
        [sys.executable, __file__, str(address), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for program in _BESIDE.iterdir():
            (folder / program.name).symlink_to(program)
        for name in _PROGRAMS:
            program = folder / name
            program.unlink()
            program.write_text(_CALLER.format(python=sys.executable, address=str(address)))
            program.chmod(0o755)
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        yield folder
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        shutil.rmtree(place)


def _serve(address: str, programs: str) -> None:
    ended, told = os.pipe()  # by each child that ends
    os.set_blocking(told, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(told)
    calls: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as events:
        server.bind(address)
        server.listen(100)
        sys.stdout.write("ready\n")  # calls wait for the imports
        sys.stdout.flush()
        import warm  # noqa: F401

        prefects = [name for name in sys.modules if f"{name}.".startswith("prefect.")]
        events.register(server, selectors.EVENT_READ)
        events.register(ended, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)  # closes with the tests, however those end
        while True:
            for key, _ in events.select():
                if key.fileobj is server:
                    call, _ = server.accept()
                    if (pid := os.fork()) == 0:
                        signal.set_wakeup_fd(-1)
                        for other in (server, events, *calls.values()):
                            other.close()
                        os.close(ended)
                        os.close(told)
                        _answer(call, programs, prefects)
                    calls[pid] = call
                elif key.fileobj is sys.stdin:
                    os.killpg(0, signal.SIGKILL)
                else:
                    os.read(ended, 100)
                    for pid in list(calls):
                        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                            _, status = os.waitpid(pid, 0)
                            with calls.pop(pid) as call:
                                _tell(call, os.waitstatus_to_exitcode(status))


def _tell(call: socket.socket, status: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the caller was killed
        call.sendall(str(status).encode())


def _answer(call: socket.socket, programs: str, prefects: list[str]) -> None:
    """Run one call in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    name, arguments, environment, folder, most = _received(call)
    resource.setrlimit(resource.RLIMIT_FSIZE, most)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.executable = str(Path(programs, "python"))
    multiprocessing.set_executable(sys.executable)
    call.sendall(os.getpid().to_bytes(8, "big"))
    threading.Thread(target=_end_with, args=(call,), daemon=True).start()
    status = 0
    try:
        _run(name, arguments, prefects)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 255)


def _received(call: socket.socket) -> tuple[str, list[str], dict[str, str], str, tuple[int, int]]:
    """What the caller told, with its open files as this process's own, under the same numbers."""
    size, files, _, _ = socket.recv_fds(call, 8, _MOST_FILES)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += call.recv(1 << 20)
    name, arguments, environment, folder, most, numbers = ast.literal_eval(told.decode())
    taken = {call.fileno(), *files} & set(numbers)
    if taken:  # move what is in the way
        high = max(*numbers, *files, call.fileno()) + 1
        moved = []
        for offset, file in enumerate(files):
            os.dup2(file, high + offset)
            os.close(file)
            moved.append(high + offset)
        files = moved
        if call.fileno() in numbers:
            old = call.detach()
            os.dup2(old, high + len(files))
            os.close(old)
            call.__init__(fileno=high + len(files))
            os.set_inheritable(call.fileno(), False)
    for number, file in zip(numbers, files, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "rw"[number > 0], closefd=False) for number in range(3))
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    return name, arguments, environment, folder, most


def _end_with(call: socket.socket) -> None:
    """End this process when its caller is gone."""
    call.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _run(name: str, arguments: list[str], prefects: list[str]) -> None:
    """Do what a fresh Python, or `koala`, does with these arguments."""
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.meta_path.insert(0, _Prefect(prefects))
    if name != "python":
        sys.argv = [sys.executable.removesuffix("python") + name, *arguments]
        runpy.run_path(str(_BESIDE / name), run_name="__main__")
    elif arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        if not hasattr(sys.modules.get(arguments[1]), "__path__"):  # a package runs another module, and keeps its own
            sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *arguments[2:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class _Prefect(MetaPathFinder, Loader):
    """Prefect, loaded but not imported yet: at that moment it reads the process's settings, and sets up its logs."""

    def __init__(self, modules: list[str]) -> None:
        self._loaded = {name: sys.modules.pop(name) for name in modules}

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "prefect" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._spec = self._loaded["prefect"].__spec__
        return self._loaded["prefect"]

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__ = self._spec
        sys.modules |= self._loaded
        from prefect.context import refresh_global_settings_context
        from prefect.logging.configuration import setup_logging

        refresh_global_settings_context()
        setup_logging(incremental=False)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
