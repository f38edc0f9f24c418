"""Recipes of a few steps, jobs of them, and one run that was never interrupted, which many tests compare with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Training

from koala.distill.config import DistillConfig, DistillMachine
from koala.distill.job import Job
from koala.evaluate.config import SamplingConfig

RECIPE = {
    "steps": 8,
    "batch_size": 8,
    "learning_rate": 5.0e-4,
    "schedule": "cosine",
    "warmup": 20,
    "ema_decay": 0.99,
    "sampling": SamplingConfig(steps=2, guidance=3.0),
}
MACHINE = {"micro_batch": 2, "checkpoint_every": 2, "log_every": 1, "validate_every": 100}


def small_recipe(machine: dict[str, Any] | None = None, **changes: Any) -> DistillConfig:
    """Eight steps of eight images: two micro-batches and more a step, also on two processes."""
    return DistillConfig(**{**RECIPE, **changes}, machine=DistillMachine(**{**MACHINE, **(machine or {})}))


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    Training.end_all()


@pytest.fixture(scope="session")
def recipe() -> Callable[..., DistillConfig]:
    return small_recipe


@pytest.fixture
def make_job(artifacts: Any, tmp_path: Path) -> Callable[..., Job]:
    """Make a job of a small recipe: `make_job("cut", machine={...}, steps=4)`, its state in a folder of that name."""

    def make(
        name: str = "work", student: str = "koala-700m", machine: dict[str, Any] | None = None, **changes: Any
    ) -> Job:
        return artifacts.job(small_recipe(machine, **changes), tmp_path / name, student)

    return make


@pytest.fixture(scope="session")
def uncut(artifacts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of the small recipe's run on one process, which was not interrupted."""
    job = artifacts.job(small_recipe(), tmp_path_factory.mktemp("uncut") / "state")
    Training(job).wait()
    return job.state
