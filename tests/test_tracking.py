"""What MLflow keeps of a run, and what becomes of one whose process was killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from koala import tracking

PARAMS = {"distill": {"weights": {"feature": 1.0}, "steps": 5}}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow store of this test's own."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def client() -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def runs() -> list[Run]:
    """All runs, the first one first."""
    return client().search_runs([client().get_experiment_by_name("koala-smoke").experiment_id], order_by=["start_time"])


@pytest.fixture
def open_run(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[tracking.StageRun]]:
    """Opens a run of one stage in one work folder."""
    work = tmp_path / "work"
    work.mkdir()

    def open_run(params: dict[str, Any] | None = None, **tags: str) -> Any:
        return tracking.stage_run(
            "koala-smoke", "distill@koala-1b", params or PARAMS, {"stage": "distill", **tags}, work
        )

    return open_run


def test_a_stages_run_has_parameters_parent_and_provenance(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.PARENT_RUN, "parent")
    monkeypatch.setenv(tracking.FLOW_RUN, "flow")
    with open_run(**{"data_hash.latents": "abc"}) as run:
        run.metrics({"loss": 0.5}, step=3)
        assert run.last_step("loss") == 3
        assert run.last_step("other") == -1
    (found,) = runs()
    assert found.info.run_id == run.id
    assert found.info.run_name == "distill@koala-1b"
    assert found.info.status == "FINISHED"
    told = {"stage": "distill", "flow_run": "flow", "mlflow.parentRunId": "parent", "data_hash.latents": "abc"}
    assert found.data.tags.items() >= told.items()
    assert found.data.tags["commit"]
    assert found.data.params == {"distill.weights.feature": "1.0", "distill.steps": "5"}
    assert found.data.metrics == {"loss": 0.5}


def test_names_of_columns_may_hold_what_mlflows_names_may_not(open_run) -> None:
    with open_run({"source": {"where": {"größe (px)=1": {"at_least": 2}}}}):
        pass
    (found,) = runs()
    assert found.data.params == {"source.where.größe _px__1.at_least": "2"}


def test_more_parameters_than_mlflow_takes_at_once(open_run) -> None:
    many = {f"p{number}": number for number in range(250)}
    with open_run(many):
        pass
    assert len(runs()[0].data.params) == 250


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_is_closed_as_it_ended(open_run, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), open_run():
        raise error
    assert runs()[0].info.status == status


def test_interrupted_work_resumes_in_its_own_run(open_run) -> None:
    def work(step: int) -> None:
        with open_run() as run:
            run.metrics({"rows": step}, step=step)
            assert runs()[0].info.status == "RUNNING"
            raise KeyboardInterrupt

    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            work(step)
    (found,) = runs()
    assert [metric.step for metric in client().get_metric_history(found.info.run_id, "rows")] == [1, 2]
    assert "continues" not in found.data.tags


def test_a_run_that_finished_is_continued_by_another(open_run) -> None:
    for _ in range(2):
        with open_run():
            pass
    first, second = runs()
    assert (first.info.status, second.info.status) == ("FINISHED", "FINISHED")
    assert second.data.tags["continues"] == first.info.run_id


def test_other_parameters_are_another_run(open_run) -> None:
    with pytest.raises(KeyboardInterrupt), open_run():
        raise KeyboardInterrupt
    with open_run({"distill": {"weights": {"feature": 1.0}, "steps": 6}}):
        pass
    first, second = runs()
    assert (first.info.status, second.info.status) == ("KILLED", "FINISHED")
    assert (first.data.params["distill.steps"], second.data.params["distill.steps"]) == ("5", "6")
    assert second.data.tags["continues"] == first.info.run_id


def test_a_kept_run_that_mlflow_no_longer_has_is_forgotten(open_run) -> None:
    with pytest.raises(KeyboardInterrupt), open_run() as run:
        raise KeyboardInterrupt
    client().delete_run(run.id)
    with open_run() as other:
        pass
    assert other.id != run.id
    assert [found.info.run_id for found in runs()] == [other.id]


# Opens a run, says its id, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from koala import tracking
with tracking.stage_run("koala-smoke", "killed", {"steps": 5}, {}, Path(sys.argv[1])) as run:
    print(run.id, flush=True)
    time.sleep(600)
"""


def test_a_killed_process_leaves_no_run_that_runs(open_run, tmp_path: Path) -> None:
    work = tmp_path / "killed"
    work.mkdir()
    with open_run() as alive:
        with subprocess.Popen([sys.executable, "-c", KILLED, work], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            killed = process.stdout.readline().strip()
            assert client().get_run(killed).info.status == "RUNNING"
            assert client().get_run(alive.id).info.status == "RUNNING"  # another process's opening left it alone
            process.send_signal(signal.SIGKILL)
        with tracking.flow_run("koala-smoke", "any other", "flow"):
            assert client().get_run(killed).info.status == "KILLED"
            assert client().get_run(alive.id).info.status == "RUNNING"
    # Its work resumes in it.
    with tracking.stage_run("koala-smoke", "killed", {"steps": 5}, {}, work) as run:
        assert run.id == killed
        assert client().get_run(killed).data.tags["process.pid"] == str(os.getpid())
    assert client().get_run(killed).info.status == "FINISHED"


def test_which_process_is_gone() -> None:
    ours = tracking.this_process()
    assert not tracking.is_gone(ours)
    assert tracking.is_gone(
        ours | {"process.started": str(float(ours["process.started"]) - 60)}
    )  # the pid is used again
    assert not tracking.is_gone(ours | {"process.host": "another", "process.pid": "1", "process.started": "1"})
    assert not tracking.is_gone({})
    with subprocess.Popen(["sleep", "600"]) as process:
        started = psutil.Process(process.pid).create_time()
        theirs = ours | {"process.pid": str(process.pid), "process.started": str(started)}
        assert not tracking.is_gone(theirs)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, until it is waited for
        assert tracking.is_gone(theirs)
    assert tracking.is_gone(theirs)


def test_a_flow_that_is_over_leaves_no_run_that_runs(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.FLOW_RUN, "flow")
    with open_run():
        tracking.close_runs("another")
        assert runs()[0].info.status == "RUNNING"
        tracking.close_runs("flow")
        assert runs()[0].info.status == "KILLED"


def test_links_open_mlflows_view_for_training(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.UI, "http://box:5000/")
    with open_run() as run:
        pass
    (found,) = runs()
    experiment = client().get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"http://box:5000/#/experiments/{experiment.experiment_id}/runs"
    assert tracking.experiment_page("koala-smoke") == f"{page}?workflowType=machine_learning"
    assert tracking.experiment_page("none yet") == "http://box:5000/#/experiments?workflowType=machine_learning"
    assert tracking.run_page(run.id) == f"{page}/{run.id}?workflowType=machine_learning"
    assert (
        tracking.artifact_address(run.id, "a b.png") == f"http://box:5000/get-artifact?path=a+b.png&run_uuid={run.id}"
    )


def test_the_table_of_runs_shows_chosen_columns(open_run) -> None:
    with open_run() as run:
        tracking.choose_columns(run.id, ["attributes/all"], ["student"])
    view = client().get_experiment_by_name("koala-smoke").tags["mlflow.sharedViewState.koala"]
    assert json.loads(view) == {"selectedColumns": ["metrics.`attributes/all`", "params.`student`"]}
    assert tracking.experiment_page("koala-smoke").endswith(
        "/runs?workflowType=machine_learning&viewStateShareKey=koala"
    )


def test_a_release_is_registered_once_and_its_alias_moves(open_run, tmp_path: Path) -> None:
    card, metrics = tmp_path / "README.md", tmp_path / "metrics.json"
    metrics.write_text("{}")
    for content in ("one", "two", "two"):  # the last is published again
        card.write_text(content)
        with open_run() as run:
            run.register("koala-700m", content, [card, metrics], {"git_commit": "abc"}, "challenger")
            run.register("koala-700m", content, [card, metrics], {"hub.commit": f"of {content}"}, "champion")
    versions = {each.version: each for each in client().search_model_versions("name = 'koala-700m'")}
    assert {version: each.tags for version, each in versions.items()} == {
        1: {"content": "one", "git_commit": "abc", "hub.commit": "of one"},
        2: {"content": "two", "git_commit": "abc", "hub.commit": "of two"},
    }
    aliases = {
        alias: client().get_model_version_by_alias("koala-700m", alias).version for alias in ("challenger", "champion")
    }
    assert aliases == {"challenger": 2, "champion": 2}
    experiment = client().get_experiment_by_name("koala-smoke").experiment_id
    models = client().search_logged_models([experiment], order_by=[{"field_name": "creation_timestamp"}])
    assert [(each.status, each.source_run_id) for each in models] == [("READY", run.info.run_id) for run in runs()[:2]]
    model = models[0]
    assert versions[1].source == f"models:/{model.model_id}"
    files = client().list_logged_model_artifacts(model.model_id)
    assert sorted(file.path for file in files) == ["README.md", "metrics.json"]

    assert tracking.set_alias("koala-700m", "one", "champion") == "1"
    assert client().get_model_version_by_alias("koala-700m", "champion").version == 1
    assert tracking.set_alias("koala-700m", "of nobody", "champion") is None


def test_no_secret_of_the_environment_is_tracked(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    monkeypatch.setenv("HF_TOKEN", "hidden-value")
    with open_run():
        pass
    (found,) = runs()
    assert "hidden-value" not in str(found.to_dictionary())


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", tracking.UI])
def test_links_hold_no_password(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(tracking.UI, raising=False)
    monkeypatch.setenv(variable, "https://ada:s3cr3t@mlflow.example.org/store/")
    address = tracking.artifact_address("r1", "report@1.html")
    assert address == "https://mlflow.example.org/store/get-artifact?path=report%401.html&run_uuid=r1"


def test_what_a_stage_reads_are_data_sets_of_its_run(tmp_path: Path) -> None:
    latents = Path("artifacts/smoke/latents")
    for name, digest in (("one", "a" * 64), ("other", "a" * 64), ("third", "b" * 64)):
        (tmp_path / name).mkdir()
        with tracking.stage_run("koala-smoke", name, PARAMS, {}, tmp_path / name, {latents: digest}):
            pass
    found = [[(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs] for run in runs()]
    assert found == [[("artifacts/smoke/latents", digest * 36)] for digest in "aab"]


def test_a_run_has_curves_of_its_machine_which_resuming_continues(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")

    def points() -> list[int]:
        run = runs()[0].info.run_id
        return [point.step for point in client().get_metric_history(run, "system/system_memory_usage_megabytes")]

    def work(until: int) -> None:
        with open_run():
            deadline = time.monotonic() + 30
            while len(points()) < until:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            raise KeyboardInterrupt

    for until in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            work(until)
    assert len(runs()) == 1
    assert points() == list(range(len(points())))


def test_a_machine_can_be_left_unwatched(open_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with open_run():
        time.sleep(0.5)
    assert not any(name.startswith("system/") for name in runs()[0].data.metrics)
