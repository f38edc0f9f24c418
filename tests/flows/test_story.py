"""A team's four days at profile `smoke`: training, new data, a refused candidate, a rollback. docs/story.md tells them.

Prefect, S3 and MLflow are servers on loopback; a machine is a worker in a folder of its own. Minutes: `make test-team` runs it.
"""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun

from koala.demo import shapes
from koala.demo.server import ShapesServer
from koala.provenance import git_commit

pytestmark = [pytest.mark.team, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
STUDENT = "koala-700m"
SERIES = 1
LIST = "s3://koala/lists/pictures.csv"
LARGEST = 3_000_000  # parameters that a student may have; koala-700m at this size has 2,776,836

# How often a stage is computed in the four days. What did not change is restored: the teacher stands since day 1, and on day 3
# all that comes before the student.
ANNA = {"source": 2, "download": 2, "filter": 2, "teacher": 1, "student": 2, "publish": 3}
OTTO = {"score": 2, "recaption": 2, "encode": 2, "reference": 1, "distill": 3, "evaluate": 3}
CHECKOUT = (
    "koala",
    "flows",
    "infra",
    ".dvcignore",
    ".gitignore",
    "approvals.yaml",
    "dvc.yaml",
    "forget.yaml",
    "params.yaml",
    "prefect.toml",
)


class Team:
    """The parent's checkout, and who works there: what is typed and printed is kept in the file `story`."""

    def __init__(self, checkout: Path, environment: dict[str, str], story: Path) -> None:
        self.checkout = checkout
        self.environment = environment
        self._story = story

    def note(self, text: str) -> None:
        """Keep a line between commands."""
        with self._story.open("a") as story:
            story.write(f"{text}\n")

    def types(self, *command: str, status: int = 0) -> str:
        """Run a command in the checkout; return what it printed."""
        begun = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        self.note(f"$ {shlex.join(command)}\n{done.stdout}[{time.monotonic() - begun:.0f} s]")
        assert done.returncode == status, done.stdout
        return done.stdout

    def commits(self, message: str) -> str:
        """Commit what changed, and push it."""
        self.types("git", "commit", "--quiet", "--all", f"--message={message}")
        self.types("git", "push", "--quiet", "origin", "HEAD:main")
        return self.types("git", "rev-parse", "HEAD").strip()

    def changes(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change params.yaml."""
        file = self.checkout / "params.yaml"
        document = yaml.safe_load(file.read_text())
        change(document)
        file.write_text(yaml.safe_dump(document, sort_keys=False))


def pictures(url: str, count: int) -> bytes:
    """A list of that many pictures of the shapes server."""
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["url", "caption", "aesthetic"])
    for index in range(count):
        caption = shapes.caption(shapes.sample_scene(SERIES, index), SERIES, index)
        table.writerow([f"{url}/ok/{index:05d}.jpg", caption, 6])
    return out.getvalue().encode()


def configure(document: dict[str, Any], web: str) -> None:
    """Have profile `smoke` read the list of the web on S3, and release to S3 what a person says yes to."""
    document |= {"profile": "smoke", "students": {STUDENT: document["students"][STUDENT]}}
    cpu = {"launch": "infra/accelerate/cpu.yaml", "micro_batch": 4, "checkpoint_every": 2, "validate_every": 3}
    document["machines"] = {"cpu": {**document["machines"]["cpu"], "distill": cpu}}
    document["machines"]["cpu"]["evaluate"] = {"batch_size": 3, "latency_repeats": 2}
    smoke = document["profiles"]["smoke"]
    smoke["source"] = {"kind": "s3", "location": LIST, "score_columns": ["aesthetic"], "private_hosts": True}
    del smoke["download"]["sidecar"]
    smoke["download"]["allow"] = [web.removeprefix("http://")]
    smoke["publish"] |= {
        "require": [
            {"metric": "attributes/all", "at_least": 0},
            {"metric": "unet_parameters", "at_most": LARGEST},
        ],
        "targets": {"s3": {"location": "s3://koala/releases"}},
        "promote": "ask",
    }
    document["profiles"] = {"smoke": smoke}


def computed(log: str) -> Counter[str]:
    """How often a machine computed each stage."""
    return Counter(re.findall(r"> koala (\w+)", log))


@pytest.fixture
def outside(outside: dict[str, str], programs: Path, tmp_path: Path) -> dict[str, str]:
    """Have every Python that a machine starts forked from one that has imported what it needs: half the time of a stage."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(f"import sys\nsys.executable = {str(programs / 'python')!r}\n")
    return {**outside, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{outside['PYTHONPATH']}"}


@pytest.fixture
def team(project: Path, strict_bucket: Any, prefect: str, outside: dict[str, str], tmp_path: Path) -> Team:
    """This repository as a checkout, pushed to an `origin`; its profile reads a list on S3 and releases to S3."""
    shutil.rmtree(project / ".git")
    for name in CHECKOUT:
        source, target = ROOT / name, project / name
        if target.is_symlink():
            target.unlink()
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (project / "stage.py").unlink()
    config = project / ".dvc/config"
    remote = f"['remote \"team\"']\n    url = s3://koala/dvc\n    endpointurl = {os.environ['AWS_ENDPOINT_URL']}\n"
    config.write_text(config.read_text().replace("[core]", "[core]\n    remote = team", 1) + remote)
    who = {"NAME": "ada", "EMAIL": "ada@example.org"}
    author = {f"GIT_{role}_{name}": value for role in ("AUTHOR", "COMMITTER") for name, value in who.items()}
    aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{outside['PATH']}"
    own = {"PREFECT_API_URL": prefect, "PATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}
    own["DVC_GLOBAL_CONFIG_DIR"] = str(tmp_path / "parent")
    return Team(project, {**outside, **aws, **author, **own}, tmp_path / "story")


@pytest.fixture
def web() -> Iterator[str]:
    """The web, as far as this list goes."""
    with ShapesServer(0, SERIES) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@pytest.fixture
def parent(team: Team, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Start the parent's worker, which runs flows and computes nothing."""
    started = []

    def start() -> None:
        command = ["prefect", "worker", "start", "--pool", "local", "--type", "process", "--limit", "4"]
        with (tmp_path / "parent.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=team.environment, stdout=log, stderr=log, cwd=team.checkout))

    yield start
    for process in started:
        process.terminate()
        process.wait(60)
    git_commit.cache_clear()


def runs_of(deployment: str) -> list[FlowRun]:
    """The runs of a deployment, the newest first."""
    wanted = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    with get_client(sync_client=True) as client:
        return sorted(client.read_flow_runs(deployment_filter=wanted), key=lambda run: run.created, reverse=True)


def until(deployment: str, state: str, count: int, seconds: float, log: Callable[[], str]) -> FlowRun:
    """Wait until the newest of `count` runs of a deployment is in a state of that name."""
    deadline = time.monotonic() + seconds
    while len(runs := runs_of(deployment)) < count or runs[0].state_name != state:
        assert time.monotonic() < deadline, f"{[(run.name, run.state) for run in runs]}\n{log()}"
        assert not runs or len(runs) < count or not runs[0].state.is_failed(), f"{runs[0].state}\n{log()}"
        time.sleep(0.5)
    return runs[0]


def test_four_days(
    team: Team,
    machines: Any,
    parent: Callable[[], None],
    web: str,
    prefect: str,
    strict_bucket: Any,
    tmp_path: Path,
) -> None:
    def logs() -> str:
        return "\n".join(file.read_text()[-5000:] for file in sorted(tmp_path.glob("*.log")))

    def approves(version: str, because: str, count: int) -> None:
        """Answer the promotion that waits, and wait until it is done."""
        until("version", "Suspended", count, 200, logs)
        team.types("koala", "release", "approve", STUDENT, version, "--because", because, "--by", "ada")
        done = until("version", "Completed", count, 200, logs)
        team.note(f"{done.name}: {done.state.message}")

    def stands(version: str) -> None:
        """The target gives this version to whoever asks for the latest, and `koala release list` says so."""
        latest = strict_bucket.get_object(Bucket="koala", Key=f"releases/{STUDENT}/latest.json")["Body"].read()
        assert json.loads(latest)["version"] == version
        lines = team.types("koala", "release", "list", STUDENT).splitlines()
        assert [line.split()[2] for line in lines if line.endswith("latest")] == [version]

    # Day 1: two machines train.
    team.note("## Day 1")
    strict_bucket.put_object(Bucket="koala", Key="lists/pictures.csv", Body=pictures(web, 120))
    team.changes(lambda document: configure(document, web))
    (team.checkout / "source.lock.yaml").write_text("{}\n")
    template = team.checkout / "infra/prefect.yaml"
    template.write_text(template.read_text().replace("        enabled: false\n", "        enabled: true\n"))
    for command in (
        ("git", "init", "--quiet", "--initial-branch=main"),
        ("git", "add", "--all"),
        ("git", "commit", "--quiet", "--message=start"),
        ("git", "init", "--quiet", "--bare", str(tmp_path / "origin")),
        ("git", "remote", "add", "origin", str(tmp_path / "origin")),
        ("git", "--git-dir", str(tmp_path / "origin"), "symbolic-ref", "HEAD", "refs/heads/main"),
    ):
        team.types(*command)
    team.types("koala", "data", "update")
    team.commits("The list of day 1")
    team.types("python", "-m", "flows.deployments", "--pools")
    parent()
    machines.join("anna", "cpu", tmp_path / "origin")
    machines.join("otto", "gpu", tmp_path / "origin")
    team.types("prefect", "deployment", "run", f"distill/{STUDENT}", "--watch")
    approves("v1", "the first", 1)
    stands("v1")

    # Day 2: the list grows.
    team.note("## Day 2")
    strict_bucket.put_object(Bucket="koala", Key="lists/pictures.csv", Body=pictures(web, 150))
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "koala.data.changed",
        "resource": {"prefect.resource.id": "koala.data"},
        "payload": {"what": LIST},
    }
    header = "Content-Type: application/json"
    team.types("curl", "-sS", "--fail", f"{prefect}/events", "--header", header, "--data", json.dumps([event]))
    watched = until("data", "Completed", 1, 200, logs)
    team.note(f"{watched.name}: {watched.state.message}")
    retrained = until(STUDENT, "Completed", 2, 900, logs)
    team.note(f"{retrained.name}: {retrained.state.message}")
    assert "150 of 150 images (100.0%), 120 of the rows taken over" in machines.log("anna")
    assert "120 of the judgements taken over" in machines.log("anna")
    stands("v1")
    approves("v2", "it saw 30 more pictures", 2)
    stands("v2")
    branch = team.types("git", "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain").strip()
    team.types("git", "merge", "--ff-only", branch)
    team.types("git", "push", "--quiet", "origin", "HEAD:main")
    assert "new data" in team.types("git", "log", "-1", "--stat")

    # Day 3: a candidate that is too large.
    team.note("## Day 3")

    def grow(document: dict[str, Any]) -> None:
        document["students"][STUDENT]["unet"] |= {"mid": "keep", "depth": {"DW3": 1, "Mid": 1, "UP1": 1}}

    team.changes(grow)
    team.commits("A deeper student")
    team.types("prefect", "deployment", "run", f"distill/{STUDENT}", "--watch", status=1)
    refused = runs_of(STUDENT)[0]
    team.note(f"{refused.name}: {refused.state_name}: {refused.state.message}")
    assert refused.state.is_failed()
    assert f"unet_parameters at most {LARGEST}" in str(refused.state.message)
    stands("v2")
    assert len(runs_of("version")) == 2

    # Day 4: a rollback.
    team.note("## Day 4")
    team.types(
        "prefect", "deployment", "run", "promote/version", "--param", f"student={STUDENT}", "--param", "version=v1"
    )
    approves("v1", "v2 draws hands with six fingers", 3)
    stands("v1")
    team.types("koala", "release", "show", STUDENT)

    assert computed(machines.log("anna")) == ANNA
    assert computed(machines.log("otto")) == OTTO
