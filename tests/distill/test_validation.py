"""The images that training shows of itself."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from ranks import same, weights

from koala.distill.config import Compiled
from koala.distill.hooks import compile_modules
from koala.distill.memory import LiveBytes
from koala.distill.train import StopSignal, load_teacher, train
from koala.distill.validation import validate
from koala.evaluate.config import SamplingConfig
from koala.generate import generate

CPU = torch.device("cpu")


def test_more_prompts_take_no_more_memory(make_job: Callable) -> None:
    """Validation runs beside all that training holds: what fits once fits always."""
    teacher = load_teacher(make_job(), with_vae=True)
    peaks, sizes = [], []
    for count in (1, 4):
        prompts = tuple(f"a large red circle, number {number}" for number in range(count))
        job = make_job(f"{count}", sampling=SamplingConfig(steps=2, guidance=3.0, prompts=prompts))
        with torch.no_grad(), LiveBytes() as live:
            validate(1, teacher, teacher.unet, job.config, job.state, CPU)
        sizes.append(Image.open(job.state / "validation/00000001.png").size)
        peaks.append(live.peak)
    assert peaks[1] < 1.2 * peaks[0]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_what_training_compiled_is_not_compiled_anew_for_a_few_images(make_job: Callable) -> None:
    sampling = SamplingConfig(steps=1, guidance=3.0, prompts=("a large red circle",))
    job = make_job(sampling=sampling)
    teacher = load_teacher(job, with_vae=True)
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable:
        compiled.append(1)
        return graph.forward

    compile_modules(teacher.unet, get_args(Compiled), backend=count)
    validate(1, teacher, teacher.unet, job.config, job.state, CPU)
    assert not compiled


def test_the_teachers_images_are_generated_once_and_the_student_each_time(
    make_job: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts, three validations, one of them after an interruption: the teacher runs for two images, not for six."""
    sampling = SamplingConfig(steps=2, guidance=3.0, prompts=("a large red circle", "a small blue square"))
    job = make_job(sampling=sampling, steps=2, machine={"validate_every": 1})
    drawn: list[str] = []

    def generate(pipeline: object, prompts: list, sampling: object) -> list[Image.Image]:
        drawn.append("teacher" if pipeline.unet is holder[0].unet else "student")
        return [Image.new("RGB", (32, 32))]

    holder: list = []

    def load(*args: object, **kwargs: object) -> object:
        holder[:] = [load_teacher(*args, **kwargs)]
        return holder[0]

    monkeypatch.setattr("koala.distill.validation.generate", generate)
    monkeypatch.setattr("koala.distill.train.load_teacher", load)
    train(job, StopSignal())
    longer = make_job(sampling=sampling, steps=2, machine={"validate_every": 1})
    validate(3, holder[0], holder[0].unet, longer.config, longer.state, CPU)
    assert drawn.count("teacher") == 2 + 2  # the last call passes the teacher's U-Net as the student
    assert drawn.count("student") == 2 * 2


def test_validation_shows_the_ema_and_leaves_training_as_it_was(make_job: Callable, uncut: Path) -> None:
    sampling = SamplingConfig(steps=2, guidance=3.0, prompts=("a large red circle",))
    job = make_job(sampling=sampling, machine={"validate_every": 2})
    seen: list[dict[str, torch.Tensor]] = []
    original = validate

    def spy(step: int, teacher: object, student: torch.nn.Module, *rest: object) -> None:
        seen.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        original(step, teacher, student, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("koala.distill.train.validate", spy)
        torch.set_num_threads(1)
        train(job, StopSignal())
    assert len(seen) == 4
    assert same(seen[-1], weights(job.state))
    assert same(weights(job.state), weights(uncut))
    assert len(list((job.state / "validation").glob("0*.png"))) == 4


@pytest.mark.parametrize("zeros", [True, False])
def test_the_unconditional_input_is_the_teachers_own(make_job: Callable, zeros: bool) -> None:
    sampling = SamplingConfig(steps=2, guidance=7.0, prompts=("a large red circle",))
    job = make_job(sampling=sampling)
    teacher = load_teacher(job, with_vae=True)
    teacher.register_to_config(force_zeros_for_empty_prompt=zeros)
    validate(1, teacher, teacher.unet, job.config, job.state, CPU)
    [shown] = (job.state / "validation").glob("teacher-*.png")
    [expected] = generate(teacher, [("a large red circle", job.config.seed)], sampling)
    assert Image.open(shown).tobytes() == expected.tobytes()
