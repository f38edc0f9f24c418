"""The settings that users run, together: every machine of params.yaml at tiny size, killed and resumed to the same bits.

A machine's launch file is replaced by its counterpart on a CPU: one process, two, or two that shard the student. The first layer
of each kind is compiled (test_trainer.py compiles all) as far as dynamo's graphs, which compute to the bit what eager layers do;
inductor's kernels would take minutes.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from ranks import Training, losses, same, weights

from koala.distill import launch_settings
from koala.distill.config import DistillConfig
from koala.params import load

ROOT = Path(__file__).parents[2]
MACHINES = list(yaml.safe_load((ROOT / "params.yaml").read_text())["machines"])


def of_machine(make_job: Callable, name: str, machine: str, **changes: object) -> object:
    """A job of the small recipe with a machine's settings, small enough for tests: two buckets, a bf16 teacher.

    Residual blocks are compiled on machines of one process: dynamo takes a second for each, in every rank.
    """
    settings = load(ROOT / "params.yaml", machine=machine).distill("koala-700m").machine
    one = launch_settings.read(settings.launch).processes == 1
    small = {
        "compile": settings.compile if one else settings.compile[:1],
        "micro_batch": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "validate_every": 100,
        "workers": min(settings.workers, 1),
    }
    return make_job(name, machine={**settings.model_dump(), **small}, teacher_dtype="bfloat16", steps=4, **changes)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machines_settings_train_together_and_resume_to_the_same_bits(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.chdir(ROOT)
    eight_bit = {"optimizer": "adamw-8bit"} if machine == "gpu-24gb" and find_spec("bitsandbytes") else {}
    cut, whole = (of_machine(make_job, name, machine, **eight_bit) for name in ("cut", "whole"))
    launch = launch_settings.read(cut.config.machine.launch)
    processes = min(launch.processes, 2)
    how = {"sharded": launch.sharded, "bf16": launch.bf16}
    compiled = {**how, "backend": "eager"} if cut.config.machine.compile else how
    Training(cut, processes, **compiled).kill_after(3)
    # The uncut run compiles nothing, and saves at its end alone.
    plain = whole.config.machine.model_copy(update={"compile": (), "checkpoint_every": 100})
    uncut = whole.config.model_copy(update={"machine": plain})
    whole_run = Training(whole.model_copy(update={"config": uncut}), processes, **how)
    Training(cut, processes, **compiled).wait()
    whole_run.wait()
    assert same(weights(cut.state), weights(whole.state))
    assert losses(cut.state) == losses(whole.state)
    assert len({row["loss/total"] for row in losses(whole.state)}) == 4


@pytest.mark.parametrize(
    ("launch", "changes", "line"),
    [
        ("fsdp2", {"machine": {"channels_last": True}}, "set distill.channels_last to false"),
        ("fsdp2", {"machine": {"ema_offload": True}}, "set distill.ema_offload to false"),
        ("fsdp2", {"optimizer": "adamw-8bit"}, "set distill.optimizer to adamw"),
        ("eight-gpus", {"batch_size": 12}, "make it a multiple of 8"),
    ],
)
def test_what_cannot_work_together_is_refused(
    recipe: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch, launch: str, changes: dict, line: str
) -> None:
    from koala.errors import KoalaError

    monkeypatch.chdir(ROOT)
    machine = {"launch": f"infra/accelerate/{launch}.yaml", **changes.pop("machine", {})}
    with pytest.raises(KoalaError, match=line):
        launch_settings.check(recipe(machine, **changes))
