"""The whole pipeline at profile `smoke`, by DVC and by the flow, in a project of its own."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STUDENTS = ("koala-700m", "koala-1b")
Run = Callable[..., str]

pytestmark = pytest.mark.timeout(1200)  # the first test to come runs all stages


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_tables: Path) -> Path:
    """A checkout of its own at profile `smoke`; Prefect's tables are made."""
    folder = tmp_path_factory.mktemp("project")
    for name in (
        "koala",
        "flows",
        "infra",
        "approvals.yaml",
        "source.lock.yaml",
        "dvc.yaml",
        "forget.yaml",
        "params.yaml",
        "prefect.toml",
        ".dvcignore",
        ".gitignore",
    ):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
    params = folder / "params.yaml"
    # A port that the system gives; one training process, which starts sooner than two; two micro-batches a step.
    values = params.read_text().replace("8765", str(free_port()))
    for old, new in (
        ("profile: demo", "profile: smoke"),
        ("accelerate/cpu-two.yaml", "accelerate/cpu.yaml"),
        ("micro_batch: 16\n", "micro_batch: 4\n      log_every: 2\n"),
        ("checkpoint_every: 100\n      validate_every: 200", "checkpoint_every: 2\n      validate_every: 3"),
    ):
        values = changed(values, old, new)
    params.write_text(values)
    (folder / ".prefect").mkdir()
    shutil.copy(prefect_tables, folder / ".prefect/prefect.db")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def changed(text: str, old: str, new: str) -> str:
    """Replace what must be there, once."""
    assert old in text, old
    return text.replace(old, new, 1)


@pytest.fixture(scope="module")
def run(project: Path, programs: Path) -> Run:
    """Run a command of the environment's in the project; gives what it printed. It must end well."""
    commands = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = {**os.environ, "PATH": commands, "OMP_NUM_THREADS": "1"}
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        environment.pop(name, None)

    def run(*command: str) -> str:
        result = subprocess.run(
            command,
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1000,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    return run


@pytest.fixture(scope="module")
def reproduced(run: Run) -> str:
    """What the first `dvc repro` printed."""
    return run("dvc", "repro")


def test_every_stage_runs_once(reproduced: str, project: Path) -> None:
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    stages = list(lock["stages"])
    assert len(stages) == 8 + 4 * len(STUDENTS)
    for stage in stages:
        assert reproduced.count(f"Running stage '{stage}'") == 1
    for student in STUDENTS:
        metrics = json.loads((project / f"artifacts/smoke/evaluation/{student}/metrics.json").read_text())
        assert set(metrics) >= {"teacher", "before", "after", "size_of_teacher", "speed_up"}
        assert 0 < metrics["size_of_teacher"] < 0.8
        assert (project / f"artifacts/smoke/release/{student}/model_index.json").is_file()
        assert json.loads((project / f"releases/smoke/{student}/latest.json").read_text())["version"] == "v1"
        assert (
            (project / f"artifacts/smoke/distilled/{student}/curves.csv")
            .read_text()
            .startswith("step,loss/total,loss/task")
        )


def test_a_second_time_nothing_runs(reproduced: str, run: Run) -> None:
    again = run("dvc", "repro")
    assert "Running stage" not in again
    assert "up to date" in again


def test_one_students_rule_touches_that_student_alone(reproduced: str, run: Run, project: Path) -> None:
    params = project / "params.yaml"
    document = yaml.safe_load(params.read_text())
    document["students"]["koala-1b"]["unet"]["depth"] = {"DW3": 1, "Mid": 1, "UP1": 1}
    planned = plan(run, project, yaml.safe_dump(document))
    assert planned[0] == "Running stage 'student@koala-1b':"
    assert all("@koala-1b" in line for line in planned)


def plan(run: Run, project: Path, content: str, file: str = "params.yaml") -> list[str]:
    """The stages that `dvc repro` would run with another content of a file."""
    before = (project / file).read_text()
    (project / file).write_text(content)
    try:
        return [line for line in run("dvc", "repro", "--dry").splitlines() if line.startswith("Running stage")]
    finally:
        (project / file).write_text(before)


def test_another_machine_interval_or_docstring_elsewhere_reruns_nothing(
    reproduced: str, run: Run, project: Path
) -> None:
    params = (project / "params.yaml").read_text()
    logging = (project / "koala/distill/launch.py").read_text()
    assert plan(run, project, changed(params, "machine: cpu", "machine: 8xgpu-80gb")) == []
    assert plan(run, project, changed(params, "log_every: 2", "log_every: 5")) == []
    assert plan(run, project, changed(params, "a large red circle on", "a tiny red circle on")) != []  # publish's card
    assert plan(run, project, changed(logging, "Starts the", "Start the"), "koala/distill/launch.py") == []
    assert plan(run, project, changed(params, "learning_rate: 6.0e-4", "learning_rate: 4.0e-4")) != []


def test_metrics_and_plots_say_something(reproduced: str, run: Run, project: Path) -> None:
    shown = run("dvc", "metrics", "show")
    assert "after.attributes/all" in shown
    assert "speed_up" in shown
    run("dvc", "plots", "show")
    page = (project / "dvc_plots" / "index.html").read_text()
    assert "loss/total" in page
    assert "grid.png" in page


def test_mlflow_has_a_run_for_each_stage(reproduced: str, project: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("koala-smoke")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 16
    assert all(run.info.status == "FINISHED" for run in runs.values())
    distilled = runs["distill@koala-700m"]
    assert {"loss/total", "loss/task", "loss/output", "loss/feature/UP1", "images_per_second"} <= set(
        distilled.data.metrics
    )
    assert distilled.data.params["distill.steps"] == "6"
    assert distilled.data.params["distill.features"] == "koala"
    assert set(distilled.data.tags) >= {"stage", "commit", "student", "data_hash.latents", "data_hash.teacher"}
    steps = [metric.step for metric in client.get_metric_history(distilled.info.run_id, "loss/total")]
    assert steps == [2, 3, 4, 6]  # every second, and where held-out samples are measured
    logged = [runs[f"evaluate@{student}"].data.metrics for student in STUDENTS]
    # A run too short for two samples of the machine has fewer curves of it.
    one, other = ({name for name in metrics if not name.startswith("system/")} for metrics in logged)
    assert one == other
    assert "attributes/all" in one


def test_a_release_is_traceable_to_its_run(reproduced: str, project: Path) -> None:
    from mlflow import MlflowClient

    release = project / "artifacts/smoke/release/koala-700m"
    provenance = json.loads((release / "training.json").read_text())
    run = MlflowClient(f"sqlite:///{project}/mlflow.db").get_run(provenance["run_id"])
    assert run.data.tags["stage"] == "distill"
    assert run.data.tags["student"] == "koala-700m"
    assert run.data.tags["data_hash.latents"] == provenance["inputs"]["latents"]


def test_the_flow_finds_it_all_done_and_says_where_things_are(reproduced: str, run: Run) -> None:
    said = run("python", "-m", "flows.distill", "--profile", "smoke", "koala-700m")
    assert "Running stage" not in said
    assert "koala-700m before distillation" in said
    assert "attributes right" in said
    assert "artifacts/smoke/evaluation/koala-700m/plots/grid.png" in said
    assert "artifacts/smoke/release/koala-700m" in said
