"""Deployments: one for each student of DVC's graph, made from the template in infra/prefect.yaml.

    python -m flows.deployments     # `make serve` does it at its start
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

from flows.lost import close_lost_runs
from flows.services import HOME, PREFECT, ServiceError
from flows.stages import PipelineError, students
from koala.console import say, show

TEMPLATE = Path("infra/prefect.yaml")
PLACEHOLDER = "{{ student }}"
TAG = "koala"
"""Tag of the deployments that are this module's own. Others are left alone."""


def expand(template: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a prefect.yaml in which each deployment that says `{{ student }}` stands once for each student."""
    deployments: list[Any] = []
    for deployment in template["deployments"]:
        text = yaml.safe_dump(deployment, sort_keys=False)
        filled = [yaml.safe_load(text.replace(PLACEHOLDER, name)) for name in names]
        deployments += filled if PLACEHOLDER in text else [deployment]
    others = {key: value for key, value in template.items() if key != "definitions"}  # anchors, which YAML has resolved
    return {**others, "deployments": deployments}


def deploy() -> list[str]:
    """Deploy every student, delete the deployments of students that are gone, and return the deployments' names.

    Raises ServiceError where Prefect refuses, PipelineError where there is no graph.
    """
    document = expand(yaml.safe_load(TEMPLATE.read_text()), students())
    names = [str(deployment["name"]) for deployment in document["deployments"]]
    with get_client(sync_client=True) as client:
        for pool in {deployment["work_pool"]["name"] for deployment in document["deployments"]}:
            _ensure_pool(client, pool)
        _run_prefect_deploy(document)
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
        for deployment in client.read_deployments(deployment_filter=tagged):
            if deployment.name not in names:
                client.delete_deployment(deployment.id)
    return names


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
    argparse.ArgumentParser(
        prog="python -m flows.deployments", description="Deploy every student to the Prefect server."
    ).parse_args()
    try:
        close_lost_runs("distill")  # of a worker that was killed: they would hold their deployment's turn
        for name in deploy():
            show(f"distill/{name}")
    except (ServiceError, PipelineError) as error:
        say(f"deployments: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
