"""One stage as a process: its lines, how it ended, and that nothing of it stays."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.processes import carrying, end
from flows.repro import Outcome, reproduce
from koala.tracking import FLOW_RUN


def run(stage: str) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    return reproduce(stage, "a-flow-run", "a-parent-run", lines.append), lines


def test_output_comes_line_by_line_with_the_parents_id(project: Path) -> None:
    outcome, lines = run("heat")
    assert outcome == Outcome(0)
    assert "making heat in a-parent-run" in lines
    assert (project / "artifacts/demo/heat/done").exists()


def test_lines_come_while_the_stage_runs(project: Path) -> None:
    (project / "do.py").write_text("import time; time.sleep(2)")
    came: dict[str, float] = {}
    reproduce("heat", "a-flow-run", "a-parent-run", lambda line: came.setdefault(line, time.monotonic()))
    assert time.monotonic() - came["making heat in a-parent-run"] > 1.5


def test_a_stage_that_is_up_to_date_is_not_run(project: Path) -> None:
    run("heat")
    outcome, lines = run("heat")
    assert outcome.status == 0
    assert not any("making" in line for line in lines)


def test_of_a_bar_only_its_last_state(project: Path) -> None:
    (project / "do.py").write_text(r"print('1/3\r2/3\r3/3', flush=True)")
    _, lines = run("heat")
    assert "3/3" in lines
    assert not any("2/3" in line for line in lines)


def test_what_dvc_says_about_git_is_left_out(project: Path) -> None:
    _, lines = run("heat")
    assert not any("git add" in line or "autostage" in line for line in lines)


def test_an_error_that_the_user_can_mend(project: Path) -> None:
    (project / "do.py").write_text("print('koala: no such thing: do this', file=sys.stderr); sys.exit(2)")
    outcome, _ = run("heat")
    assert outcome == Outcome(2, "koala: no such thing: do this")
    assert outcome.mendable and not outcome.stopped


def test_a_crash_says_its_last_line(project: Path) -> None:
    (project / "do.py").write_text("raise ValueError('the oven is cold')")
    outcome, _ = run("heat")
    assert outcome == Outcome(1, "ValueError: the oven is cold")
    assert not outcome.mendable and not outcome.stopped


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 15)", "sys.exit(143)"])
def test_a_stage_that_a_signal_ended(project: Path, how: str) -> None:
    (project / "do.py").write_text(how)
    outcome, _ = run("heat")
    assert outcome.stopped


def test_what_dvc_itself_complains_of(project: Path) -> None:
    outcome, _ = run("evaluate@koala-a")
    assert outcome.complaint.startswith("ERROR: failed to reproduce 'evaluate@koala-a'")
    assert not outcome.stopped and not outcome.mendable


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
        assert process.stdout and process.stdout.readline() == "ready\n"
    other = subprocess.Popen(["sleep", "60"], env={FLOW_RUN: "another"})
    try:
        end(FLOW_RUN, "to-be-ended", grace=1)
        assert carrying(FLOW_RUN, "to-be-ended") == []
        assert asked.exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
