"""A machine that is lost in the middle of a distillation: another of its pool resumes from the checkpoint in S3.

Machines are played by workers in folders of their own, which share nothing but the servers: Prefect, MLflow, SeaweedFS.
Prefect waits a minute and a half for heartbeats, so `make test-team` runs this, and `make test` does not.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ranks import same
from safetensors.torch import load_file

from flows import pools
from flows.deployments import deploy
from koala import tracking
from koala.distill import curves
from koala.distill.remote_checkpoints import COMPLETE
from koala.provenance import git_commit

pytestmark = [pytest.mark.team, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STAGE = "distill@koala-700m"
STEPS = 400

# `prepare` stands for all stages before `distill`.
DVC_YAML = """
stages:
  prepare:
    cmd: mkdir -p artifacts/smoke && cp -r {made}/. artifacts/smoke
    deps: [stage.py]
    outs:
      - artifacts/${{profile}}/latents
      - artifacts/${{profile}}/captions
      - artifacts/${{profile}}/teacher
      - artifacts/${{profile}}/student/koala-700m
  distill:
    foreach: ${{students}}
    do:
      cmd: koala distill ${{key}}
      deps:
        - artifacts/${{profile}}/latents
        - artifacts/${{profile}}/captions
        - artifacts/${{profile}}/teacher
        - artifacts/${{profile}}/student/${{key}}
      outs: ["artifacts/${{profile}}/distilled/${{key}}"]
"""


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments], cwd=folder, check=True
    )


@pytest.fixture
def team(project: Path, strict_bucket: Any, artifacts: Any, tmp_path: Path) -> Path:
    """A project with the real stage `distill` of one small student, its remote and its checkpoints in S3."""
    made = tmp_path / "made"
    for noun, folder in (
        ("teacher", artifacts.teacher),
        ("latents", artifacts.latents),
        ("captions", artifacts.captions),
    ):
        shutil.copytree(folder, made / noun)
    (made / "captions/none").touch()  # DVC takes no empty folder
    shutil.copytree(artifacts.student("koala-700m"), made / "student/koala-700m")
    (project / "dvc.yaml").write_text(DVC_YAML.format(made=made))
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document |= {"profile": "smoke", "students": {"koala-700m": document["students"]["koala-700m"]}}
    document["profiles"]["smoke"]["distill"] |= {"steps": STEPS}
    document["machines"]["cpu"]["distill"] |= {
        "launch": "infra/accelerate/cpu.yaml",
        "micro_batch": 4,
        "checkpoint_every": 20,
        "log_every": 10,
        "validate_every": STEPS,
        "checkpoints": "s3://koala/checkpoints",
        "checkpoints_minutes": 0,
    }
    (project / "params.yaml").write_text(yaml.safe_dump(document))
    config = project / ".dvc/config"
    remote = f"['remote \"team\"']\n    url = s3://koala/dvc\n    endpointurl = {os.environ['AWS_ENDPOINT_URL']}\n"
    config.write_text(config.read_text().replace("[core]", "[core]\n    remote = team", 1) + remote)
    with (project / ".gitignore").open("a") as ignored:
        ignored.write("/runs\n/artifacts\n/.prefect\n")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message=team")
    git_commit.cache_clear()
    return project


def test_another_machine_resumes_from_the_checkpoint_in_s3(
    team: Path,
    machines: Any,
    strict_bucket: Any,
    mlflow_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "parent"))
    deploy(pools=True)
    said: list[str] = []

    def complete() -> list[str]:
        objects = strict_bucket.list_objects_v2(Bucket="koala", Prefix="checkpoints/").get("Contents", ())
        return [entry["Key"] for entry in objects if entry["Key"].endswith(COMPLETE)]

    with tracking.flow_run("koala-smoke", "team", "team") as parent, ThreadPoolExecutor() as threads:
        machines.join("one", "cpu", team)
        stage = threads.submit(
            copy_context().run, pools.run_in_pool, STAGE, "cpu", parent.id, pools.commit(), said.append
        )
        deadline = time.monotonic() + 200
        while not complete():
            assert time.monotonic() < deadline, machines.log("one")
            assert not stage.done(), machines.log("one")
            time.sleep(0.2)
        machines.kill("one")
        lost_at = time.monotonic()
        machines.join("two", "cpu", team)
        state = stage.result(600)
        took = time.monotonic() - lost_at
        assert state.is_completed(), f"{state.message}\n{machines.log('two')}"
        pools.bring_back(STAGE, "team", parent.id, said.append)
    assert took < 400
    assert "its machine was lost" in said[0], said
    assert "resuming from step" in machines.log("two")
    assert f"resuming from step {STEPS}" not in machines.log("two")

    # The lost machine's run is closed; the other's has all losses.
    of_stage = MlflowClient(mlflow_store).search_runs(
        [MlflowClient(mlflow_store).get_experiment_by_name("koala-smoke").experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.id}'",
        order_by=["start_time"],
    )
    assert [run.info.status for run in of_stage] == ["KILLED", "FINISHED"]
    history = MlflowClient(mlflow_store).get_metric_history(of_stage[1].info.run_id, "loss/total")
    assert [point.step for point in history] == list(range(10, STEPS + 1, 10))

    # A run that nobody interrupted, in a folder of its own, ends with the same bits and the same losses.
    uncut = tmp_path / "uncut"
    git(tmp_path, "clone", "--quiet", str(team), str(uncut))
    document = yaml.safe_load((uncut / "params.yaml").read_text())
    del document["machines"]["cpu"]["distill"]["checkpoints"]
    (uncut / "params.yaml").write_text(yaml.safe_dump(document))
    shutil.copytree(tmp_path / "made", uncut / "artifacts/smoke")
    koala = Path(sys.executable).with_name("koala")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KOALA_MACHINE": "cpu"}
    subprocess.run([koala, "distill", "koala-700m"], cwd=uncut, env=environment, check=True, capture_output=True)
    ours, theirs = team / "artifacts/smoke/distilled/koala-700m", uncut / "artifacts/smoke/distilled/koala-700m"
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert same(load_file(ours / unet), load_file(theirs / unet))
    assert losses(ours) == losses(theirs)


def losses(distilled: Path) -> Any:
    import pandas as pd

    return pd.read_csv(distilled / "curves.csv").drop(columns=curves.SPEED).to_csv()
