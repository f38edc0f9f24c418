"""Images of the evaluation prompts: generated once, resumed, refused where they are of something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from koala import generate
from koala.errors import KoalaError
from koala.evaluate import generation
from koala.evaluate.config import EvaluateMachine, SamplingConfig
from koala.evaluate.generation import generate_images
from koala.evaluate.images import image_file, read_images
from koala.evaluate.prompts import seeded_prompts
from koala.evaluate.reference import reference


@pytest.fixture
def seeds(monkeypatch):
    """Seeds of the images that are generated, in their order."""
    generated = []
    plain = generate.generate

    def spy(pipeline, prompts, sampling):
        generated.extend(seed for _, seed in prompts)
        return plain(pipeline, prompts, sampling)

    monkeypatch.setattr(generate, "generate", spy)
    return generated


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images' pixels: rounding depends on the batch."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.fixture
def copy(finished, tmp_path):
    """The teacher's images by `make_config()`, to change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_reference_is_the_teachers_images_with_their_prompts(tiny_teacher, make_config, tmp_path, recorder) -> None:
    config, out = make_config(), tmp_path / "reference"
    reference(config, tiny_teacher, out, recorder)
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{number:06d}.png" for number in range(4)), "prompts.jsonl", "settings.json"]
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    prompts = seeded_prompts(config.prompts, 4, 7)
    assert rows == [{"text": prompt.text, "seed": prompt.seed} for prompt in prompts]
    images = read_images(out, prompts, config)
    seeded = [(prompt.text, prompt.seed) for prompt in prompts]
    together = generate.generate(generate.load(tiny_teacher, config.dtype), seeded, config.sampling)
    for one, other in zip(together, images, strict=True):
        assert difference(one, other) <= 1
    assert recorder.logged["images"] == 4
    assert recorder.images == [("images", 0)]


def test_interrupted_generation_resumes(
    tiny_teacher, make_config, finished, copy, recorder, seeds, monkeypatch
) -> None:
    for number in (1, 3):
        image_file(copy, number).unlink()
    image_file(copy, 3).with_suffix(".partial").write_bytes(b"half")
    reference(make_config(machine=EvaluateMachine(batch_size=3)), tiny_teacher, copy, recorder)
    assert seeds == [8, 10]
    for number in range(4):
        with Image.open(image_file(copy, number)) as one, Image.open(image_file(finished, number)) as other:
            assert difference(one, other) <= 1
    assert not list(copy.glob("*.partial"))

    seeds.clear()
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("a model was loaded though no image is missing"))
    reference(make_config(), tiny_teacher, copy, recorder)
    assert seeds == []


@pytest.mark.parametrize(
    "fields",
    [{"seed": 8}, {"count": 2}, {"sampling": SamplingConfig(steps=3, guidance=1.0)}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_images_of_other_prompts_or_settings_are_generated_again(
    tiny_teacher, make_config, copy, seeds, fields
) -> None:
    config = make_config(**fields)
    prompts = seeded_prompts(config.prompts, config.count, config.seed)
    with pytest.raises(KoalaError, match="run `koala reference` again"):
        read_images(copy, prompts, config)
    generate_images(tiny_teacher, prompts, config, copy, "test")
    assert seeds == [prompt.seed for prompt in prompts]
    assert len(list(copy.glob("*.png"))) == config.count
    assert len(read_images(copy, prompts, config)) == config.count


def test_a_reference_that_lacks_images_is_refused(make_config, copy) -> None:
    config = make_config()
    prompts = seeded_prompts(config.prompts, config.count, config.seed)
    image_file(copy, 2).unlink()
    with pytest.raises(KoalaError, match="lacks 1 of its 4 images"):
        read_images(copy, prompts, config)


def test_images_are_opened_one_at_a_time(make_config, finished, monkeypatch) -> None:
    config = make_config()
    images = read_images(finished, seeded_prompts(config.prompts, config.count, config.seed), config)
    opened = []
    plain = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file.name) or plain(file))
    assert len(images) == 4
    assert opened == []
    assert images[-1].size == (32, 32)
    assert len(images[1:3]) == 2
    assert opened == ["000003.png", "000001.png", "000002.png"]


@pytest.mark.usefixtures("forked")
def test_processes_share_the_images(tiny_teacher, make_config, finished, copy, recorder, monkeypatch) -> None:
    """Three images are missing, of two processes one generates two batches: each image is as one process makes it."""
    started: list[list[list[int]]] = []
    plain = generation.guarded

    def spy(command, log):
        started.append(json.loads(Path(command[-1]).read_text())["batches"])
        return plain(command, log)

    monkeypatch.setattr(generation, "guarded", spy)
    kept = image_file(copy, 2).stat().st_mtime_ns
    for number in (0, 1, 3):
        image_file(copy, number).unlink()
    config = make_config(machine=EvaluateMachine(batch_size=1, processes=2))
    reference(config, tiny_teacher, copy, recorder)
    assert sorted(started) == [[[0], [3]], [[1]]]  # none is generated twice
    for number in range(4):
        with Image.open(image_file(copy, number)) as one, Image.open(image_file(finished, number)) as other:
            assert difference(one, other) <= 1
    assert image_file(copy, 2).stat().st_mtime_ns == kept
    reference(config, tiny_teacher, copy, recorder)
    assert len(started) == 2


@pytest.mark.usefixtures("forked")
def test_a_process_that_fails_is_said(tiny_teacher, make_config, tmp_path, recorder) -> None:
    broken = Path(shutil.copytree(tiny_teacher, tmp_path / "broken"))
    shutil.rmtree(broken / "unet")
    config = make_config(machine=EvaluateMachine(batch_size=2, processes=2))
    with pytest.raises(KoalaError, match=r"a process that generates images ended with status 1: .*cannot load a model"):
        reference(config, broken, tmp_path / "out", recorder)
