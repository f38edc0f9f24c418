"""Deployments: one a student, from one template."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient

from flows import deployments, join
from flows.deployments import TEMPLATE, deploy, expand
from flows.services import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def template() -> dict:
    return yaml.safe_load((ROOT / TEMPLATE).read_text())


def test_no_student_is_named_in_the_template() -> None:
    students = yaml.safe_load((ROOT / "params.yaml").read_text())["students"]
    text = (ROOT / TEMPLATE).read_text()
    assert [student for student in students if student in text] == []


def test_the_template_stands_once_for_each_student_and_retraining_is_off(template: dict) -> None:
    one, two, three, *others = expand(template, ["koala-a", "koala-b", "koala-c"])["deployments"]
    assert [each["name"] for each in others] == ["data", "version"]
    assert [each["name"] for each in (one, two, three)] == ["koala-a", "koala-b", "koala-c"]
    assert [each["parameters"] for each in (one, two)] == [{"student": "koala-a"}, {"student": "koala-b"}]
    assert "release of koala-c" in three["description"]
    assert not any("schedules" in each for each in (one, two, three))  # by itself a schedule would find nothing to do
    assert [each["active"] for each in others[0]["schedules"]] == [False]
    assert [each["enabled"] for each in others[0]["triggers"]] == [False]
    assert deployments.TAG in one["tags"]


def test_other_placeholders_and_other_deployments_stay(template: dict) -> None:
    event = "{{ event.payload.student }}"
    other = {"name": "on-data", "work_pool": {"name": "local"}, "triggers": [{"parameters": {"student": event}}]}
    document = expand({**template, "pull": [], "deployments": [*template["deployments"], other]}, ["koala-a"])
    assert document["deployments"][-1] == other
    assert document["pull"] == []


def test_with_pools_each_has_a_deployment_and_the_flows_use_them(template: dict) -> None:
    one, data, version, cpu, gpu = expand(template, ["koala-a"], ["cpu", "gpu"])["deployments"]
    assert one["parameters"] == {"student": "koala-a", "pools": True}
    assert data["parameters"] == {"pools": True}
    assert "parameters" not in version
    assert [(each["name"], each["work_pool"]["name"]) for each in (cpu, gpu)] == [("cpu", "cpu"), ("gpu", "gpu")]
    clone = cpu["pull"][0]["prefect.deployments.steps.run_shell_script"]["script"]
    assert "\n" not in clone  # Prefect would take each line for a command


@pytest.fixture
def api(client: SyncPrefectClient, project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict]:
    """The deployments that the server has: `distill/X` to the student that it is run for."""
    monkeypatch.setenv("PREFECT_API_URL", str(client.api_url).rstrip("/"))  # for the command that deploys

    def read() -> dict:
        return {one.name: one.parameters.get("student") for one in client.read_deployments()}

    return read


@pytest.mark.usefixtures("forked")
def test_a_row_more_in_params_yaml_is_a_deployment_more_and_a_row_less_one_less(
    api: Callable[[], dict], client: SyncPrefectClient, project: Path
) -> None:
    flow = client.create_flow_from_name("somebody-elses")
    client.create_deployment(flow_id=flow, name="theirs", tags=["theirs"])
    assert deploy() == ["koala-a", "koala-b"]
    assert api().items() >= {"koala-a": "koala-a", "koala-b": "koala-b", "theirs": None}.items()

    (project / "params.yaml").write_text("profile: demo\nstudents: {koala-b: {x: 2}, koala-c: {x: 3}}\n")
    assert deploy() == ["koala-b", "koala-c"]
    assert api().items() >= {"koala-b": "koala-b", "koala-c": "koala-c", "theirs": None}.items()
    assert "koala-a" not in api()
    deployed = client.read_deployment_by_name("distill/koala-c")
    assert deployed.entrypoint == "flows/distill.py:distill"
    assert deployed.global_concurrency_limit
    assert deployed.global_concurrency_limit.limit == 1
    assert deployed.work_pool_name == "local"


@pytest.mark.usefixtures("forked")
def test_a_refusal_of_prefects_is_one_line(
    api: Callable[[], dict], project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "infra").unlink()
    (project / "infra").mkdir()
    broken = {"name": "x", "deployments": [{"name": "y", "entrypoint": "no.py:f", "work_pool": {"name": "local"}}]}
    (project / TEMPLATE).write_text(yaml.safe_dump(broken))
    monkeypatch.setattr("sys.argv", ["flows.deployments"])
    assert deployments.main() == 2
    assert capsys.readouterr().err == "deployments: prefect deploy failed: see .prefect/deploy.log\n"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("command", [["flows.deployments"], ["flows.promote", "koala-a", "--yes"]])
def test_a_server_that_does_not_answer_is_one_line(project: Path, outside: dict[str, str], command: list[str]) -> None:
    environment = {**outside, "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    said = subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env=environment, capture_output=True, text=True, timeout=120
    )
    assert said.returncode == 2, said.stderr
    (line,) = said.stderr.splitlines()
    assert "does not answer (ConnectError): `make serve` starts one" in line


def test_a_repository_without_a_remote_is_one_line(project: Path) -> None:
    with pytest.raises(join.CheckError, match="names no remote of DVC's: `dvc remote add -d NAME URL`"):
        join.remote(project)
