"""MLflow: an experiment a profile, a parent run a flow, a child run a stage.

The store is `sqlite:///mlflow.db` unless MLFLOW_TRACKING_URI names another. A flow passes its run to the stages in
KOALA_PARENT_RUN, and its own id in KOALA_FLOW_RUN. Links lead to http://127.0.0.1:5000 unless KOALA_MLFLOW_UI names another.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from koala.provenance import data_hash, git_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from PIL.Image import Image

    from koala.config import Params

PARENT_RUN = "KOALA_PARENT_RUN"
FLOW_RUN = "KOALA_FLOW_RUN"
UI = "KOALA_MLFLOW_UI"

# MLflow reads it when it is imported, which is later.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_LONGEST_PARAM = 6000  # MLflow's own limit, in characters


class StageRun:
    """What a stage tells MLflow: one run, by its id. Only one process of a distributed stage writes to it."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self._client = _client()

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in values.items()]
        self._client.log_batch(self.id, params=params)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [Metric(name, float(value), now, step) for name, value in values.items()])

    def last_step(self, metric: str) -> int:
        """The last step that `metric` was logged at; -1 where it was not."""
        history = self._client.get_metric_history(self.id, metric)
        return max((point.step for point in history), default=-1)

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in values.items()])

    def image(self, image: "Image", key: str, step: int) -> None:
        self._client.log_image(self.id, image, key=key, step=step, synchronous=True)

    def figure(self, figure: "Figure", name: str) -> None:
        self._client.log_figure(self.id, figure, name)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        (self._client.log_artifacts if path.is_dir() else self._client.log_artifact)(self.id, str(path), folder)


@contextmanager
def stage_run(params: "Params", stage: str, student: str | None = None, work: Path | None = None) -> Iterator[StageRun]:
    """Open a stage's run in the profile's experiment, with its parameters and provenance; close it as it ended.

    work: the stage's resume folder, where it has one. The run's id is kept there, so that work which was cut and goes on
    goes on in the same run and its curves have no seam.
    """
    values = flatten({stage: getattr(params, stage).model_dump()}) if stage in type(params).model_fields else {}
    tags = {"stage": stage, "profile": params.profile}
    if student:
        values |= flatten({"rule": params.student(student).model_dump()})
        tags["student"] = student
    resumed = _kept_run(work)
    name = f"{stage}@{student}" if student else stage
    with _open(f"koala-{params.profile}", name, tags, os.environ.get(PARENT_RUN), resumed) as run:
        if work:
            (work / "run_id").write_text(run.id)
        if not resumed:
            run.params(values)
        yield run


@contextmanager
def flow_run(experiment: str, name: str, flow_run_id: str) -> Iterator[StageRun]:
    """Open a flow's run, the parent of its stages' runs; close it as it ended."""
    with _open(experiment, name, {"flow_run": flow_run_id}, parent=None) as run:
        yield run


@contextmanager
def _open(
    experiment: str, name: str, tags: Mapping[str, str], parent: str | None, resumed: str | None = None
) -> Iterator[StageRun]:
    client = _client()
    tags = {"commit": git_commit() or "unknown", **tags}
    if parent:
        tags["mlflow.parentRunId"] = parent
    if flow_run := os.environ.get(FLOW_RUN):
        tags.setdefault("flow_run", flow_run)
    if resumed:
        run_id = resumed
        client.update_run(run_id, status="RUNNING")
        for tag, value in tags.items():
            client.set_tag(run_id, tag, value)
    else:
        run_id = client.create_run(_experiment(client, experiment), tags=tags, run_name=name).info.run_id
    status = "KILLED"
    try:
        yield StageRun(run_id)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run_id, status)


def _client() -> "MlflowClient":
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


def _experiment(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        # The kind keeps MLflow's UI from taking the experiment for one of language models.
        return client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"})
    except MlflowException:
        # Another stage made it just now, or it cannot be made: then this fails with the reason.
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _kept_run(work: Path | None) -> str | None:
    """The run that earlier, unfinished work in this folder was tracked by, if MLflow still has it."""
    from mlflow.exceptions import MlflowException

    if not work or not (work / "run_id").is_file():
        return None
    try:
        return _client().get_run((work / "run_id").read_text().strip()).info.run_id
    except MlflowException:
        return None


def close_runs(flow_run_id: str) -> None:
    """Mark as killed what a flow and its stages left open: after a SIGKILL nobody else can."""
    client = _client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    unfinished = f"tags.flow_run = '{flow_run_id}' and attributes.status = 'RUNNING'"
    for run in client.search_runs(experiments, unfinished):
        client.set_terminated(run.info.run_id, "KILLED")


def run_page(run_id: str) -> str:
    """Where MLflow's UI shows a run."""
    return f"{_ui()}/#/experiments/{_client().get_run(run_id).info.experiment_id}/runs/{run_id}"


def artifact_address(run_id: str, name: str) -> str:
    """Where MLflow's UI serves a file that a run logged."""
    return f"{_ui()}/get-artifact?{urlencode({'path': name, 'run_uuid': run_id})}"


def _ui() -> str:
    """MLflow's UI: the one that KOALA_MLFLOW_UI names, the tracking server where there is one, else that of `make serve`."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    return (os.environ.get(UI) or (store if store.startswith("http") else "http://127.0.0.1:5000")).rstrip("/")


def hash_tags(**folders: Path) -> dict[str, str]:
    """Tags `data_hash.<name>` of the folders that a stage read or made."""
    return {f"data_hash.{name}": data_hash(folder) for name, folder in folders.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names: `{"a": {"b": 1}}` gives `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            flat |= flatten(value, full)
        else:
            flat[full] = value
    return flat
