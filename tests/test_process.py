import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from koala.errors import KoalaError
from koala.process import guarded, last_line

# A command with a child of its own; both write their process ids down. The first argument: what the parent does then.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open("ids.part", "w").write(f"{os.getpid()} {child.pid}")
os.rename("ids.part", "ids")
exec(sys.argv[1])
"""
STAYS = "time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def family() -> list[int]:
    deadline = time.monotonic() + 20
    while not Path("ids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(number) for number in Path("ids").read_text().split()]


def all_gone(ids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(number) and psutil.Process(number).status() != "zombie" for number in ids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("then", [STAYS, STUBBORN])
def test_the_end_of_the_block_ends_the_family(then: str) -> None:
    with guarded([sys.executable, "-c", FAMILY, then], Path("log")) as process:
        ids = family()
        assert process.poll() is None
        assert {os.getpgid(number) for number in ids} == {os.getpgid(0)}, "no process may leave the group"
        end = time.monotonic()
    assert time.monotonic() - end < 20
    assert all_gone(ids, 0.5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_starter_ends_the_family(number: int) -> None:
    code = f"""
import sys, time
from pathlib import Path
from koala.process import guarded
with guarded([sys.executable, "-c", {FAMILY!r}, {STAYS!r}], Path("log")):
    time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", code])
    ids = family()
    starter.send_signal(number)
    starter.wait()
    assert all_gone(ids)


def test_a_command_that_dies_takes_its_children_along() -> None:
    with guarded(
        [sys.executable, "-c", FAMILY, "time.sleep(0.4); print('worse'); sys.exit(3)"], Path("log")
    ) as process:
        assert process.wait(20) == 3
    assert all_gone(family(), 0.5)
    assert last_line(Path("log")) == "worse"


def test_a_log_cannot_command_the_terminal() -> None:
    Path("log").write_bytes(b"first\n\x1b]0;title\x07boo\xff\n\n")
    assert last_line(Path("log")) == "]0;titleboo\ufffd"


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(KoalaError, match="no command 'marsupial'"), guarded(["marsupial"], Path("log")):
        pass


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_a_log_without_output_is_named(content: bytes | None) -> None:
    if content is not None:
        Path("log").write_bytes(content)
    assert last_line(Path("log")) == "(no output)"
