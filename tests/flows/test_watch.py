"""Retraining: what changed becomes a commit on a branch, and `distill` starts at it once. Real git, Prefect, MLflow and S3."""

import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed

from flows import deployments
from flows import distill as distilling
from flows import watch as module
from flows.branches import fast_forward
from flows.deployments import TEMPLATE, deploy
from flows.distill import distill
from flows.watch import watch
from koala import params as parameters
from koala import tracking
from koala.data import pins
from koala.evaluate.config import EvaluateConfig
from koala.evaluate.prompts import seeded_prompts
from koala.evaluate.values import Values
from koala.provenance import git_commit
from koala.publish.targets.folder import FolderTarget

ROOT = Path(__file__).parents[2]
TEACHER = "1" * 40
TODAY = f"retrain/{datetime.now(UTC):%Y-%m-%d}"


def git(*arguments: str, at: Path | None = None) -> str:
    return subprocess.run(["git", *arguments], cwd=at, check=True, capture_output=True, text=True).stdout.strip()


def rows(*numbers: int) -> str:
    return "url,caption,aesthetic\n" + "".join(f"https://example.com/{each}.jpg,a picture,5\n" for each in numbers)


@pytest.fixture
def checkout(
    project: Path, client: SyncPrefectClient, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A project with koala's own params.yaml, whose students are deployed; its profile `mine` reads the folder `lists`."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "robot")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "robot@example.com")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    (project / "lists").mkdir()
    (project / "lists/a.csv").write_text(rows(1, 2, 3))
    (project / ".gitignore").write_text("/lists\n/list.csv\n")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["profile"] = "mine"
    params["profiles"]["mine"] = {
        **params["profiles"]["smoke"],
        "source": {"kind": "file", "location": "lists", "score_columns": ["aesthetic"]},
    }
    (project / "params.yaml").write_text("# of the team\n" + yaml.safe_dump(params))
    (project / pins.FILE).write_text("{}\n")
    commit("start")
    flow = client.create_flow(distill)
    for student in params["students"]:
        client.create_deployment(flow, name=student, enforce_parameter_schema=False, parameters={"student": student})
    git_commit.cache_clear()
    yield project
    git_commit.cache_clear()


def commit(message: str) -> str:
    git("add", "--all")
    git("commit", "--quiet", f"--message={message}")
    return git("rev-parse", "HEAD")


def change(**sections: Any) -> None:
    """Change the profile, and `watch`, in params.yaml, and commit it."""
    file = Path("params.yaml")
    params = yaml.safe_load(file.read_text())
    params["watch"] = sections.pop("watch", {})
    params["profiles"]["mine"] |= sections
    file.write_text("# of the team\n" + yaml.safe_dump(params))
    commit("changed")


def accept() -> None:
    """Pin the list as it is."""
    assert watch(return_state=True).is_completed()
    git("merge", "--quiet", "--ff-only", TODAY)
    git("branch", "--quiet", "--delete", TODAY)


def branches() -> list[str]:
    return git("for-each-ref", "--format=%(refname:short)", "refs/heads/retrain").splitlines()


@pytest.fixture
def started(client: SyncPrefectClient) -> Callable[[str], list[str]]:
    """The students whose `distill` was started at a commit."""

    def at(commit: str) -> list[str]:
        runs: list[FlowRun] = client.read_flow_runs(limit=200)
        return sorted(run.parameters["student"] for run in runs if run.parameters.get("commit") == commit)

    return at


@pytest.fixture(params=["disk", "s3"])
def put(request: pytest.FixtureRequest, checkout: Path) -> Callable[[str], None]:
    """Put a list in its place, on disk or in a bucket."""
    if request.param == "disk":
        return lambda text: (checkout / "lists/a.csv").write_text(text) and None
    request.getfixturevalue("s3_server")
    bucket = boto3.client("s3")
    bucket.create_bucket(Bucket="lists")
    change(source={"kind": "s3", "location": "s3://lists/a.csv", "score_columns": ["aesthetic"]})
    bucket.put_object(Bucket="lists", Key="a.csv", Body=rows(1, 2, 3).encode())
    return lambda text: bucket.put_object(Bucket="lists", Key="a.csv", Body=text.encode()) and None


def test_new_data_is_a_commit_at_which_every_student_is_started(
    put: Callable[[str], None], started: Callable[[str], list[str]], client: SyncPrefectClient
) -> None:
    accept()
    base = git("rev-parse", "HEAD")
    state = watch(return_state=True)
    assert (state.name, branches()) == ("Unchanged", [])

    put(rows(1, 2, 3, 4))
    Path("stage.py").write_text("raise SystemExit  # half written\n")  # this checkout is not clean
    state = watch(return_state=True)
    assert state.is_completed(), state.message
    assert branches() == [TODAY]
    assert git("diff", "--name-only", base, TODAY).splitlines() == ["source.lock.yaml"]
    assert git("rev-parse", f"{TODAY}^") == base
    assert yaml.safe_load(git("show", f"{TODAY}:source.lock.yaml"))["mine"]["rows"] == 4
    assert "usable rows 3 -> 4" in git("log", "-1", "--format=%B", TODAY)
    assert started(git("rev-parse", TODAY)) == ["koala-1b", "koala-700m"]
    runs = [run for run in client.read_flow_runs(limit=200) if run.parameters.get("commit") == git("rev-parse", TODAY)]
    assert {run.parameters["because"] for run in runs} == {"mine: new data (by hand)"}
    assert pins.read()["mine"].rows == 3
    assert git("rev-parse", "HEAD") == base
    assert len(git("worktree", "list").splitlines()) == 1

    # Until somebody merges the branch, each watch finds the same.
    state = watch(return_state=True)
    assert "known already" in str(state.message)
    assert branches() == [TODAY]
    assert started(git("rev-parse", TODAY)) == ["koala-1b", "koala-700m"]

    put(rows(4, 5))
    assert watch(return_state=True).is_completed()
    assert branches() == [TODAY, f"{TODAY}-2"]
    assert yaml.safe_load(git("show", f"{TODAY}-2:source.lock.yaml"))["mine"]["rows"] == 2


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], State[Any]]], list[State[Any]]]:
    """Runs two watches, neither of which commits before both have seen that there is no branch."""

    def run(start: Callable[[], State[Any]]) -> list[State[Any]]:
        barrier, states = threading.Barrier(2, timeout=60), list[State[Any]]()
        real = module.known

        def seen(key: str, fetch: bool) -> Any:
            found = real(key, fetch)
            barrier.wait()
            return found

        monkeypatch.setattr(module, "known", seen)
        threads = [threading.Thread(target=lambda: states.append(start())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return states

    return run


@pytest.mark.parametrize("pools", [False, True])
def test_two_watches_at_once_start_one_retraining(
    checkout: Path,
    tmp_path: Path,
    together: Callable[[Callable[[], State[Any]]], list[State[Any]]],
    started: Callable[[str], list[str]],
    pools: bool,
) -> None:
    git("clone", "--quiet", "--bare", str(checkout), str(tmp_path / "origin"))
    git("remote", "add", "origin", str(tmp_path / "origin"))
    states = together(lambda: watch(pools=pools, return_state=True))
    assert [state.is_completed() for state in states] == [True, True], [state.message for state in states]
    assert sorted("known already" in str(state.message) for state in states) == [False, True]
    assert branches() == [TODAY]
    at = git("rev-parse", TODAY)
    assert started(at) == ["koala-1b", "koala-700m"]
    pushed = git(
        "for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads/retrain", at=tmp_path / "origin"
    )
    assert pushed == (f"{TODAY} {at}" if pools else "")


def test_with_pools_a_branch_of_another_checkout_is_known(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git("clone", "--quiet", "--bare", str(checkout), str(tmp_path / "origin"))
    other = tmp_path / "other"
    git("clone", "--quiet", str(tmp_path / "origin"), str(other))
    for name in ("lists", "infra"):
        if not (other / name).exists():
            (other / name).symlink_to(checkout / name)
    git("remote", "add", "origin", str(tmp_path / "origin"))
    assert "new data: " in str(watch(pools=True, return_state=True).message)
    at = git("rev-parse", TODAY)
    monkeypatch.chdir(other)
    state = watch(pools=True, return_state=True)
    assert str(state.message).startswith(
        f"known already: mine: new data: {TODAY} ({at[:7]}) retrains koala-1b, koala-700m"
    )


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as nobody:
        for variable in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "EMAIL"):
            nobody.delenv(variable, raising=False)
        for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
            nobody.setenv(variable, "/dev/null")
        for name, value in {"COUNT": "1", "KEY_0": "user.useConfigOnly", "VALUE_0": "true"}.items():
            nobody.setenv(f"GIT_CONFIG_{name}", value)
        state = watch(return_state=True)
    assert state.is_failed()
    assert str(state.message).startswith("git knows no author: set GIT_AUTHOR_NAME")
    state = watch(pools=True, return_state=True)  # there is no origin
    assert state.is_failed()
    assert str(state.message).startswith("git fetch: ")
    (checkout / "lists/a.csv").unlink()
    state = watch(return_state=True)
    assert "holds no table" in str(state.message)
    assert branches() == []
    assert len(git("worktree", "list").splitlines()) == 1


def test_a_student_that_is_not_deployed_is_named_and_started_later(
    checkout: Path, client: SyncPrefectClient, started: Callable[[str], list[str]]
) -> None:
    deployed = client.read_deployment_by_name("distill/koala-700m")
    client.delete_deployment(deployed.id)
    state = watch(return_state=True)
    assert "there is no deployment distill/koala-700m" in str(state.message)
    client.create_deployment(
        deployed.flow_id, name="koala-700m", enforce_parameter_schema=False, parameters={"student": "koala-700m"}
    )
    assert watch(return_state=True).is_completed()
    assert started(git("rev-parse", TODAY)) == ["koala-1b", "koala-700m"]


def test_a_new_commit_of_the_teachers_branch_becomes_its_revision(checkout: Path, as_hub: Callable[..., None]) -> None:
    class Hub(BaseHTTPRequestHandler):
        sha = TEACHER

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            assert self.path == "/api/models/me/sdxl/revision/main"
            content = json.dumps({"id": "me/sdxl", "sha": self.sha}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    as_hub(Hub)
    teacher = {"kind": "hub", "repository": "me/sdxl", "revision": TEACHER}
    change(teacher=teacher, distill=yaml.safe_load((ROOT / "params.yaml").read_text())["profiles"]["sdxl"]["distill"])
    accept()
    Hub.sha = "2" * 40
    assert watch(return_state=True).name == "Unchanged"  # nobody asked for it
    change(watch={"teacher": "main"})
    base = git("rev-parse", "HEAD")
    state = watch(return_state=True)
    assert state.is_completed(), state.message
    text = git("show", f"{TODAY}:params.yaml")
    assert yaml.safe_load(text)["profiles"]["mine"]["teacher"]["revision"] == "2" * 40
    assert text.startswith("# of the team\n")
    assert git("diff", "--numstat", base, TODAY) == "1\t1\tparams.yaml"


def report(kept: int) -> dict[str, Any]:
    return {"samples": 100, "kept": kept, "dropped": {"words": 100 - kept}, "caption_words": {"4": kept}, "values": {}}


def test_the_filters_report_is_compared_with_the_champions(
    checkout: Path, mlflow_store: str, tmp_path: Path, started: Callable[[str], list[str]]
) -> None:
    store = MlflowClient(mlflow_store)
    experiment = store.create_experiment("koala-mine")

    def run(tags: dict[str, str], kept: int | None = None) -> str:
        made = store.create_run(experiment, tags=tags).info.run_id
        if kept is not None:
            (tmp_path / "report.json").write_text(json.dumps(report(kept)))
            store.log_artifact(made, str(tmp_path / "report.json"))
        store.set_terminated(made, "FINISHED")
        return made

    run({"stage": "filter", "data_hash": "kept-1"}, kept=80)
    run({"stage": "encode", "data_hash": "latents-1", "data_hash.kept": "kept-1"})
    trained = run({"stage": "distill"})
    (tmp_path / "card").write_text("a card")
    tracking.StageRun(trained).register(
        "koala-700m", "content", [tmp_path / "card"], {"data_hash.latents": "latents-1"}, "champion"
    )
    accept()
    change(watch={"filter": {"shares": 0.1}})
    assert watch(return_state=True).name == "Unchanged"  # the newest run is the champion's
    run({"stage": "filter", "data_hash": "kept-2"}, kept=75)
    assert watch(return_state=True).name == "Unchanged"  # near enough
    run({"stage": "filter", "data_hash": "kept-3"}, kept=60)
    state = watch(return_state=True)
    assert state.is_completed(), state.message
    assert "kept: 80.0% -> 60.0% of the samples" in git("log", "-1", "--format=%B", TODAY)
    assert git("diff", "--name-only", "HEAD", TODAY) == ""  # it is the data that the last run had
    assert started(git("rev-parse", TODAY)) == ["koala-1b", "koala-700m"]


def test_without_pools_distill_takes_its_checkout_forward(
    project: Path, client: SyncPrefectClient, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setattr(distilling, "RETRY_DELAYS", [0.0])
    base = git("rev-parse", "HEAD")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    git("switch", "--quiet", "--create", "retrain/a")
    (project / "list").write_text("new")
    git("add", "list")
    git(*identity, "commit", "--quiet", "--message=new")
    at = git("rev-parse", "HEAD")
    git("switch", "--quiet", "--detach", base)
    (project / "do.py").write_text("(out / 'list').write_text(Path('list').read_text())\n")
    git_commit.cache_clear()
    state = distill("koala-a", commit=at, return_state=True)
    assert state.is_completed(), state.message
    assert git("rev-parse", "HEAD") == at
    assert (project / "artifacts/demo/release/koala-a/list").read_text() == "new"
    run = client.read_flow_run(state.state_details.flow_run_id)
    assert run.name == f"distill koala-a {at[:7]}: by hand"

    (project / "list").write_text("mine")
    git(*identity, "commit", "--quiet", "--all", "--message=mine")
    ahead = git("rev-parse", "HEAD")
    fast_forward(at)  # it holds the commit
    assert git("rev-parse", "HEAD") == ahead
    git("switch", "--quiet", "--detach", base)
    (project / "recipe").write_text("another way")
    git("add", "recipe")
    git(*identity, "commit", "--quiet", "--message=another way")
    state = distill("koala-a", commit=at, return_state=True)
    assert state.is_failed()
    assert str(state.message).startswith(f"this checkout cannot go on to {at[:7]}: merge it by hand")
    git_commit.cache_clear()


def test_with_pools_the_stages_run_at_the_commit(
    project: Path, client: SyncPrefectClient, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    asked = []
    monkeypatch.setattr(distilling, "run_in_pool", lambda *given, show: asked.append(given) or Completed())
    for name in ("bring_back", "make_artifacts"):
        monkeypatch.setattr(distilling, name, lambda *_, **__: None)
    (project / "stage.py").write_text("# half written\n")
    assert distill("koala-a", pools=True, commit="a" * 40, return_state=True).is_completed()
    assert {at for _, _, _, at in asked} == {"a" * 40}
    assert len(asked) == 4


def test_an_event_starts_it(
    checkout: Path, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api = str(client.api_url).rstrip("/")
    monkeypatch.setenv("PREFECT_API_URL", api)  # for the command that deploys
    template = yaml.safe_load((ROOT / TEMPLATE).read_text())
    (deployment,) = (each for each in template["deployments"] if "watch.py" in each["entrypoint"])
    (trigger,) = deployment["triggers"]
    assert [trigger["enabled"], *(each["active"] for each in deployment["schedules"])] == [False, False]
    trigger["enabled"] = True
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(template))
    monkeypatch.setattr(deployments, "TEMPLATE", tmp_path / "prefect.yaml")
    deploy()
    (schedule,) = client.read_deployment_by_name("watch/data").schedules
    assert (schedule.active, schedule.parameters) == (False, {"because": "schedule"})

    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "koala.data.changed",
        "resource": {"prefect.resource.id": "koala.data"},
        "payload": {"what": "s3://lists/a.csv"},
    }
    request = urllib.request.Request(
        f"{api}/events", json.dumps([event]).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 204
    wanted = DeploymentFilter(name=DeploymentFilterName(any_=["data"]))
    deadline = time.monotonic() + 60
    while not (runs := client.read_flow_runs(deployment_filter=wanted)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [run.parameters for run in runs] == [{"because": "event: s3://lists/a.csv"}]


def test_a_champion_below_its_own_interval_retrains_once(
    checkout: Path, tiny_teacher: Path, tmp_path: Path, started: Callable[[str], list[str]]
) -> None:
    """The release has random weights, which get no attribute right; its metrics.json says that half were."""
    params = parameters.load()
    config = params.config("evaluate")
    assert isinstance(config, EvaluateConfig)
    release = Path(shutil.copytree(tiny_teacher, tmp_path / "release"))
    prompts = seeded_prompts(config.prompts, 2, config.seed)
    pinned = {
        "steps": 1,
        "guidance": 0,
        "count": 2,
        "seed": config.seed,
        "dtype": "float32",
        "metrics": {"attributes": {}},
    }
    scores = {"attributes/all": [0.5, 1.0]}
    (release / "metrics.json").write_text(json.dumps({"pinned": pinned, "intervals": {"after": scores}}))
    Values(prompts, {"after": {"attributes/all": [1.0, 0.0]}}).write(release / "values.parquet")
    target = FolderTarget(path=tmp_path / "shelf")
    target.send(release, "koala-700m")
    accept()
    publish = {**params.recipe.publish.recipe(), "targets": {"folder": {"path": str(target.path)}}}
    publish = {name: publish[name] for name in ("license", "targets", "promote")}
    change(publish=publish)
    assert watch(return_state=True).name == "Unchanged"  # it is not asked for
    change(publish=publish, watch={"champion": {"scores": ["attributes/all"]}})
    for _ in range(2):
        state = watch(return_state=True)
        assert state.is_completed(), state.message
    assert str(state.message).startswith("known already: mine: the champion is below its own interval")
    said = git("log", "-1", "--format=%B", TODAY)
    line = "koala-700m v1 (target folder): attributes/all 0.000, below its interval 0.500 to 1.000"
    assert said.splitlines()[0] == "mine: the champion is below its own interval"
    assert line in said
    assert started(git("rev-parse", TODAY)) == ["koala-1b", "koala-700m"]
