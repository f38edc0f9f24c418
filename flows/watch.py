"""The flow `watch`: looks whether the data changed, or what else params.yaml watches, and then retrains every student.

    prefect deployment run watch/data          # or its schedule, or an event: docs/team.md

What changed is committed on a branch `retrain/DATE`, made from this checkout's commit in a worktree of its own, and `distill`
starts at that commit. Called again, or twice at once, it starts nothing twice: the branch names its cause, and a run of
`distill` its commit.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as current
from prefect.states import Completed, Failed

from flows.branches import BranchError, Retraining, known, propose, scratch
from flows.services import ServiceError
from flows.stages import PipelineError, students
from flows.why import why
from koala.causes import Cause, find, key_of
from koala.errors import KoalaError


def run_name() -> str:
    """Name the current flow run after what started it."""
    return f"watch: {why(current.get_parameters()['because'])}"


@flow(name="watch", flow_run_name=run_name, persist_result=False)
def watch(because: str = "", pools: bool = False) -> State[Any]:
    """Retrain every student where something changed.

    because: what started this, in words; left out: what Prefect knows of it. It decides nothing.
    pools: push the branch, so that machines of the pools find the commit.
    """
    try:
        with scratch() as tree:
            causes = find(tree)
            if not causes:
                return Completed(name="Unchanged", message="nothing changed: nothing is retrained")
            key = key_of(causes)
            retraining = known(key, fetch=pools)
            if retraining is None:
                lines = [line for cause in causes for line in cause.apply(tree)]
                retraining = propose(tree, _message(causes, lines), key, push=pools)
                for line in lines:
                    get_run_logger().info(line)
        names = students()
        for student in names:
            _start(student, retraining, f"{_subject(causes)} ({why(because)})")
    except (KoalaError, BranchError, PipelineError, ServiceError) as error:
        return Failed(message=str(error))
    said = _subject(causes) if retraining.is_new else f"known already: {_subject(causes)}"
    at = f"{retraining.branch} ({retraining.commit[:7]})"
    return Completed(message=f"{said}: {at} retrains {', '.join(names)}")


def _subject(causes: Sequence[Cause]) -> str:
    return "; ".join(cause.name for cause in causes)


def _message(causes: Sequence[Cause], lines: Sequence[str]) -> str:
    return "\n".join([_subject(causes), "", *lines])


def _start(student: str, retraining: Retraining, because: str) -> None:
    """Start `distill` at the retraining's commit, unless that was done before. Raises ServiceError if it is not deployed."""
    try:
        run_deployment(
            f"distill/{student}",
            parameters={"commit": retraining.commit, "because": because},
            idempotency_key=f"{retraining.commit} {student}",
            timeout=0,
            as_subflow=False,
        )
    except ObjectNotFound:
        raise ServiceError(f"there is no deployment distill/{student}: run `python -m flows.deployments`") from None
