"""What MLflow keeps of a stage's run."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from koala import tracking
from koala.config import load


def only_run():
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("koala-smoke").experiment_id])
    return client, run


def test_a_stages_run_has_parameters_parent_and_provenance(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.PARENT_RUN, "parent")
    monkeypatch.setenv(tracking.FLOW_RUN, "flow")
    with tracking.stage_run(load(), "distill", "koala-1b") as run:
        run.metrics({"loss": 0.5}, step=3)
    _, found = only_run()
    assert found.info.run_name == "distill@koala-1b" and found.info.status == "FINISHED"
    assert found.data.tags.items() >= {"stage": "distill", "flow_run": "flow", "mlflow.parentRunId": "parent"}.items()
    assert found.data.params["distill.weights.feature"] == "1.0" and found.data.params["rule.mid"] == "keep"
    assert found.data.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (SystemExit, "KILLED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_is_closed_as_it_ended(workspace: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.stage_run(load(), "source"):
        raise error
    assert only_run()[1].info.status == status


def test_cut_work_goes_on_in_its_own_run(workspace: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt), tracking.stage_run(load(), "source", work=work) as run:
            run.metrics({"rows": step}, step=step)
            raise KeyboardInterrupt
    client, found = only_run()
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "rows")] == [1, 2]


def test_no_secret_of_the_environment_is_tracked(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    monkeypatch.setenv("HF_TOKEN", "hidden-value")
    with tracking.stage_run(load(), "source"):
        pass
    _, found = only_run()
    assert "hidden-value" not in str(found.to_dictionary())
