"""Training on several nodes: what Slurm and SkyPilot start, with two nodes played by two processes on loopback."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.services import free_port

ROOT = Path(__file__).parents[2]
SCRIPTS = ("infra/node.sh", "infra/slurm/train.sbatch")


def test_the_scripts_are_sound() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    task = yaml.safe_load((ROOT / "infra/skypilot.yaml").read_text())
    done = subprocess.run([shellcheck, "--shell=bash", "-"], input=task["run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_all_give_a_node_what_it_asks_for() -> None:
    asked = set(re.findall(r"\$\{(KOALA_\w+):\?\}", (ROOT / "infra/node.sh").read_text()))
    assert len(asked) == 4
    for starter in ("infra/slurm/train.sbatch", "infra/skypilot.yaml"):
        assert asked <= set(re.findall(r"(KOALA_\w+)=", (ROOT / starter).read_text()))


@pytest.mark.usefixtures("forked")
def test_two_nodes_train_one_student(distillable: Path, change_params: Callable[..., None]) -> None:
    base = yaml.safe_load((ROOT / "infra/accelerate/two-nodes-cpu.yaml").read_text())
    wrong = {"num_machines": 9, "num_processes": 9, "main_process_ip": "192.0.2.1", "main_process_port": free_port()}
    (distillable / "base.yaml").write_text(yaml.safe_dump({**base, **wrong}))
    change_params(distill={"batch_size": 4, "steps": 2}, machine={"launch": "runs/launch.yaml", "micro_batch": 2})
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shared = {**os.environ, "PATH": commands, "KOALA_LAUNCH": "base.yaml", "KOALA_NODES": "2", "KOALA_GPUS": "1"}
    nodes = []
    for rank in (1, 0):  # the helper is there first
        with Path(f"node-{rank}.log").open("w") as log:
            own = {**shared, "KOALA_FIRST": "127.0.0.1", "KOALA_RANK": str(rank)}
            command = ["infra/node.sh", "koala-700m"]
            nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        assert [node.wait(300) for node in nodes] == [0, 0], (
            Path("node-0.log").read_text() + Path("node-1.log").read_text()
        )
    finally:
        for node in nodes:
            node.kill()
    assert (distillable / "artifacts/smoke/distilled/koala-700m/unet").is_dir()
    launch = yaml.safe_load(Path("runs/launch.yaml").read_text())
    assert (launch["num_machines"], launch["num_processes"], launch["main_process_ip"]) == (2, 2, "127.0.0.1")
