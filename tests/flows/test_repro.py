"""One stage as a process: its lines, how it ended, and that nothing of it stays."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.processes import carrying, end, guarded
from flows.repro import Outcome, reproduce
from koala.tracking import FLOW_RUN

ROOT = Path(__file__).parents[2]


def run(stage: str) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    return reproduce(stage, "a-flow-run", "a-parent-run", lines.append), lines


def test_output_comes_line_by_line_with_the_parents_id(project: Path) -> None:
    outcome, lines = run("heat")
    assert outcome == Outcome(0)
    assert "making heat in a-parent-run" in lines
    assert (project / "artifacts/demo/heat/done").exists()


def test_lines_come_while_the_stage_runs(project: Path) -> None:
    (project / "do.py").write_text("import time; time.sleep(1)")
    came: dict[str, float] = {}
    reproduce("heat", "a-flow-run", "a-parent-run", lambda line: came.setdefault(line, time.monotonic()))
    assert time.monotonic() - came["making heat in a-parent-run"] > 0.8


def test_a_stage_that_is_up_to_date_is_not_run(project: Path) -> None:
    run("heat")
    outcome, lines = run("heat")
    assert outcome.status == 0
    assert not any("making" in line for line in lines)


def test_a_bar_is_shown_by_its_last_state(project: Path) -> None:
    (project / "do.py").write_text(r"print('1/3\r2/3\r3/3', flush=True)")
    _, lines = run("heat")
    assert "3/3" in lines
    assert not any("2/3" in line for line in lines)


def test_what_dvc_says_about_git_is_left_out(project: Path) -> None:
    _, lines = run("heat")
    assert not any("git add" in line or "autostage" in line for line in lines)


def test_an_error_that_the_user_can_fix(project: Path) -> None:
    (project / "do.py").write_text("print('koala: no such thing: do this', file=sys.stderr); sys.exit(2)")
    outcome, _ = run("heat")
    assert outcome == Outcome(2, "koala: no such thing: do this")
    assert outcome.fixable
    assert not outcome.stopped


def test_a_crash_says_its_last_line(project: Path) -> None:
    (project / "do.py").write_text("raise ValueError('the oven is cold')")
    outcome, _ = run("heat")
    assert outcome == Outcome(1, "ValueError: the oven is cold")
    assert not outcome.fixable
    assert not outcome.stopped


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 15)", "sys.exit(143)"])
def test_a_stage_that_a_signal_ended(project: Path, how: str) -> None:
    (project / "do.py").write_text(how)
    outcome, _ = run("heat")
    assert outcome.stopped


def test_what_dvc_itself_complains_of(project: Path) -> None:
    outcome, _ = run("evaluate@koala-a")
    assert outcome.complaint.startswith("ERROR: failed to reproduce 'evaluate@koala-a'")
    assert not outcome.stopped
    assert not outcome.fixable


def test_end_asks_first_and_then_kills(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    polite = f"signal.signal(15, lambda *_: (open({str(asked)!r}, 'w'), sys.exit()))"
    deaf = "signal.signal(15, signal.SIG_IGN)"
    for code in (polite, deaf):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import signal, sys, time; {code}; print('ready', flush=True); time.sleep(60)"],
            env={FLOW_RUN: "to-be-ended"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    other = subprocess.Popen(["sleep", "60"], env={FLOW_RUN: "another"})
    try:
        end(FLOW_RUN, "to-be-ended", grace=1)
        assert carrying(FLOW_RUN, "to-be-ended") == []
        assert asked.exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_guard_gives_its_commands_exit_status() -> None:
    for code, status in (("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 128 + 9)):
        command = guarded([sys.executable, "-c", f"import os, sys; {code}"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
            assert process.wait() == status


# Runs a stage, and is killed before that ends.
STARTER = """
import sys
from flows.repro import reproduce
reproduce("heat", "a-flow-run", "a-parent-run", print)
"""


def test_a_stage_does_not_outlive_its_killed_starter(
    start: Callable[..., subprocess.Popen[str]], project: Path, lingering
) -> None:
    starter = start("-c", STARTER)
    lingering.wait()
    family = psutil.Process(starter.pid).children(recursive=True)
    starter.kill()
    lingering.wait_until_gone(10)
    assert lingering.saved
    psutil.wait_procs(family, timeout=10)
    assert [process for process in family if process.is_running()] == []


def test_a_list_of_locks_that_a_kill_tore_is_dropped(project: Path) -> None:
    torn = project / ".dvc/tmp/rwlock"
    torn.write_text("")
    outcome, _ = run("heat")
    assert outcome == Outcome(0)


def test_a_whole_list_of_locks_stays(project: Path) -> None:
    here = {"pid": os.getpid(), "cmd": "dvc repro"}
    (project / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {f"{project}/artifacts/demo/heat": here}}))
    outcome, _ = run("heat")
    assert "is busy" in outcome.complaint
