"""Several machines, played by clones on one: a real S3 server, a real Prefect server, workers as processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import boto3
import pytest
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State, StateType
from relay import relay

from flows import distill as module
from flows import pools, repro
from flows.deployments import deploy
from flows.distill import distill
from flows.repro import Outcome, reproduce_in_clone
from flows.stages import PipelineError, all_stages, pipeline
from koala import tracking
from koala.provenance import git_commit

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def shared(project: Path, s3_server: tuple[str, int]) -> Path:
    """A project whose DVC remote is a bucket, committed. `heat` reads what `knead` makes of the file `recipe`, in pool gpu."""
    host, port = s3_server
    boto3.client("s3").create_bucket(Bucket="koala")
    config = project / ".dvc/config"
    remote = f"['remote \"team\"']\n    url = s3://koala/dvc\n    endpointurl = http://{host}:{port}\n"
    config.write_text(config.read_text().replace("[core]", "[core]\n    remote = team", 1) + remote)
    document = yaml.safe_load((project / "dvc.yaml").read_text())
    document["stages"]["knead"] |= {"deps": ["recipe"]}
    document["stages"]["heat"] |= {"deps": ["artifacts/${profile}/knead"], "meta": {"pool": "gpu"}}
    document["stages"]["evaluate"]["do"]["outs"].append("artifacts/${profile}/evaluation/${key}/done")
    (project / "dvc.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (project / "recipe").write_text("bread")
    (project / "do.py").write_text(
        "if out.name in ('knead', 'heat'):\n"
        "    made_of = Path('recipe' if out.name == 'knead' else 'artifacts/demo/knead/from')\n"
        "    (out / 'from').write_text(made_of.read_text())\n"
        "if Path('dvc.lock').is_file() and 'c0ffee' in Path('dvc.lock').read_text():\n"
        "    print(out.name, 'knows what was made last')\n"
    )
    with (project / ".gitignore").open("a") as ignored:
        ignored.write("/runs\n/artifacts\n/.prefect\n")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message=shared")
    return project


@pytest.fixture
def machine(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Go to a fresh clone on a machine of that name, whose cache is its own."""

    def at(name: str) -> Path:
        folder = tmp_path / name
        (folder / "dvc").mkdir(parents=True)
        (folder / "dvc/config").write_text(f"[cache]\n    dir = {folder}/cache\n")
        monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(folder / "dvc"))
        git(tmp_path, "clone", "--quiet", str(shared), str(folder / "clone"))
        monkeypatch.chdir(folder / "clone")
        return folder / "clone"

    return at


def computed(stage: str) -> list[str]:
    """Run or restore a stage; the stages that were computed for it."""
    lines: list[str] = []
    assert reproduce_in_clone(stage, "a-flow-run", "a-parent-run", lines.append) == Outcome(0), lines
    return [line.split()[1] for line in lines if line.startswith("making ")]


@pytest.mark.usefixtures("forked")
def test_what_one_machine_computed_another_restores(machine: Callable[[str], Path]) -> None:
    one = machine("one")
    assert computed("publish@koala-a") == ["knead", "heat", "koala-a", "koala-a"]
    made = {file.relative_to(one): file.read_bytes() for file in (one / "artifacts").rglob("*") if file.is_file()}
    other = machine("other")
    assert not (other / "dvc.lock").exists()
    assert computed("publish@koala-a") == []
    assert (other / "artifacts/demo/release/koala-a/done").is_file()
    there = {file.relative_to(other): file.read_bytes() for file in (other / "artifacts").rglob("*") if file.is_file()}
    assert there.items() <= made.items()


@pytest.mark.usefixtures("forked")
def test_with_the_lock_of_the_flow_only_what_the_stage_reads_is_fetched(machine: Callable[[str], Path]) -> None:
    one = machine("one")
    computed("evaluate@koala-a")
    other = machine("other")
    shutil.copy(one / "dvc.lock", other)
    assert computed("publish@koala-a") == ["koala-a"]
    assert (other / "artifacts/demo/evaluation/koala-a/metrics.json").is_file()
    assert not (other / "artifacts/demo/knead").exists()


@pytest.mark.usefixtures("forked")
def test_an_old_lock_gives_no_old_data(machine: Callable[[str], Path], shared: Path) -> None:
    """DVC's --single-item would restore the bread, or say that nothing changed."""
    one = machine("one")
    computed("heat")
    old = one / "dvc.lock"
    (shared / "recipe").write_text("cake")
    git(shared, "commit", "--quiet", "--all", "--message=cake")
    other = machine("other")
    shutil.copy(old, other)
    assert computed("heat") == ["knead", "heat"]
    assert (other / "artifacts/demo/heat/from").read_text() == "cake"


@pytest.mark.usefixtures("forked")
def test_a_push_that_fails_fails_the_stage(
    machine: Callable[[str], Path], s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repro, "PUSH_PAUSES", (0.0,))
    folder = machine("one")
    config = folder / ".dvc/config"
    config.write_text(config.read_text().replace("s3://koala/", "s3://no-such-bucket/"))
    outcome = reproduce_in_clone("knead", "a-flow-run", "a-parent-run", lambda _: None)
    assert outcome.status
    assert not outcome.fixable


def test_pools_stand_in_the_graph(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {stage.pool for stage in pipeline("publish@koala-a")} == {"cpu"}
    monkeypatch.chdir(ROOT)
    named = {stage.name.partition("@")[0]: stage.pool for stage in all_stages()}
    gpu = {"score", "recaption", "encode", "reference", "distill", "evaluate"}
    assert {stage for stage, pool in named.items() if pool == "gpu"} == gpu
    assert set(named.values()) == {"cpu", "gpu"}


def test_a_checkout_that_machines_cannot_clone_is_refused(shared: Path) -> None:
    git_commit.cache_clear()
    assert pools.commit() == git(shared, "rev-parse", "HEAD").strip()
    (shared / "recipe").write_text("cake")
    git_commit.cache_clear()
    with pytest.raises(PipelineError, match="commit, and push"):
        pools.commit()
    git(shared, "checkout", "--quiet", "recipe")
    (shared / "dvc.lock").write_text("")
    git(shared, "add", "--force", "dvc.lock")
    git(shared, "commit", "--quiet", "--message=lock")
    git_commit.cache_clear()
    with pytest.raises(PipelineError, match="git rm --cached"):
        pools.commit()
    git_commit.cache_clear()


@pytest.fixture
def joined(
    shared: Path,
    client: SyncPrefectClient,
    mlflow_store: str,
    tmp_path: Path,
    outside: dict[str, str],
    gpu: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Have a machine join: `joined("one", "--pool", "gpu")`."""
    url = str(client.api_url).rstrip("/")
    monkeypatch.setenv("PREFECT_API_URL", url)  # for the command that deploys
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    workers = []

    def run(name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        s3 = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        path = f"{gpu}{os.pathsep}{outside['PATH']}"
        own = {**outside, **s3, "PATH": path, "KOALA_REPOSITORY": str(shared), **environment}
        command = [sys.executable, "-m", "flows.join", "--server", url, "--disk=0.001", "--folder", tmp_path / name]
        with (tmp_path / f"{name}.log").open("wb") as log:
            in_background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command, *arguments]  # as a script starts it
            workers.append(subprocess.Popen(in_background, env=own, stdout=log, stderr=log, cwd=shared))
        return workers[-1]

    yield run
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.wait(60)


def test_a_flow_runs_each_stage_on_a_machine_of_its_pool_once(
    joined: Callable[..., subprocess.Popen[bytes]],
    client: SyncPrefectClient,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(module, "RETRY_DELAYS", [0.0])
    monkeypatch.setattr(pools, "POLL_SECONDS", 0.2)
    assert deploy(pools=True) == ["koala-a", "koala-b"]
    assert client.read_deployment_by_name("distill/koala-a").parameters == {"student": "koala-a", "pools": True}
    joined("gpu", "--pool", "gpu", "--machine", "a-gpu")
    # This checkout has the dvc.lock of an earlier flow, over another recipe.
    outs = [{"path": "artifacts/demo/knead", "md5": f"{'c0ffee':0<32}.dir", "hash": "md5", "size": 5, "nfiles": 1}]
    deps = [{"path": "recipe", "md5": "0" * 32, "hash": "md5", "size": 5}]
    stages = {"knead": {"cmd": "python stage.py artifacts/demo/knead", "deps": deps, "outs": outs}}
    (shared / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    request.getfixturevalue("forked")  # what started by itself once, with one stage of four, starts sooner now
    joined("cpu", "--pool", "cpu", "--machine", "a-cpu")
    git_commit.cache_clear()
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "parent"))
    state = distill("koala-a", pools=True, return_state=True)
    logs = "".join((tmp_path / f"{pool}.log").read_text() for pool in ("cpu", "gpu"))
    assert state.is_completed(), f"{state.message}\n{logs}"
    assert "making knead" in (tmp_path / "cpu.log").read_text()
    assert "knead knows what was made last" in (tmp_path / "cpu.log").read_text()
    assert "making heat" in (tmp_path / "gpu.log").read_text()
    assert logs.count("making ") == 4
    # This checkout has the figures, not the data, and DVC knows all stages.
    assert (shared / "artifacts/demo/evaluation/koala-a/metrics.json").is_file()
    assert not (shared / "artifacts/demo/knead").exists()
    assert {"knead", "heat", "publish@koala-a"} <= set(yaml.safe_load((shared / "dvc.lock").read_text())["stages"])
    deadline = time.monotonic() + 30
    while left := list((tmp_path / "cpu/clones").glob("*/clone")):  # the worker removes it after the run's end
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    git_commit.cache_clear()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("arguments", "environment", "failed"),
    [
        ([], {}, {}),
        (
            ["--disk=1e9"],
            {"MLFLOW_TRACKING_URI": "", "KOALA_REPOSITORY": "https://me:secret@example.org/x", "PATH": "/usr/bin:/bin"},
            {
                "repository": "KOALA_REPOSITORY holds a password",
                "remote": "",
                "MLflow": "MLFLOW_TRACKING_URI is not set",
                "GPU": "nvidia-smi shows no GPU",
                "disk": "--disk",
            },
        ),
        (
            ["--server=http://127.0.0.1:9/api"],
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": "", "KOALA_REPOSITORY": "/nowhere"},
            {
                "server": "http://127.0.0.1:9/api does not answer",
                "repository": "/nowhere cannot be cloned",
                "remote": "",
            },
        ),
    ],
)
def test_what_a_machine_lacks_is_told_in_a_line_each(
    joined: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
    arguments: list[str],
    environment: dict[str, str],
    failed: dict[str, str],
) -> None:
    status = joined("one", "--pool", "gpu", "--check", *arguments, **environment).wait(120)
    log = (tmp_path / "one.log").read_text()
    lines = [line.split(": ", 2)[1:] for line in log.splitlines()]
    assert [name for name, _ in lines] == ["server", "repository", "remote", "MLflow", "GPU", "disk"], log
    told = {name: rest.removeprefix("FAILED: ") for name, rest in lines if rest.startswith("FAILED: ")}
    assert set(told) == set(failed), log
    assert all(part in told[name] for name, part in failed.items()), log
    assert "secret" not in log
    assert status == (2 if failed else 0)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("ends", "expected"), [(["CRASHED", "COMPLETED"], "COMPLETED"), (["CRASHED"] * 3, "CRASHED")])
def test_a_stage_whose_machine_is_lost_starts_again_at_most_twice(
    client: SyncPrefectClient,
    shared: Path,
    mlflow_store: str,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[str],
    expected: str,
) -> None:
    """No machine is there: the test says how each run ended, as the automation would."""
    monkeypatch.setattr(pools, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(pools, "LOST_SECONDS", 0.0)
    monkeypatch.setenv("PREFECT_API_URL", str(client.api_url).rstrip("/"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    deploy(pools=True)
    said: list[str] = []
    statuses = []
    with ThreadPoolExecutor() as threads, tracking.flow_run("koala-demo", "parent", "parent") as parent:
        ended = threads.submit(
            copy_context().run, pools.run_in_pool, "knead", "cpu", parent.id, "a-commit", said.append
        )
        for end in ends:
            while not (found := [run for run in client.read_flow_runs() if run.state_name == "Scheduled"]):
                assert not ended.done(), ended.result()
                time.sleep(0.05)
            with tracking.flow_run("koala-demo", "knead", str(found[0].id)) as run:  # of the machine
                client.set_flow_run_state(found[0].id, State(type=StateType(end)), force=True)
                while len(said) < sum(each == "CRASHED" for each in ends[: len(statuses) + 1]) and not ended.done():
                    time.sleep(0.05)
                statuses.append(MlflowClient(mlflow_store).get_run(run.id).info.status)
        assert ended.result(30).type.value == expected
    assert statuses == ["KILLED" if end == "CRASHED" else "RUNNING" for end in ends]
    assert len(said) == ends[:2].count("CRASHED")


@pytest.mark.team
def test_s3_that_refuses_for_20_seconds_as_a_stage_is_pushed_is_waited_for(
    machine: Callable[[str], Path], shared: Path, s3_server: tuple[str, int]
) -> None:
    """Else the next try, which may be on another machine, would compute the stage again."""
    host, port = s3_server
    with relay(s3_server) as s3:
        config = shared / ".dvc/config"
        config.write_text(config.read_text().replace(f"{host}:{port}", f"127.0.0.1:{s3.port}"))
        git(shared, "commit", "--quiet", "--all", "--message=relay")
        machine("one")
        lines: list[str] = []

        def show(line: str) -> None:
            lines.append(line)
            if line.startswith("making knead"):
                s3.refuse(20)

        assert reproduce_in_clone("knead", "a-flow-run", "a-parent-run", show) == Outcome(0), lines
        assert s3.refused > 0
        machine("two")
        assert computed("knead") == []
        assert Path("artifacts/demo/knead/from").read_text() == "bread"


@pytest.mark.team
@pytest.mark.timeout(900)
def test_two_flows_that_want_the_same_stages_compute_each_once(
    joined: Callable[..., subprocess.Popen[bytes]],
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "POLL_SECONDS", 0.2)
    deploy(pools=True)
    machines = {"one": "cpu", "two": "cpu", "three": "gpu", "four": "gpu"}
    for name, pool in machines.items():
        joined(name, "--pool", pool, "--machine", f"a-{pool}")
    git_commit.cache_clear()
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "parent"))
    with ThreadPoolExecutor() as threads:
        flows = [
            threads.submit(copy_context().run, distill, "koala-a", pools=True, return_state=True) for _ in range(2)
        ]
        states = [flow.result(800) for flow in flows]
    git_commit.cache_clear()
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in machines}
    assert [state.is_completed() for state in states] == [True, True], (states, logs)
    made = [word for log in logs.values() for word in re.findall(r"making (\S+) in", log)]
    assert sorted(made) == ["heat", "knead", "koala-a", "koala-a"]  # evaluate and publish make a folder koala-a each
