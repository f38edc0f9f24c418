"""The flow `promote`: a version at the targets becomes the one that stands. Rollback is the promotion of an older version.

    prefect deployment run promote/version --param student=koala-700m --param version=v3
    koala release approve koala-700m v3 --because "sharper hands" --by ada      # answers a run that waits

The verdicts of the gate and the version beside the champion are in the run. While it waits for a person, it holds no worker: the
answer, here or in the UI (Resume), starts it again on any worker.
"""

import argparse
import getpass
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, suspend_flow_run
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run as current
from prefect.states import Completed, Failed

from flows.report import artifact_key
from flows.server import require_server
from flows.services import ServiceError
from koala import tracking
from koala.console import say

WAITS_SECONDS = 14 * 24 * 3600
"""A question that nobody answers for so long fails its run."""


class Answer(RunInput):
    """A person's answer: whether the version shall stand."""

    yes: bool
    by: str
    because: str = ""


class CommandError(Exception):
    """A command of koala's that failed. Its text is the line that says why."""


@flow(name="promote", flow_run_name="promote {student} {version}", persist_result=False)
def promote(student: str, version: str) -> State[Any]:
    """Judge a version; make it the latest at every target if the rules, or a person, let it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _koala("release", "judge", student, version, "--out", folder)
            verdict = json.loads(Path(folder, "verdict.json").read_text())
            if current.run_count == 1:  # not again after a person's answer
                _show(student, version, Path(folder))
        by = "the rules"
        if not verdict["automatic"]:
            answer = _ask(student, version, verdict)
            by = f"{answer.by}{': ' if answer.because else ''}{answer.because}"
            if not answer.yes:
                return Completed(
                    name="Declined", message=f"{student} stays {verdict['stands'] or 'unreleased'}, says {by}"
                )
        _koala("release", "rollback", student, version)
    except CommandError as error:
        return Failed(message=str(error))
    was = f", was {verdict['stands']}" if verdict["stands"] else ""
    return Completed(message=f"{student} is {version}{was}: by {by}")


def _ask(student: str, version: str, verdict: dict[str, Any]) -> Answer:
    """Wait, suspended, for a person. The first call ends the process; the run's next one returns the answer."""
    rules = "\n".join(f"- {each}" for each in verdict["rules"]) or "- there is no rule"
    place = f"take the place of {verdict['stands']}" if verdict["stands"] else "be the first that stands"
    text = f"Shall **{student} {version}** {place}? This run's artifacts show it.\n\n{rules}"
    form = Answer.with_initial_data(description=text, yes=False, by="")
    return suspend_flow_run(wait_for_input=form, timeout=WAITS_SECONDS, key="gate")


def _show(student: str, version: str, folder: Path) -> None:
    """Make artifacts of the verdicts and of the images, whose keys stay the same from run to run."""
    create_markdown_artifact(
        key=artifact_key(student, "promotion"),
        description=f"{student} {version} by the rules of the gate, and beside the version that stands",
        markdown=(folder / "verdicts.md").read_text(),
    )
    grid = folder / "beside.png"
    if not grid.is_file():
        return
    with tracking.flow_run("koala-promotions", f"promote {student} {version}", str(current.get_id())) as run:
        for file in (grid, folder / "verdicts.md", folder / "verdict.json"):
            run.artifact(file)
    create_image_artifact(
        key=artifact_key(student, "promotion-grid"),
        description="The same prompts and seeds: the version that stands, and the one to promote",
        image_url=tracking.artifact_address(run.id, grid.name),
    )


def _koala(*arguments: str) -> None:
    """Run a command of koala's in this checkout, its output in the run's log. Raises CommandError."""
    modules = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    command = [str(Path(sys.executable).with_name("koala")), *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": modules}, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    for line in lines:
        get_run_logger().info(line)
    if done.returncode:
        raise CommandError(lines[-1] if lines else f"koala {arguments[0]} ended with status {done.returncode}")


def propose(student: str, experiment: str, parent_run: str) -> str | None:
    """Start the promotion of the candidate that a flow's stage `publish` left, once a version. Return the promotion's name.

    None where the flow left no candidate, or where `promote` is not deployed.
    """
    published = {"mlflow.parentRunId": parent_run, "stage": "publish", "student": student}
    if not (found := tracking.newest_run(experiment, published)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = tracking.fetch(found[0], "receipt.json", Path(folder))
        receipt = json.loads(file.read_text()) if file else {}
    version = next((sent["version"] for sent in receipt.get("targets", ()) if "version" in sent), None)
    if receipt.get("promote") != "ask" or version is None:
        return None
    try:
        run = run_deployment(
            "promote/version",
            parameters={"student": student, "version": version},
            idempotency_key=f"{found[0]} {version}",
            timeout=0,
            as_subflow=False,
        )
    except ObjectNotFound:
        return None
    assert isinstance(run, FlowRun)  # not a coroutine: this is no async function
    return run.name


def answer(student: str, yes: bool, by: str, because: str, version: str | None = None) -> list[str]:
    """Answer all runs that wait to promote a version of `student`, or this one alone. Return their names."""
    waiting = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
    named = FlowFilter(name=FlowFilterName(any_=[promote.name]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_filter=named, flow_run_filter=waiting)
    mine = [run for run in runs if run.parameters.get("student") == student]
    mine = [run for run in mine if version in (None, run.parameters.get("version"))]
    for run in mine:
        resume_flow_run(run.id, run_input={"yes": yes, "by": by, "because": because})
    return [run.name for run in mine]


def main() -> int:
    """Answer the runs that wait. Exit status 2: none does."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote", description="Answer a promotion that waits for a person."
    )
    parser.add_argument("student", metavar="STUDENT")
    parser.add_argument("--version", metavar="VERSION", help="such as v3; left out: all that wait")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--yes", action="store_true", help="let the version stand")
    choice.add_argument("--no", action="store_true", help="leave the one that stands")
    parser.add_argument("--because", default="", help="why")
    parser.add_argument("--by", help="who says so; left out: the account's name")
    arguments = parser.parse_args()
    try:
        by = arguments.by or getpass.getuser()
    except (KeyError, OSError):  # a container's user may have none
        say("promote: this account has no name: give yours, `--by NAME`")
        return 2
    try:
        require_server()
        answered = answer(arguments.student, arguments.yes, by, arguments.because, arguments.version)
    except ServiceError as error:
        say(f"promote: {error}")
        return 2
    for name in answered:
        say(f"promote: answered: {name}")
    if not answered:
        what = f"{arguments.student} {arguments.version or ''}".rstrip()
        say(f"promote: no promotion of {what} waits: prefect deployment run promote/version starts one")
    return 0 if answered else 2


if __name__ == "__main__":
    sys.exit(main())
