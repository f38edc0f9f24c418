"""Profiles of few-step teachers: their timesteps, their resolution, and no guidance."""

from collections.abc import Callable
from pathlib import Path

import pytest

from koala.distill.data import TrainingSet
from koala.errors import KoalaError
from koala.params import load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("profile", "size"), [("sdxl-turbo", 512), ("sdxl-lightning", 1024)])
def test_profiles_of_few_step_teachers(profile: str, size: int) -> None:
    """Their timesteps are those at which their own sampler of four steps evaluates them; their resolution is theirs."""
    from diffusers import EulerDiscreteScheduler

    recipe = load(ROOT / "params.yaml", profile=profile, machine="gpu-80gb").recipe
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(recipe.sampling.steps)
    assert sorted(scheduler.timesteps.tolist()) == list(recipe.distill.timesteps or ())
    assert max(min(bucket) for bucket in recipe.encode.buckets) == recipe.download.image_size == size
    assert recipe.distill.caption_dropout == recipe.sampling.guidance == 0


def test_timesteps_that_the_teacher_does_not_have_are_refused(
    workspace: Path, change_params: Callable[..., None]
) -> None:
    change_params(distill={"timesteps": [499, 1000]})
    with pytest.raises(KoalaError, match=r"distill\.timesteps has 1000, where the teacher has 0 to 999"):
        TrainingSet(None, load().recipe.distill, 1000)  # type: ignore[arg-type]
