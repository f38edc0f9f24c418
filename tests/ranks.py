"""Training processes for tests, forked from one process that has imported everything: a start takes milliseconds.

Each rank is a process of its own with the environment that accelerate's launcher gives it. The launcher itself is tested
where `koala distill` is.
"""

import faulthandler
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from forks import forks
from safetensors.torch import load_file

from koala.distill import curves
from koala.distill.job import Job


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank(file: str, environment: dict[str, str], said: str, backend: str | None) -> None:
    """Run one training process: what koala.distill.train does when accelerate starts it."""
    os.environ.update(environment)
    sys.stderr = open(said, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, sys.stderr)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked itself
    import torch

    from koala.distill import checkpoint, hooks, train, trainer

    torch.set_num_threads(1)
    if seconds := environment.get("KOALA_TEST_SLOW_SAVE"):
        save_file = checkpoint.save_file
        checkpoint.save_file = lambda *args: (time.sleep(float(seconds) / 3), save_file(*args))
    if file_of_counts := environment.get("KOALA_TEST_COUNT_REDUCTIONS"):
        _count_reductions(trainer.Trainer, f"{file_of_counts}-{environment['RANK']}")
    if backend:
        trainer.compile_modules = lambda unet, classes: hooks.compile_modules(
            _first_of_each(unet, classes), classes, backend=backend
        )
    train.main(Path(file))


def _first_of_each(model: torch.nn.Module, classes: Sequence[str]) -> torch.nn.ModuleList:
    """The first module of each class: dynamo takes a second for each."""
    named = {type(module).__name__: module for module in reversed(list(model.modules()))}
    return torch.nn.ModuleList(named[name] for name in classes)


def _count_reductions(kind: type, file: str) -> None:
    """Write how often each micro-batch reduces gradients over the processes, a line a micro-batch."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    from torch.nn.parallel import DistributedDataParallel

    prepare, backward, reduce = kind.__init__, kind.backward, _fsdp_param_group.foreach_reduce
    reductions = []

    def prepared(self: Any, *args: Any) -> None:
        prepare(self, *args)
        if isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped.register_comm_hook(
                None, lambda _, bucket: (reductions.append(1), allreduce_hook(None, bucket))[1]
            )

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        reductions.clear()
        found = backward(self, *args, **options)
        with open(file, "a") as lines:
            lines.write(f"{len(reductions)}\n")
        return found

    kind.__init__, kind.backward = prepared, counted
    _fsdp_param_group.foreach_reduce = lambda *args, **options: (reductions.append(1), reduce(*args, **options))[1]


class Training:
    """Ranks that train one job. What a failed test leaves running is ended by `end_all`."""

    started: ClassVar[list[ForkServerProcess]] = []

    @classmethod
    def end_all(cls) -> None:
        for each in cls.started:
            if each.is_alive():
                each.kill()
            each.join(10)
        cls.started.clear()

    def __init__(
        self,
        job: Job,
        processes: int = 1,
        sharded: bool = False,
        bf16: bool = False,
        backend: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.job = job
        self.said = job.state / "said"
        common = {
            **(environment or {}),
            "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no",
        }
        if processes > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        if sharded:
            common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        file = str(job.write())
        self.ranks: list[ForkServerProcess] = []
        for index in range(processes):
            own = {"RANK": str(index), "LOCAL_RANK": str(index)} if processes > 1 else {}
            self.ranks.append(forks().Process(target=rank, args=(file, common | own, str(self.said), backend)))
            self.ranks[-1].start()
        self.started += self.ranks

    def wait(self, seconds: float = 120) -> None:
        """Wait until training has ended well."""
        for each in self.ranks:
            each.join(seconds)
        for each in self.ranks:
            if each.pid and each.is_alive():
                os.kill(each.pid, signal.SIGUSR1)  # have it say where it is
                time.sleep(0.5)
        assert [each.exitcode for each in self.ranks] == [0] * len(self.ranks), self.said.read_text()

    def statuses(self, seconds: float = 30) -> list[int | None]:
        for each in self.ranks:
            each.join(seconds)
        return [each.exitcode for each in self.ranks]

    def wait_for(self, step: int, seconds: float = 200) -> None:
        """Wait until the losses show a step."""
        deadline = time.monotonic() + seconds
        while not (rows := curves.read(self.job.state)) or rows[-1]["step"] < step:
            assert all(each.is_alive() for each in self.ranks), self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        for each in self.ranks:
            if each.pid and each.is_alive():
                os.kill(each.pid, number)

    def kill_after(self, step: int) -> None:
        self.wait_for(step)
        self.signal(signal.SIGKILL)
        assert self.statuses() == [-signal.SIGKILL] * len(self.ranks)

    def counts(self) -> list[int]:
        """How many processes took part in each run of the folder, as they said."""
        return [int(count) for count in re.findall(r"distill: (\d+) processes", self.said.read_text())]


def losses(state: Path) -> list[dict[str, Any]]:
    """The logged rows, without the speed, which differs from run to run."""
    return [{name: value for name, value in row.items() if name != curves.SPEED} for row in curves.read(state)]


def weights(state: Path) -> dict[str, torch.Tensor]:
    return load_file(state / "unet" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(a: Path, b: Path) -> None:
    """The same curve and weights, but for fp32 rounding."""
    for name, tensor in weights(b).items():
        torch.testing.assert_close(weights(a)[name], tensor, rtol=1e-3, atol=1e-4)  # a fifth of one step
    for ours, theirs in zip(losses(a), losses(b), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
