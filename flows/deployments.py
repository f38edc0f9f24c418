"""Deployments: one for each student of DVC's graph, made from the template in infra/prefect.yaml.

    python -m flows.deployments             # `make serve` does it at its start
    python -m flows.deployments --pools     # for several machines: docs/team.md
    prefect deployment run distill/koala-700m --watch

A student that params.yaml gains is deployed by the next call, and the deployment of one that it lost is deleted.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows.lost import close_lost_runs, expect_heartbeats
from flows.server import require_server
from flows.services import HOME, PREFECT, ServiceError
from flows.stage import limit
from flows.stages import PipelineError, all_stages, students
from koala.console import say, show

TEMPLATE = Path("infra/prefect.yaml")
PLACEHOLDER = "{{ student }}"
POOL_PLACEHOLDER = "{{ pool }}"
_TAKE_POOLS = ("flows/distill.py", "flows/watch.py")
TAG = "koala"
"""Tag of the deployments that are this module's own. Others are left alone."""


def expand(template: Mapping[str, Any], names: Sequence[str], pools: Sequence[str] = ()) -> dict[str, Any]:
    """Return a prefect.yaml in which each deployment that says `{{ student }}` stands once for each student.

    One that says `{{ pool }}` stands once for each pool. With pools, the flows that take `pools` use them.
    """
    deployments: list[Any] = []
    for deployment in template["deployments"]:
        text = yaml.safe_dump(deployment, sort_keys=False, width=10_000)  # a wrapped line could part a placeholder
        if POOL_PLACEHOLDER in text:
            deployments += [yaml.safe_load(text.replace(POOL_PLACEHOLDER, pool)) for pool in pools]
        elif PLACEHOLDER in text:
            deployments += [yaml.safe_load(text.replace(PLACEHOLDER, name)) for name in names]
        else:
            deployments.append(deployment)
    for deployment in deployments:
        if pools and deployment["entrypoint"].startswith(_TAKE_POOLS):
            deployment["parameters"] = {**deployment.get("parameters", {}), "pools": True}
    others = {key: value for key, value in template.items() if key != "definitions"}  # anchors, which YAML has resolved
    return {**others, "deployments": deployments}


def deploy(pools: bool = False) -> list[str]:
    """Deploy every student, delete the deployments of students that are gone, and return the students' deployments.

    pools: have the flows start each stage in its pool, by the deployments `stage/POOL`, and runs whose machine is lost marked.
    Raises ServiceError where Prefect refuses, PipelineError where there is no graph.
    """
    stages = all_stages() if pools else []
    named = students()
    document = expand(yaml.safe_load(TEMPLATE.read_text()), named, sorted({stage.pool for stage in stages}))
    names = [str(deployment["name"]) for deployment in document["deployments"]]
    with get_client(sync_client=True) as client:
        for stage in stages:
            client.upsert_global_concurrency_limit_by_name(limit(stage.name), 1)
        for pool in {deployment["work_pool"]["name"] for deployment in document["deployments"]}:
            _ensure_pool(client, pool)
        _run_prefect_deploy(document)
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for deployment in client.read_deployments(deployment_filter=tagged):
            if deployment.name not in names:
                client.delete_deployment(deployment.id)
    if pools:
        expect_heartbeats(["distill", "stage"])
    return [name for name in names if name in named]


def _ensure_pool(client: SyncPrefectClient, name: str) -> None:
    """Create a work pool of local processes if there is none of that name."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))


def _run_prefect_deploy(document: Mapping[str, Any]) -> None:
    HOME.mkdir(exist_ok=True)
    file, log = HOME / "prefect.yaml", HOME / "deploy.log"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    command = [PREFECT, "--no-prompt", "deploy", "--prefect-file", str(file), "--all"]
    with log.open("wb") as output:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        raise ServiceError(f"prefect deploy failed: see {log}")


def main() -> int:
    """Deploy, and name what is deployed. Exit status 2: something must be fixed by the user."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.deployments", description="Deploy every student to the Prefect server."
    )
    parser.add_argument(
        "--pools", action="store_true", help="run each stage on a machine of the pool that dvc.yaml names"
    )
    arguments = parser.parse_args()
    try:
        require_server()
        close_lost_runs("distill")  # of a worker that was killed: they would hold their deployment's turn
        for name in deploy(arguments.pools):
            show(f"distill/{name}")
    except (ServiceError, PipelineError) as error:
        say(f"deployments: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
