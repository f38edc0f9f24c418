"""What stands in infra/, by the checkers of its formats: nothing of it is started here."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml
from sqlalchemy import make_url

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "compose.yaml"
MANIFESTS = sorted(set((INFRA / "k8s").glob("*.yaml")) - {INFRA / "k8s/kustomization.yaml"})
SECRET = re.compile("PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING")


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


ALL = [
    pytest.param(one, id=f"{one['kind']}-{one['metadata']['name']}") for file in MANIFESTS for one in documents(file)
]
PODS = [each for each in ALL if "template" in each.values[0].get("spec", {})]


def within(value: Any, name: str) -> Iterator[Any]:
    """All values called `name`, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from within(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from within(inner, name)


def test_the_dockerfile_is_sound_and_ends_as_a_user() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, INFRA / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    users = re.findall(r"^USER (\S+)", (INFRA / "Dockerfile").read_text(), re.M)
    assert users
    assert users[-1] == "1000"  # a number, which Kubernetes can see is not root


@pytest.fixture
def compose(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Have podman-compose resolve variables, merges and profiles. It asks podman for its version, and nothing else."""
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    podman.chmod(0o755)
    command = [Path(sys.executable).with_name("podman-compose"), "-f", COMPOSE, "--profile", "gpu", "config"]

    def resolve(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin", **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return resolve


def test_the_compose_file_keeps_to_the_specification(
    compose: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    resolved = compose(**dict.fromkeys(asked, "value"))
    assert resolved.returncode == 0, resolved.stderr
    services = compose_spec.PyCompose.from_yaml(resolved.stdout).services or {}
    assert {"postgres", "s3", "mlflow", "prefect", "parent", "worker-cpu", "worker-gpu"} <= set(services)


def test_compose_does_not_start_without_a_password(compose: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    refused = compose()
    assert refused.returncode != 0
    assert "set it in infra/.env" in refused.stderr


def test_compose_binds_to_loopback_and_takes_every_password_from_outside() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert [port for ports in within(services, "ports") for port in ports if not port.startswith("127.0.0.1:")] == []
    values = {
        name: value for each in within(services, "environment") for name, value in each.items() if SECRET.search(name)
    }
    assert {"POSTGRES_PASSWORD", "PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"} <= set(values)
    assert {name for name, value in values.items() if not re.fullmatch(r"(koala:)?\$\{\w+:\?[^}]+\}", value)} == set()


def test_compose_gives_a_password_only_to_who_needs_it() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    holders = {name for name, service in services.items() if "PGPASSWORD" in service.get("environment", {})}
    assert holders == {"mlflow", "prefect"}  # no worker, whose jobs would inherit it


def test_the_example_names_what_compose_asks_for_and_git_ignores_the_real_one() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    example = dict(
        line.split("=", 1) for line in (INFRA / ".env.example").read_text().splitlines() if not line.startswith("#")
    )
    assert asked <= set(example)
    assert {name for name in asked if example[name]} == set()
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", "infra/.env"], cwd=ROOT)
    assert ignored.returncode == 0


@pytest.mark.parametrize("file", [COMPOSE, INFRA / "mlflow-auth.ini", *MANIFESTS], ids=lambda file: file.name)
def test_the_driver_of_every_database_is_there_and_no_address_holds_a_password(file: Path) -> None:
    found = re.findall(r"postgresql\S*?://[^\s\"'}]+", file.read_text())
    assert found or file.name not in ("compose.yaml", "mlflow-auth.ini", "mlflow.yaml", "prefect.yaml")
    for address in map(make_url, found):
        assert address.password is None
        assert "+" in address.drivername  # which driver a plain name means differs with SQLAlchemy's version
        address.get_dialect().import_dbapi()


@pytest.mark.parametrize("manifest", ALL)
def test_kubernetes_would_take_the_manifest(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("manifest", PODS)
def test_a_pod_is_not_root_is_limited_and_is_probed(manifest: dict[str, Any]) -> None:
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert container["resources"]["limits"]["memory"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] != "parent":
        assert "livenessProbe" in pod["containers"][0]


@pytest.mark.parametrize("manifest", PODS)
def test_a_pod_takes_secrets_by_reference_and_only_servers_the_databases(manifest: dict[str, Any]) -> None:
    variables = [one for env in within(manifest, "env") for one in env]
    assert [one["name"] for one in variables if SECRET.search(one["name"]) and "secretKeyRef" not in str(one)] == []
    if any(one["name"] == "PGPASSWORD" for one in variables):
        assert manifest["metadata"]["name"] in ("mlflow", "prefect")


def test_the_manifests_refer_to_each_other() -> None:
    kustomization = yaml.safe_load((INFRA / "k8s/kustomization.yaml").read_text())
    assert {file.name for file in MANIFESTS} == set(kustomization["resources"])
    named = [(one["kind"], one["metadata"]["name"]) for file in MANIFESTS for one in documents(file)]
    assert len(named) == len(set(named))
    everything = [one for file in MANIFESTS for one in documents(file)]
    claims = {name for kind, name in named if kind == "PersistentVolumeClaim"}
    assert set(within(everything, "claimName")) == claims
    services = {name for kind, name in named if kind == "Service"}
    text = "".join(file.read_text() for file in [*MANIFESTS, INFRA / "k8s/settings.env", INFRA / "mlflow-auth.ini"])
    assert set(re.findall(r"(?:http://|koala@)([a-z][a-z0-9]*)[:/]", text)) == services
    assert ("NetworkPolicy", "closed") in named
    reached = {
        one["spec"]["podSelector"]["matchLabels"]["app"] for one in everything if one["metadata"]["name"][:3] == "to-"
    }
    assert reached == services
