"""MLflow: one experiment a profile, one parent run a flow, one child run a stage.

The store is `sqlite:///mlflow.db` unless MLFLOW_TRACKING_URI names another. A flow passes its run to the stages in
KOALA_PARENT_RUN, and its own id in KOALA_FLOW_RUN. Links lead to http://127.0.0.1:5000 unless KOALA_MLFLOW_UI names another.

A stage's run names the artifacts that it reads as data sets, and has curves of its machine (GPUs too, where nvidia-ml-py is
installed) unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false.

Every run is tagged with the process that carries it. A process that was killed by SIGKILL cannot close its run: the next
process on the same host does.
"""

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import psutil

from koala.config import flatten
from koala.provenance import git_commit
from koala.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from PIL.Image import Image

PARENT_RUN = "KOALA_PARENT_RUN"
"""Environment variable with the id of the flow's MLflow run."""
FLOW_RUN = "KOALA_FLOW_RUN"
"""Environment variable with the id of the flow run in Prefect."""
UI = "KOALA_MLFLOW_UI"
"""Environment variable with the address of MLflow's UI."""
DESCRIPTION = "mlflow.note.content"
"""Tag with Markdown that MLflow's UI shows at the head of a run."""

# MLflow reads them later.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

_CONTENT = "content"  # tag of a registered version: the hash of what it holds
_RUN_ID = "run_id"  # file in a work folder
_NO_NAME = re.compile(r"[^\w\-. :/]")  # what the name of a parameter may not hold
_LONGEST_PARAM = 6000  # MLflow's limit, in characters
_MOST_PARAMS = 100  # MLflow's limit for one request
# MLflow's UI has a view for language models and one for training, and opens the former unless told otherwise.
_TRAINING_VIEW = "workflowType=machine_learning"
_TRAINING_KIND = {"mlflow.experimentKind": "custom_model_development"}
# A view that MLflow's UI keeps in a tag of the experiment, and that an address can name. Seen to work with MLflow 3.17.
_VIEW = "koala"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own switch, which it does not heed for such runs
_LONGEST_DIGEST = 36
# psutil derives a start time from the time of boot, which can move by a second when the clock is set.
_SAME_START_SECONDS = 2.0


class StageRun(Run):
    """One MLflow run, by its id. Only one process of a distributed stage writes to it."""

    def __init__(self, run_id: str) -> None:
        """Write to the run `run_id`, which exists."""
        self.id = run_id
        self._client = _client()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [Metric(name, float(value), now, step) for name, value in values.items()])

    def last_step(self, metric: str) -> int:
        """Return the last step at which `metric` was logged, or -1."""
        history = self._client.get_metric_history(self.id, metric)
        return max((point.step for point in history), default=-1)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in values.items()])

    def image(self, image: "Image", key: str, step: int) -> None:
        """Log an image under a key; images of one key are a series over steps."""
        self._client.log_image(self.id, image, key=key, step=step, synchronous=True)

    def figure(self, figure: "Figure", name: str) -> None:
        """Log a plot as a file called `name`."""
        self._client.log_figure(self.id, figure, name)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or all files of a folder."""
        (self._client.log_artifacts if path.is_dir() else self._client.log_artifact)(self.id, str(path), folder)

    def register(self, model: str, content: str, files: Sequence[Path], tags: Mapping[str, str], alias: str) -> None:
        """Register `files` as a version of `model`, called `alias`; tag it.

        The weights are not among them: tags say where they are. The version with the same `content` is used again.
        """
        version = _registered(self._client, model, content) or self._register(model, content, files)
        for name, value in tags.items():
            self._client.set_model_version_tag(model, version, name, value)
        self._client.set_registered_model_alias(model, alias, version)

    def _register(self, model: str, content: str, files: Sequence[Path]) -> str:
        """Log `files` as a model, and register it. Return its version."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_run(self.id).info.experiment_id
        logged = self._client.create_logged_model(experiment, name=model, source_run_id=self.id)
        for file in files:
            self._client.log_model_artifact(logged.model_id, str(file))
        self._client.finalize_logged_model(logged.model_id, "READY")
        with suppress(
            MlflowException
        ):  # it is there, or it cannot be created: then the next call fails with the reason
            self._client.create_registered_model(model)
        made = self._client.create_model_version(
            model,
            source=f"models:/{logged.model_id}",
            run_id=self.id,
            tags={_CONTENT: content},
            model_id=logged.model_id,
        )
        return str(made.version)


@contextmanager
def stage_run(
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    work: Path,
    inputs: Mapping[Path, str] | None = None,
) -> Iterator[StageRun]:
    """Open a stage's run, a child of the flow's run if a flow started it; close it as the block ended.

    params: nested mappings are flattened, `{"distill": {"steps": 5}}` to `distill.steps`.
    work: the stage's folder of unfinished work. It keeps the run's id, so that interrupted work resumes in the same run
        and its curves have no seam. A run that finished, or that logged other params, is not reopened: the new run names it
        in its tag `continues`.
    inputs: the content hash of each artifact that the stage reads, by its folder.
    """
    values = _as_logged(params)
    kept = _kept_run(work)
    resumes = kept and kept.info.status != "FINISHED" and kept.data.params == values
    all_tags = {**tags}
    if parent := os.environ.get(PARENT_RUN):
        all_tags["mlflow.parentRunId"] = parent
    if flow_run := os.environ.get(FLOW_RUN):
        all_tags["flow_run"] = flow_run
    if kept and not resumes:
        all_tags["continues"] = kept.info.run_id
    with _open(experiment, name, values, all_tags, kept.info.run_id if resumes else None) as run:
        partial = work / f"{_RUN_ID}.partial"
        partial.write_text(run.id)
        partial.replace(work / _RUN_ID)
        _log_inputs(run.id, inputs or {})
        with _machine_watched(run.id):
            yield run


def _log_inputs(run_id: str, inputs: Mapping[Path, str]) -> None:
    """Log artifacts as data sets of a run. MLflow knows a data set by its name and digest: one that is there stays one."""
    from mlflow.entities import Dataset, DatasetInput

    if inputs:
        datasets = [
            Dataset(folder.as_posix(), digest[:_LONGEST_DIGEST], "local", json.dumps({"uri": folder.as_posix()}))
            for folder, digest in inputs.items()
        ]
        _client().log_inputs(run_id, [DatasetInput(dataset, tags=[]) for dataset in datasets])


@contextmanager
def _machine_watched(run_id: str) -> Iterator[None]:
    """Log curves of this machine to a run inside the block: processors, memory, disk, network, NVIDIA's GPUs."""
    if os.environ.get(_SYSTEM_METRICS, "true").lower() in ("false", "0"):
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=_store())
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@contextmanager
def flow_run(
    experiment: str,
    name: str,
    flow_run_id: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[StageRun]:
    """Open a flow's run, the parent of its stages' runs; close it as the block ended."""
    with _open(experiment, name, _as_logged(params or {}), {"flow_run": flow_run_id, **(tags or {})}) as run:
        yield run


@contextmanager
def _open(
    experiment: str, name: str, params: Mapping[str, str], tags: Mapping[str, str], resumed: str | None = None
) -> Iterator[StageRun]:
    client = _client()
    close_lost_runs()
    tags = {"commit": git_commit() or "unknown", **this_process(), **tags}
    if resumed:
        run = StageRun(resumed)
        run.tags(tags)  # before the status: a run that counts as running names its process
        client.update_run(run.id, status="RUNNING")
    else:
        run = StageRun(client.create_run(_experiment(client, experiment), tags=tags, run_name=name).info.run_id)
        _log_params(client, run.id, params)
    status = "KILLED"
    try:
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run.id, status)


def set_alias(model: str, content: str, alias: str) -> str | None:
    """Let `alias` name the version of `model` with this content. Return the version; None where none is registered."""
    client = _client()
    version = _registered(client, model, content)
    if version:
        client.set_registered_model_alias(model, alias, version)
    return version


def _registered(client: "MlflowClient", model: str, content: str) -> str | None:
    """Return the newest version of a model that has this content."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{_CONTENT}` = '{content}'")
    return max((str(each.version) for each in found), key=int, default=None)


def _as_logged(params: Mapping[str, Any]) -> dict[str, str]:
    """Return params flat, as the strings that MLflow gives back. A name may hold a column's, which may hold anything."""
    return {_NO_NAME.sub("_", name): str(value)[:_LONGEST_PARAM] for name, value in flatten(params).items()}


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for first in range(0, len(entities), _MOST_PARAMS):
        client.log_batch(run_id, params=entities[first : first + _MOST_PARAMS])


def _client() -> "MlflowClient":
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=_store())


def _store() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def _experiment(client: "MlflowClient", name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, tags=_TRAINING_KIND))
    except MlflowException:
        # Another stage created it just now, or it cannot be created: then this fails with the reason.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _kept_run(work: Path) -> Any:
    """Return the MLflow run that earlier work in this folder was logged to, or None if MLflow no longer has it."""
    from mlflow.exceptions import MlflowException

    if not (work / _RUN_ID).is_file():
        return None
    try:
        run = _client().get_run((work / _RUN_ID).read_text().strip())
    except MlflowException:
        return None
    return run if run.info.lifecycle_stage == "active" else None


def champion(model: str) -> dict[str, str]:
    """Return the tags of the registered version that is the champion; empty where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(_client().get_model_version_by_alias(model, "champion").tags)
    except MlflowException:
        return {}


def newest_run(experiment: str, tags: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """Return id and tags of the newest finished run of an experiment that has these tags; None where there is none."""
    client = _client()
    if not (found := client.get_experiment_by_name(experiment)):
        return None
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    condition = f"{wanted} and attributes.status = 'FINISHED'"
    runs = client.search_runs([found.experiment_id], condition, max_results=1, order_by=["attributes.end_time DESC"])
    return (runs[0].info.run_id, dict(runs[0].data.tags)) if runs else None


def fetch(run_id: str, name: str, folder: Path) -> Path | None:
    """Download a file that a run logged into `folder`. Return its path; None where the run has none of that name."""
    client = _client()
    if not any(file.path == name for file in client.list_artifacts(run_id)):
        return None
    return Path(client.download_artifacts(run_id, name, str(folder)))


# Runs whose process is gone.


def this_process() -> dict[str, str]:
    """Return tags that name this process on its host. A pid alone is used again by later processes."""
    started = psutil.Process().create_time()
    return {"process.host": socket.gethostname(), "process.pid": str(os.getpid()), "process.started": f"{started:.2f}"}


def is_gone(tags: Mapping[str, Any]) -> bool:
    """Return whether the process that `this_process` named no longer runs; False for a process of another host."""
    if tags.get("process.host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(tags["process.pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return bool(abs(process.create_time() - float(tags["process.started"])) > _SAME_START_SECONDS)
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.AccessDenied):
        return False


def close_lost_runs() -> None:
    """Mark as killed every running run of this host and store whose process is gone."""
    for run in _running(f"tags.`process.host` = '{socket.gethostname()}'"):
        if is_gone(run.data.tags):
            _client().set_terminated(run.info.run_id, "KILLED")


def close_runs(flow_run_id: str) -> None:
    """Mark as killed what a flow that is over, and its stages, left running."""
    for run in _running(f"tags.flow_run = '{flow_run_id}'"):
        _client().set_terminated(run.info.run_id, "KILLED")


def running_flow_runs() -> set[str]:
    """Return the ids of the flow runs in Prefect of which a run counts as running here."""
    return {run.data.tags["flow_run"] for run in _running("tags.flow_run != ''")}


def _running(condition: str) -> list[Any]:
    client = _client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"{condition} and attributes.status = 'RUNNING'"))


# Addresses.


def choose_columns(run_id: str, metrics: Iterable[str], params: Iterable[str]) -> None:
    """Have `experiment_page` show these columns of an experiment's runs; MLflow's table shows none unless told to."""
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in params)]
    client = _client()
    experiment = client.get_run(run_id).info.experiment_id
    client.set_experiment_tag(experiment, _VIEW_TAG, json.dumps({"selectedColumns": columns}))


def experiment_page(experiment: str) -> str:
    """Return the address of an experiment's runs in MLflow's UI, in its view for training."""
    found = _client().get_experiment_by_name(experiment)
    if not found:
        return f"{_ui()}/#/experiments?{_TRAINING_VIEW}"
    view = f"&viewStateShareKey={_VIEW}" if _VIEW_TAG in found.tags else ""
    return f"{_ui()}/#/experiments/{found.experiment_id}/runs?{_TRAINING_VIEW}{view}"


def run_page(run_id: str) -> str:
    """Return the address of a run in MLflow's UI, in its view for training."""
    experiment = _client().get_run(run_id).info.experiment_id
    return f"{_ui()}/#/experiments/{experiment}/runs/{run_id}?{_TRAINING_VIEW}"


def artifact_address(run_id: str, name: str) -> str:
    """Return the address at which MLflow's UI serves a file that a run logged."""
    return f"{_ui()}/get-artifact?{urlencode({'path': name, 'run_uuid': run_id})}"


def _ui() -> str:
    """Return MLflow's UI: the one that KOALA_MLFLOW_UI names, or the tracking server, or the one of `make serve`."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    address = os.environ.get(UI) or (store if store.startswith("http") else "http://127.0.0.1:5000")
    # Links are logged: without the name and password for the server.
    return re.sub(r"(?<=://)[^/]*@", "", address).rstrip("/")
