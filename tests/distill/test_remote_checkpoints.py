"""Checkpoints in S3, from which a machine without the work folder resumes, on real servers."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from ranks import Training, losses, same, weights

from koala.distill import curves
from koala.distill.config import DistillConfig, DistillMachine
from koala.distill.job import Job, checkpoints
from koala.distill.remote_checkpoints import COMPLETE, kept
from koala.errors import KoalaError

MACHINE = DistillMachine(checkpoints="s3://koala/checkpoints/distill/a", checkpoints_minutes=0)


@pytest.fixture
def bucket(s3_server: tuple[str, int]) -> Any:
    """An empty bucket `koala`."""
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="koala")
    return s3


def names(s3: Any) -> list[str]:
    """All objects, without the prefix and without the random part of the folders."""
    found = [entry["Key"] for entry in s3.list_objects_v2(Bucket="koala").get("Contents", ())]
    return sorted(f"{key.split('/')[-2].rpartition('-')[0]}/{key.split('/')[-1]}" for key in found)


def written(state: Path, step: int) -> Path:
    """A checkpoint as training writes it, as small as can be."""
    folder = state / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "student.safetensors").write_bytes(b"weights of %d" % step)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    curves.append(state, step, {"loss/total": 1 / step})
    return folder


def pushed(state: Path, machine: DistillMachine = MACHINE) -> None:
    with kept(machine, state):
        pass


def test_a_killed_run_resumes_elsewhere_to_the_same_bits(
    strict_bucket: Any, make_job: Callable[..., Job], uncut: Path
) -> None:
    """SIGKILL of a run whose folder is then lost: another folder fetches the checkpoint, and ends like an uncut run."""
    lost, other = make_job("lost"), make_job("other")
    with kept(MACHINE, lost.state) as push:
        training = Training(lost)
        training.wait_for(4)
        while checkpoints(lost.state)[-1].name < "step-00000004":
            time.sleep(0.005)
        training.signal(9)
        training.statuses()
        push()
    resumed_from = checkpoints(lost.state)[-1].name
    shutil.rmtree(lost.state)
    with kept(MACHINE, other.state) as push:
        assert [path.name for path in checkpoints(other.state)] == [resumed_from]
        Training(other).wait()
        push()
    assert same(weights(other.state), weights(uncut))
    assert losses(other.state) == losses(uncut)
    assert f"resuming from step {int(resumed_from[5:])}" in (other.state / "said").read_text()


def test_the_last_two_stay_and_what_never_became_complete_goes(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="koala", Key="checkpoints/distill/a/step-00000001-00000000/student.safetensors", Body=b"x")
    bucket.put_object(Bucket="koala", Key="checkpoints/distill/b/step-00000001-00000000/student.safetensors", Body=b"x")
    for step in (2, 4, 6):
        written(tmp_path, step)
        pushed(tmp_path)
    ours = [name for name in names(bucket) if not name.startswith("step-00000001")]
    files = sorted([COMPLETE, "history.jsonl", "state.json", "student.safetensors"])
    assert ours == [f"step-0000000{step}/{name}" for step in (4, 6) for name in files]
    assert len(names(bucket)) == len(ours) + 1  # another training's


@pytest.mark.parametrize("lacks", [COMPLETE, "student.safetensors"])
def test_a_push_that_is_not_whole_does_not_count(bucket: Any, tmp_path: Path, lacks: str) -> None:
    one = tmp_path / "one"
    for step in (2, 4):
        written(one, step)
        pushed(one)
    (key,) = [
        entry["Key"]
        for entry in bucket.list_objects_v2(Bucket="koala")["Contents"]
        if "step-00000004" in entry["Key"] and entry["Key"].endswith(lacks)
    ]
    bucket.delete_object(Bucket="koala", Key=key)
    other = tmp_path / "other"
    other.mkdir()
    with kept(MACHINE, other):
        (found,) = checkpoints(other)
        assert (found / "student.safetensors").read_bytes() == b"weights of 2"
        assert [row["step"] for row in curves.read(other)] == [2]


def test_the_newer_of_folder_and_bucket_is_resumed(bucket: Any, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    written(one, 4)
    pushed(one)
    written(other, 2)
    with kept(MACHINE, other):
        assert [path.name for path in checkpoints(other)] == ["step-00000002", "step-00000004"]
    (other / "step-00000004" / "student.safetensors").write_bytes(b"ours")
    written(other, 6)
    pushed(other)
    with kept(MACHINE, one):
        assert checkpoints(one)[-1].name == "step-00000006"
        assert (one / "step-00000004" / "student.safetensors").read_bytes() == b"weights of 4"


def test_training_goes_on_while_the_bucket_is_down(
    bucket: Any, s3_server: tuple[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with kept(MACHINE, tmp_path) as push:
        bucket.delete_bucket(Bucket="koala")
        written(tmp_path, 2)
        push()
        deadline = time.monotonic() + 30
        while "step-00000002 is not at" not in (said := capfd.readouterr().err):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        bucket.create_bucket(Bucket="koala")
    assert f"step-00000002/{COMPLETE}" in names(bucket)


def test_a_push_waits_for_its_minutes(bucket: Any, tmp_path: Path) -> None:
    machine = MACHINE.model_copy(update={"checkpoints_minutes": 60})
    with kept(machine, tmp_path) as push:
        written(tmp_path, 2)
        push()
        time.sleep(0.3)
        assert names(bucket) == []
    assert len(names(bucket)) == 4


def test_a_bucket_that_cannot_be_read_stops_the_stage(s3_server: tuple[str, int], tmp_path: Path) -> None:
    with (
        pytest.raises(KoalaError, match=r"^cannot read checkpoints at s3://koala/.*NoSuchBucket.*leave `checkpoints`"),
        kept(MACHINE, tmp_path),
    ):
        pass
    with pytest.raises(ValueError, match="checkpoints"):
        DistillMachine(checkpoints="/a/folder")


def test_each_work_folder_has_its_own_prefix(recipe: Callable[..., DistillConfig]) -> None:
    config = recipe(machine={"checkpoints": "s3://koala/checkpoints/"})
    there = config.of_work("distill/koala-700m/0123")
    assert there.machine.checkpoints == "s3://koala/checkpoints/distill/koala-700m/0123"
    assert there.recipe() == config.recipe()
    assert recipe().of_work("distill/koala-700m/0123") == recipe()
